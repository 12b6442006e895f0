"""The files of deploy/: linted, checked against schemas, and run with what a cluster would be.

`gcloud`, `srun` and `scontrol` are stand-ins that note how they were called; `gcloud` runs what it
is told to run on the workers here.
"""

import os
import pathlib
import re
import shlex
import stat
import subprocess
import sys
import time

import jobset as jobset_schema
import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SCRIPTS = [DEPLOY / "tpu_vm.sh", DEPLOY / "slurm.sbatch", *sorted((ROOT / "scripts").glob("*.sh"))]
RUN = ("--config=experiments/gpt1_pretrain.py", "--workdir=gs://bucket/run", "--config.name=a b*'c")

# What `gcloud compute tpus tpu-vm COMMAND --help` of Google Cloud SDK 528 lists, and we use.
GCLOUD = {
    "create": {"--accelerator-type", "--version", "--spot", "--zone", "--project"},
    "describe": {"--format", "--zone", "--project"},
    "delete": {"--quiet", "--zone", "--project"},
    "scp": {"--worker", "--zone", "--project"},
    "ssh": {"--worker", "--command", "--zone", "--project"},
}


def tool(name: str) -> str:
    """A program that a package of requirements-test.txt brings."""
    path = pathlib.Path(sys.executable).parent / name
    assert path.is_file(), f"{name}: pip install -r requirements-test.txt"
    return str(path)


def run(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=60,
        cwd=environment.pop("cwd", ROOT), env=os.environ | environment,
    )  # fmt: skip


def program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shell_scripts_have_no_findings(path):
    done = run(tool("shellcheck"), path)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_finds_something(tmp_path):
    program(tmp_path / "bad.sh", "cd $1\n")
    assert "SC2086" in run(tool("shellcheck"), tmp_path / "bad.sh").stdout


# tpu_vm.sh


def dry_run(*arguments, **environment) -> list[list[str]]:
    """The commands that `tpu_vm.sh --dry-run` prints, split as a shell splits them."""
    done = run(DEPLOY / "tpu_vm.sh", "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [line for line in map(shlex.split, _joined(done.stdout)) if line[0] != "#"]


def _joined(text: str) -> list[str]:
    lines = text.splitlines()
    assert all(line.startswith(("gcloud ", "# ")) for line in lines), "one line a command"
    # $'...' is bash's; what it means is asked of bash.
    ask = 'eval "set -- $1"; printf "%q " "${@@Q}" >/dev/null; for x; do printf "%s\\0" "$x"; done'
    found = []
    for line in lines:
        parts = subprocess.run(
            ["bash", "-c", ask, "-", line], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
        found.append(shlex.join(parts) if parts else "#")
    return found


def inner(command: list[str]) -> str:
    """What an `ssh` command runs on the workers."""
    return next(part for part in command if part.startswith("--command=")).partition("=")[2]


@pytest.mark.parametrize("name", ["create", "setup", "run", "resume", "logs", "stop", "status"])
def test_commands_for_gcloud_are_well_formed(name, tmp_path):
    flags = RUN if name in ("run", "resume") else ()
    for command in dry_run(name, *flags, SPOT="1", PROJECT="mine", ZONE="us-east5-b"):
        assert command[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
        given = {part.partition("=")[0] for part in command[5:] if part.startswith("--")}
        assert given <= GCLOUD[command[4]]
        assert "--zone=us-east5-b" in command
        assert "--project=mine" in command
        assert command[4] == "scp" or "gptjax" in command
        if command[4] == "ssh":
            program(tmp_path / "inner.sh", inner(command) + "\n")
            done = run(tool("shellcheck"), "--exclude=SC2164", tmp_path / "inner.sh")
            assert done.stdout == ""


def test_a_new_slice_is_made_set_up_and_started_in_this_order():
    verbs = [command[4] for command in dry_run("resume", *RUN)]
    assert verbs == ["describe", "delete", "create", "scp", "ssh", "ssh"]
    assert [command[4] for command in dry_run("run", *RUN)] == ["ssh"]
    (one_flag,) = dry_run("run", "--workdir=gs://b/r")
    assert "launch.py --workdir=gs://b/r >>run.log" in inner(one_flag)
    (create,) = dry_run("create", SPOT="1")
    assert "--spot" in create
    assert "--spot" not in dry_run("create")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "give --workdir=gs://BUCKET/RUN"),
        (["resume", "--workdir=runs/a"], "give --workdir=gs://BUCKET/RUN"),
        (["fly"], "COMMAND 'fly' must be one of create"),
        ([], "COMMAND '' must be one of create"),
        (["stop", "now"], "stop takes no flags, got now"),
    ],
)
def test_wrong_use_is_one_line_and_2(arguments, message):
    done = run(DEPLOY / "tpu_vm.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


MISSING = "ERROR: (gcloud.compute.tpus.tpu-vm.describe)"


class Cloud:
    """A stand-in for gcloud whose one worker is a folder."""

    def __init__(self, folder: pathlib.Path, state: str, code: int = 0):
        self.home, self.calls = folder / "home", folder / "calls"
        (folder / "state").write_text(state)
        (folder / "code").write_text(str(code))
        self.calls.touch()
        program(
            folder / "bin" / "gcloud",
            f"echo \"$4\" >> '{self.calls}'\n"
            f"[ \"$4\" = describe ] && {{ cat '{folder}/state'; exit $(cat '{folder}/code'); }}\n"
            f"[ \"$4\" = scp ] && {{ cp \"$5\" '{self.home}'; exit; }}\n"
            f"cd '{self.home}' || exit\n"
            f'export HOME=\'{self.home}\'\n'
            'for part; do case $part in --command=*) bash -c "${part#--command=}";; esac; done\n',
        )  # fmt: skip
        # The worker's Python: `launch.py` notes its flags and trains until SIGTERM, then saves.
        program(
            self.home / "gptjax" / ".venv" / "bin" / "python",
            '[ "$1" = launch.py ] || exit 0\n'
            'printf "%s\\n" "$@" > flags\n'
            "trap 'echo saved > saved; exit 75' TERM\n"
            "for _ in $(seq 300); do sleep 0.1; done\n",
        )
        self._path = f"{folder}/bin:{os.environ['PATH']}"

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        self.calls.write_text("")
        return run(DEPLOY / "tpu_vm.sh", *arguments, PATH=self._path)

    @property
    def verbs(self) -> list[str]:
        return self.calls.read_text().split()


def wait_for(path: pathlib.Path) -> str:
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)
    return path.read_text()


def test_a_run_is_started_once_and_stopped_with_sigterm(tmp_path):
    cloud = Cloud(tmp_path, "READY")
    work = cloud.home / "gptjax"
    assert cloud.run("run", *RUN).returncode == 0
    # Every flag arrives as it was given, through two shells.
    assert wait_for(work / "flags").splitlines() == ["launch.py", *RUN]
    first = (work / "run.pid").read_text()
    again = cloud.run("resume", *RUN)
    assert "runs already" in again.stdout
    assert cloud.verbs == ["describe", "ssh"], "a slice that is there is kept"
    assert (work / "run.pid").read_text() == first
    assert cloud.run("stop").returncode == 0
    assert (work / "saved").exists(), "stop waits for the end"
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)


@pytest.mark.parametrize(
    ("state", "code", "before"),
    [("PREEMPTED", 0, ["delete", "create"]), (f"{MISSING} NOT_FOUND: gptjax", 1, ["create"])],
)
def test_resume_replaces_a_slice_that_was_taken(tmp_path, state, code, before):
    cloud = Cloud(tmp_path, state, code)
    program(tmp_path / "bin" / "python3", "exit 0\n")  # uv, pip: the worker's own Python
    done = cloud.run("resume", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["describe", *before, "scp", "ssh", "ssh"]
    # The worker has this commit.
    head = run("git", "show", "HEAD:launch.py").stdout
    assert (cloud.home / "gptjax" / "launch.py").read_text() == head
    wait_for(cloud.home / "gptjax" / "flags")
    cloud.run("stop")


WAIT = "wait until it is READY (if it was stopped, start it), or delete it"


@pytest.mark.parametrize(
    ("state", "code", "message"),
    [
        (
            "CREATING",
            0,
            f"gptjax is CREATING; {WAIT}",
        ),
        (
            "REPAIRING",
            0,
            f"gptjax is REPAIRING; {WAIT}",
        ),
        (f"{MISSING} login", 1, f"gcloud does not say how gptjax is: {MISSING} login"),
    ],
)
def test_resume_leaves_a_slice_alone_that_may_come_back(tmp_path, state, code, message):
    cloud = Cloud(tmp_path, state, code)
    done = cloud.run("resume", *RUN)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
    assert cloud.verbs == ["describe"]


# slurm.sbatch

SBATCH = {
    "job-name": r"\w+", "nodes": r"\d+", "gpus-per-node": r"\d+", "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+", "time": r"\d+:\d\d:\d\d", "signal": r"TERM@\d+", "requeue": "",
    "open-mode": "append", "output": r"\S+\.log",
}  # fmt: skip
"""The options of sbatch that we use, and what may follow each."""


def directives() -> dict[str, str]:
    lines = (DEPLOY / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    found = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")]
    assert not [line for line in lines[first:] if "#SBATCH" in line], "Slurm reads none after code"
    return {name: value for name, _, value in (line.partition("=") for line in found)}


def test_sbatch_directives_are_slurms():
    found = directives()
    assert found.keys() == SBATCH.keys()
    for name, value in found.items():
        assert re.fullmatch(SBATCH[name], value), name
    # JAX under Slurm gives each task one device.
    assert found["gpus-per-node"] == found["ntasks-per-node"]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (3, False), (75, True)])
def test_a_preempted_job_goes_back_to_the_queue(tmp_path, code, requeued):
    program(tmp_path / "srun", f'printf "%s\\n" "$@" > "{tmp_path}/srun_flags"; exit {code}')
    program(tmp_path / "scontrol", f'echo "$@" > "{tmp_path}/scontrol_flags"')
    done = run(
        "bash", DEPLOY / "slurm.sbatch", *RUN, PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="17", PYTHON="python", cwd="/",
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert (tmp_path / "srun_flags").read_text().splitlines()[-5:] == ["python", "launch.py", *RUN]
    asked = tmp_path / "scontrol_flags"
    assert (asked.read_text().split() if asked.exists() else []) == ["requeue", "17"] * requeued


# GKE


@pytest.fixture
def jobset():
    return yaml.safe_load((DEPLOY / "gke" / "jobset.yaml").read_text())


def check(jobset) -> None:
    """Raises where the manifest is not a JobSet, or what it makes not Jobs."""
    jsonschema.validate(jobset, jobset_schema.JOBSET)
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
        kubernetes_validate.validate(job | replicated["template"], "1.34", strict=True)


def test_the_manifest_follows_the_schemas(jobset):
    check(jobset)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "maxRestarts"), 3),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "replicatedJobs", 0, "template", "spec", "backofflimit"), 0),
        (("spec", "replicatedJobs", 0, "template", "spec", "parallelism"), "4"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "image"), "x"),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else "",
)
def test_the_schemas_find_mistakes(jobset, path, value):
    place = jobset
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(jobset)


def test_the_manifest_agrees_with_itself_and_with_our_exit_codes(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == x * y // chips
    # JAX's detection, and a lost pod stops all of them.
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    # A slice whose nodes come later than another's.
    assert any(each.startswith("--initialization_timeout=") for each in container["args"])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3], "what another try would not mend"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never", "or Kubernetes refuses the podFailurePolicy"


# Dockerfile


def test_the_dockerfile_has_no_findings():
    done = run(tool("hadolint"), DEPLOY / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_gets_all_that_launch_needs_and_nothing_else():
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    names = [name for names in copied for name in names]
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line[1:] for line in allowed if line.startswith("!")]
    assert "*" in allowed
    for name in names:
        assert (ROOT / name).exists(), name
        assert any(pathlib.PurePath(name).match(pattern) for pattern in patterns), name
    assert {"launch.py", "gptjax", "experiments"} <= set(names)
    for name in re.findall(r"requirements[a-z-]*\.txt", text):
        assert name in names, "every set of packages that the comments offer is in the image"
    # Exec form: a shell in between would not pass SIGTERM on.
    assert text.splitlines()[-1] == 'ENTRYPOINT ["python", "launch.py"]'


# What the files say of others


@pytest.mark.parametrize(
    "path", [each for each in sorted(DEPLOY.rglob("*")) if each.is_file()], ids=lambda p: p.name
)
def test_what_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:experiments/\w+\.py|requirements[a-z-]*\.txt)", text)
    named += re.findall(r"\b(?:deploy|tests|docs)/[\w/]+\.\w+", text)
    for name in named:
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\(([^)#]+)\)", text) if path.suffix == ".md" else ():
        assert (path.parent / link).exists(), link


def test_the_manifests_flags_are_launchs(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    done = run(sys.executable, "launch.py", "--only_check_args", *container["args"])
    assert done.returncode == 0, done.stderr
