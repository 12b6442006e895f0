"""The index of this process, the number of processes, and facts that all must share."""

import os

import numpy as np
import pytest
import runs
import small
from jax._src.clusters import cloud_tpu_cluster

from gptjax.cluster import processes
from gptjax.cluster.processes import Options
from gptjax.data import loader
from gptjax.data.packing import Packer
from gptjax.errors import ProcessLost, UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options("host:1"), "go together"),
        (Options("host:1", 2), "go together"),
        (Options("", 2, 0), "go together"),
        (Options("host", 2, 0), "`coordinator_address`=host: must be HOST:PORT"),
        (Options("host:１２", 2, 0), "must be HOST:PORT"),
        (Options("host:1", 2, 2), "`process_id`=2: must be 0 to 1"),
        (Options("host:1", 0, 0), "`num_processes`=0: must be at least 1"),
    ],
)
def test_wrong_flags_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        processes.place(options)


SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-10]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip


FIRST = "MEGASCALE_COORDINATOR_ADDRESS"
GKE = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2", "TPU_WORKER_ID": "2",
    "TPU_WORKER_HOSTNAMES": "localhost,b,c,d", "TPU_SKIP_MDS_QUERY": "1",
    "MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": "", FIRST: "",
}  # fmt: skip
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", FIRST: "localhost:8080"}


def surround(monkeypatch, environment: dict[str, str], tpu: bool = False) -> None:
    """Sets the variables of one cluster and removes those of others; `tpu`: on a TPU VM."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_", "JOB_COMPL")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", tpu)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM, ("node07:61441", 4, 2)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell inside a job of four tasks
        (MPI, ("10.96.0.1:62624", 2, 1)),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (GKE, ("localhost:8482", 4, 2)),
        (GKE | SLICES, ("localhost:8482", 8, 6)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (GKE | {"JAX_COORDINATOR_PORT": "99"}, ("localhost:99", 4, 2)),
    ],
)
def test_the_environment_tells_where_there_are_several(environment, expected, monkeypatch):
    surround(monkeypatch, environment, tpu="TPU_WORKER_ID" in environment)
    place = processes.place(Options())
    assert expected == (place and (place.address, place.count, place.index))
    assert processes.place(Options(num_processes=1)) is None


@pytest.mark.parametrize(("slices", "expected"), [(1, (4, 2)), (2, (8, 6))])
def test_the_metadata_of_a_tpu_vm_tell(slices, expected, monkeypatch):
    """A fake replaces Google's metadata server."""
    workers = ",".join(f"w{i}:unknown:10.0.0.{i}" for i in range(1, 5))
    more = f"MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n{FIRST}: '10.0.0.1:8080'\n"
    metadata = {
        "agent-worker-number": "2", "worker-network-endpoints": workers,
        "tpu-env": "ZONE: 'z'\n" + more * (slices > 1),
    }  # fmt: skip
    surround(monkeypatch, {}, tpu=True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    place = processes.place(Options())
    assert place is not None
    assert (place.address, place.count, place.index) == ("10.0.0.1:8482", *expected)


def test_a_machine_of_process_0_that_never_comes_is_named(monkeypatch):
    surround(monkeypatch, GKE | {"TPU_WORKER_HOSTNAMES": "no.such.host.invalid,b"}, tpu=True)
    monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda seconds: None)
    with pytest.raises(ProcessLost, match=r"process 0 of 2 was not found .* no\.such\.host"):
        processes.place(Options(initialization_timeout=1))


def test_an_environment_that_jax_does_not_know_is_refused(monkeypatch):
    # Open MPI 5 sets no other variable that helps.
    surround(monkeypatch, {"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(UserError, match=r"Open MPI says .* give `coordinator_address`"):
        processes.place(Options())


def test_a_difference_names_process_and_field():
    same = {"config": {"seed": 0, "model": {"width": 16}}, "tokenizer": "a"}
    other = {"config": {"seed": 0, "model": {"width": 24}}, "tokenizer": "a"}
    names = ["process 0", "process 1", "process 2 of 3 (h)"]
    assert processes._different([same, same, same], names) == ""
    found = processes._different([same, same, other], names)
    assert found.startswith("process 2 of 3 (h) differs from process 0: `model.width` 24,")


def half(which: int):
    """Returns a function that selects the rows of one of two processes."""
    return lambda rows: np.arange(rows) // (rows // 2) == which


@pytest.mark.parametrize("kind", ["text", "task"])
def test_the_rows_of_two_processes_are_those_of_one(kind):
    if kind == "text":
        stream = np.arange(1, 400, dtype=np.int32)

        def make(*local):
            return loader.TextBatches(stream, 16, 4, 3, *local)
    else:
        _, examples = small.examples("multiple_choice", 20)
        packer = Packer(examples.lengths, 8, 1, divisor=2)

        def make(*local):
            return loader.BalancedBatches(examples, packer, 8, 3, *local)

    whole, parts = make(), [make(half(0)), make(half(1))]
    for step in range(4):
        expected, found = whole[step], [part[step] for part in parts]
        rows = len(expected.tokens) // 2
        tokens = {int((batch.segment_ids > 0).sum()) for batch in (expected, *found)}
        assert len(tokens) == 1
        for name, array in vars(expected).items():
            if array is None:
                continue
            np.testing.assert_array_equal(getattr(found[0], name)[:rows], array[:rows])
            np.testing.assert_array_equal(getattr(found[1], name)[rows:], array[rows:])
        assert not found[0].tokens[rows:].any(), "the other process's rows are not read"
        assert expected.tokens[rows:].any()


def test_other_modes_run_alone():
    error = runs.main(
        "--mode=predict", "--coordinator_address=localhost:1", "--num_processes=2",
        "--process_id=0",
    ).error  # fmt: skip
    assert "--mode=predict: runs in one process" in error


def test_the_hash_of_the_sources_is_that_of_the_installed_package(tmp_path, monkeypatch):
    """An installed package has the experiments inside, a repository beside it."""
    hashes = []
    for name, files in {
        "repository": ["cluster/processes.py", "cli/experiments.py"],
        "installed": ["cluster/processes.py", "cli/experiments.py", "experiments/quickstart.py"],
        "other": ["cluster/processes.py"],
    }.items():
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
        monkeypatch.setattr(processes, "__file__", str(tmp_path / name / files[0]))
        hashes.append(processes._code())
    assert hashes[0] == hashes[1] != hashes[2]
