"""Runs in a bucket. A server in this process speaks Google's storage protocol on localhost."""

import http
import json
import os
import pathlib
import subprocess
import sys

import pytest
import runs
from etils import epath

from gptjax.checkpoint import store as checkpoint
from gptjax.errors import UserError
from gptjax.io import files, remote
from gptjax.train import log as log_lib

BUCKET = "gs://bucket"


def emulator():
    """Returns the server's module, with two missing features that tensorstore needs."""
    from gcp_storage_emulator.handlers import objects

    if "gcp_storage_emulator.server" not in sys.modules:  # its routes are made by the import
        plain_download, plain_insert = objects.download, objects.insert

        def generation(request, storage, name: str) -> str:
            try:
                return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            except Exception:
                return "0"

        def download(request, response, storage, *args, **kwargs):
            response["x-goog-generation"] = generation(
                request, storage, request.params["object_id"]
            )
            plain_download(request, response, storage, *args, **kwargs)

        def insert(request, response, storage, *args, **kwargs):
            wanted = request.query.get("ifGenerationMatch")
            name = request.query.get("name", [""])[0]
            if wanted and wanted[0] != generation(request, storage, name):
                response.status = http.HTTPStatus.PRECONDITION_FAILED
                return
            plain_insert(request, response, storage, *args, **kwargs)

        objects.download, objects.insert = download, insert
    import gcp_storage_emulator.server

    return gcp_storage_emulator.server


@pytest.fixture(scope="module", autouse=True)
def server():
    """A bucket in memory, which gs:// means in this process and in those that it starts."""
    server = emulator().create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    url = f"http://localhost:{server._api._httpd.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)  # gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("EPATH_USE_TF", "false")
        yield server
    server.stop()


def read(path: str) -> str:
    return epath.Path(path).read_text()


def tree(path: str) -> set[str]:
    """Returns the addresses of all objects below an address."""
    found = set()
    for each in epath.Path(path).iterdir():
        found |= tree(str(each)) if each.is_dir() else {str(each)}
    return found


def train(workdir: str, *arguments: str) -> runs.Result:
    return runs.main(*arguments, *runs.TINY, *runs.files().pretrain, f"--workdir={workdir}")


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    """Two runs with the same flags, one in the bucket and one in a folder."""
    there, here = f"{BUCKET}/shared/run", str(tmp_path_factory.mktemp("here") / "run")
    for workdir in (there, here):
        flags = [*runs.TINY, *runs.files().pretrain, *runs.files().finetune]
        result = runs.main(*flags, f"--workdir={workdir}")
        assert result.code == 0, result.err
    return there, here


def names(folder: str) -> set[str]:
    root = pathlib.Path(folder)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_leaves_the_same_in_a_bucket_as_in_a_folder(trained):
    there, here = trained
    for name in ("metrics.jsonl", "config.json", "tokenizer.json"):
        assert read(f"{there}/{name}") == pathlib.Path(here, name).read_text(), name
    ours, theirs = json.loads(read(f"{there}/summary.json")), runs.summary(here)
    for stage in ("pretrain", "finetune"):
        for speed in ("tokens_per_second", "input_wait", "mfu"):
            ours[stage].pop(speed, None), theirs[stage].pop(speed, None)
    assert ours == theirs
    found = {path.removeprefix(f"{there}/") for path in tree(there)}
    plots = {name for name in names(here) if name.startswith("plots/")}
    assert plots <= found
    for stage in ("pretrain", "finetune"):
        assert any(name.startswith(f"tensorboard/{stage}/events") for name in found)
        scores = f"checkpoints/{stage}/scores.json"
        assert read(f"{there}/{scores}") == pathlib.Path(here, scores).read_text()
        assert checkpoint.CheckpointStore(there, stage, read_only=True).steps() == runs.steps(
            here, stage
        )


@pytest.mark.slow
def test_events_in_a_bucket_are_whole(trained):
    from tensorboardX.proto import event_pb2

    there, here = trained

    def tags(data: bytes) -> list[tuple[str, int]]:
        found, place = [], 0
        while place < len(data):
            length = int.from_bytes(data[place : place + 8], "little")
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            found += [(value.tag, event.step) for value in event.summary.value]
            place += length + 16
        return found

    (far,) = epath.Path(there, "tensorboard", "pretrain").iterdir()
    (near,) = pathlib.Path(here, "tensorboard", "pretrain").iterdir()
    assert tags(far.read_bytes()) == tags(near.read_bytes()) != []


@pytest.mark.slow
def test_predictions_and_texts_come_from_a_bucket(trained, tmp_path):
    outputs = []
    for i, workdir in enumerate(trained):
        path = tmp_path / f"{i}.csv"
        result = runs.main(
            "--mode=predict", f"--checkpoint={workdir}", f"--input={runs.files().test}",
            f"--output={path}",
        )  # fmt: skip
        assert result.code == 0, result.err
        text = runs.main("--mode=generate", f"--checkpoint={workdir}", "--prompt=the ").out
        outputs.append((path.read_text(), text))
    assert outputs[0] == outputs[1]
    step = runs.main("--mode=evaluate", f"--checkpoint={trained[0]}/checkpoints/pretrain/20")
    assert step.code == 0, step.err
    assert json.loads(step.out)["checkpoint"] == f"{trained[0]}/checkpoints/pretrain/20"


@pytest.mark.slow
def test_a_run_continues_from_a_bucket(trained, tmp_path):
    there, _ = trained
    start = f"--config.init_from={there}/checkpoints/pretrain"
    flags = [*runs.files().finetune, start, f"--workdir={tmp_path}/next"]
    result = runs.main("--config=experiments/finetune_file.py", *flags)
    assert result.code == 0, result.err


@pytest.mark.slow
def test_a_killed_run_resumes_in_the_bucket_bit_for_bit(trained):
    """The process gets SIGKILL after step 10 is saved, then the same command runs again."""
    workdir = f"{BUCKET}/killed/run"
    flags = [*runs.TINY, *runs.files().pretrain, *runs.files().finetune, f"--workdir={workdir}"]
    # The process kills itself at step 13, after the save of step 10.
    code = (
        "import os, signal, runpy, sys\n"
        "from gptjax.train import loop as trainer\n"
        "real = trainer.Trainer._step\n"
        "def step(self, batch):\n"
        "    real(self, batch)\n"
        "    if self._done == 13:\n"
        "        self._checkpoints.wait()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "trainer.Trainer._step = step\n"
        "from gptjax.cli import main\n"
        "sys.exit(main.main(main.parse(sys.argv)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    assert checkpoint.CheckpointStore(workdir, "pretrain", read_only=True).steps() == [10]
    saved = log_lib.read(workdir)
    kept = [record["step"] for record in saved if record["split"] == "train"]
    assert kept[:10] == list(range(1, 11)), "the lines of every step that was saved"
    result = runs.main(*flags)
    assert result.code == 0, result.err
    assert "continuing at step 10 of 20" in result.out
    whole = f"{trained[0]}/metrics.jsonl"
    assert read(f"{workdir}/metrics.jsonl") == read(whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_moved_aside_in_the_bucket():
    workdir, alone = f"{BUCKET}/damaged/run", "--config=experiments/pretrain_file.py"
    assert train(workdir, alone).code == 0
    before = read(f"{workdir}/metrics.jsonl")
    place = epath.Path(workdir, "checkpoints", "pretrain", "20")
    for path in tree(str(place / "params")):
        data = bytearray(epath.Path(path).read_bytes())
        epath.Path(path).write_bytes(bytes(byte ^ 255 for byte in data))
    result = train(workdir, alone)
    assert result.code == 0, result.err
    assert "continuing at step 10 of 20" in result.out
    assert (epath.Path(workdir) / "checkpoints" / "damaged" / "pretrain-20").exists()
    assert read(f"{workdir}/metrics.jsonl") == before


# Wrong addresses


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("s3://bucket/run", "knows folders and gs:// only"),
        ("http://host/run", "must be a folder or gs://BUCKET/FOLDER"),
        ("gs://", "must be a folder or gs://BUCKET/FOLDER"),
        ("gs://bucket", "give a folder in the bucket, as gs://bucket/RUN"),
        ("gs://nobody/run", "there is no bucket nobody"),
    ],
)
def test_an_address_that_cannot_be_is_one_line(workdir, message):
    assert message in train(workdir).error
    result = runs.main("--mode=generate", f"--checkpoint={workdir}")
    assert message in result.error
    assert f"--checkpoint={workdir}: " in result.error


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?"])
def test_a_folder_whose_checkpoints_would_be_lost_is_refused(name, tmp_path):
    """orbax takes the path for a glob pattern, and does not find what it has saved there."""
    workdir = tmp_path / name / "run"
    assert "must be without [, * and ?" in train(str(workdir)).error
    assert not workdir.exists()


def test_a_bucket_without_a_run_is_one_line():
    result = runs.main("--mode=generate", f"--checkpoint={BUCKET}/none")
    assert "no checkpoint there" in result.error


def test_a_missing_package_is_named():
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"  # as if it were not installed
        "from gptjax.cli import main; sys.exit(main.main(main.parse(sys.argv)))\n"
    )
    flags = ["--mode=generate", f"--checkpoint={BUCKET}/run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: --checkpoint={BUCKET}/run: needs a package; pip install")
    assert done.stderr.count("\n") == 1


def test_import_does_not_write_to_an_address(tmp_path):
    (tmp_path / "in").mkdir()
    result = runs.main("--mode=import", f"--input={tmp_path}/in", f"--output={BUCKET}/imported")
    assert "must be a folder of this machine" in result.error
    assert not os.path.exists("gs:")


# Growing files


def test_a_growing_file_is_put_whole_and_only_when_it_grew(server):
    path = f"{BUCKET}/growing/file"
    file = remote.RemoteFile(path, b"a\n")
    file.write(b"b\n")
    assert not remote.exists(path), "not before it is asked to"
    file.flush()
    assert read(path) == "a\nb\n"
    epath.Path(path).write_bytes(b"other")
    file.flush()
    assert read(path) == "other"
    file.write(b"c\n")
    file.close()
    assert read(path) == "a\nb\nc\n"


def test_lines_are_in_the_bucket_when_sync_returns():
    workdir = f"{BUCKET}/log"
    with log_lib.MetricsLog(workdir) as log:
        for step in range(1, 6):
            log.write("pretrain", "train", step, {"loss": 1.0})
        log.sync()
        assert [record["step"] for record in log_lib.read(workdir)] == [1, 2, 3, 4, 5]
        log.rewind("pretrain", 3)
        log.write("pretrain", "train", 4, {"loss": 2.0})
    found = [(record["step"], record["loss"]) for record in log_lib.read(workdir)]
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_rights_are_the_users_and_other_failures_are_not(monkeypatch):
    def fail(error: Exception) -> None:
        def write(*_: object) -> None:
            raise error

        monkeypatch.setattr(type(epath.Path(BUCKET)), "write_bytes", write)
        files.write_json(f"{BUCKET}/a.json", {})

    with pytest.raises(UserError, match=r"cannot write gs://bucket/a\.json"):
        fail(OSError("Forbidden: no right to write"))
    with pytest.raises(ConnectionError):  # a traceback, exit code 1: a cluster starts again
        fail(ConnectionError("gone"))


def test_a_save_that_is_under_way_is_no_checkpoint():
    path = f"{BUCKET}/under/way"
    (epath.Path(path) / "checkpoints" / "pretrain" / "10" / "params" / "x").write_bytes(b"1")
    result = runs.main("--mode=generate", f"--checkpoint={path}")
    assert "no finished checkpoint there yet" in result.error
