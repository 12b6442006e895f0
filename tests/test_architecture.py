"""The structure of the project, read from its sources: imports go one way between the rooms."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gptjax"

# Room (or file on top) -> the rooms that it may import, and through them all that those may.
# Rooms of one line of gptjax's design do not know each other.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "io": {"errors"},
    "parameters": set(),
    "batch": {"config", "io"},
    "cluster": {"config", "io"},
    "mesh": {"batch", "cluster", "parameters"},
    "state": {"mesh"},
    "data": {"batch"},
    "ops": {"mesh"},
    "model": {"ops"},
    "evaluate": {"data", "state", "model"},
    "checkpoint": {"data", "state", "model"},
    "interop": {"evaluate", "checkpoint"},
    "infer": {"evaluate", "checkpoint"},
    "train": {"interop"},
    "ablation": {"train", "infer"},
    "cost": {"train", "infer"},
    "report": {"train", "infer"},
    "explain": {"train", "infer"},
    "api": {"explain"},
    "cli": {"api", "ablation", "cost", "report"},
    "__main__": {"cli"},
}


def below(room: str) -> set[str]:
    """All rooms that a room may import."""
    return ARROWS[room].union(*map(below, ARROWS[room]))


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> set[str]:
    """Full names of everything a tree imports, at its top or in a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str) -> set[str]:
    """The modules of gptjax that a module imports."""
    found = set()
    for full in imports(tree_of(name)):
        parts = full.split(".")
        if parts[0] == "gptjax":
            tail = ".".join(parts[1:])
            # A module, or a name in one.
            found.add(tail if tail in MODULES else ".".join(parts[1:-1]))
    return found


def room_of(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_is_in_a_room():
    assert {room_of(name) for name in MODULES if name} == set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_rooms_import_only_rooms_below_them(room):
    allowed = below(room) | {room, ""}
    wrong = {
        f"{name} -> {found}"
        for name in MODULES
        if room_of(name) == room
        for found in own_imports(name)
        if room_of(found) not in allowed
    }
    assert not wrong


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "data"])
def test_data_does_not_import_jax(name):
    roots = {full.split(".")[0] for full in imports(tree_of(name))}
    assert not roots & {"jax", "flax"}


def test_flax_modules_are_in_model_alone():
    users = {
        name
        for name in MODULES
        for full in imports(tree_of(name))
        if full == "flax" or full.startswith(("flax.linen", "flax.nnx"))
    }
    assert users == {"model.gpt"}


def test_the_config_needs_no_library():
    for name in (
        "config.schema",
        "config.validation",
        "config.constraints",
        "errors",
        "cluster.stop",
        "cli.malloc",
    ):
        roots = {full.split(".")[0] for full in imports(tree_of(name))}
        assert roots <= set(sys.stdlib_module_names) | {"gptjax"}


def run_python(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout.splitlines()


_HEAVY = "('jax', 'flax', 'datasets', 'tokenizers', 'grain', 'orbax', 'matplotlib', 'sklearn')"


def test_help_does_not_wait_for_jax():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['launch.py', '--help']\n"
        "try: runpy.run_path('launch.py', run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code)\n"
        f"print('loaded', [name for name in {_HEAVY} if name in sys.modules])\n"
    )
    lines = run_python(code)
    assert lines[-1] == "loaded []"
    assert any("--config" in line for line in lines)


def test_help_comes_at_once():
    def used() -> float:  # processor time: other processes may want the machine too
        times = os.times()
        return times.children_user + times.children_system

    start = used()
    command = [sys.executable, "launch.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--config.FIELD" in done.stdout
    assert used() - start < 2


@pytest.mark.parametrize("flag", ["--help", "-help", "-h", "-?", "--helpshort", "--helpfull"])
def test_help_is_no_error(flag):
    command = [sys.executable, "launch.py", "bench", flag]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    absl = "--[no]only_check_args" in done.stdout
    ours = done.stdout.startswith("python launch.py bench: ")
    assert (absl, ours) == ((True, False) if flag == "--helpfull" else (False, True))


def test_an_experiment_that_ends_the_process_ends_it_with_its_code(tmp_path):
    (tmp_path / "experiment.py").write_text("import sys; sys.exit(7)")
    command = [sys.executable, "launch.py", f"--config={tmp_path}/experiment.py"]
    assert subprocess.run(command, capture_output=True, check=False, cwd=ROOT).returncode == 7


def test_import_gptjax_is_light():
    code = f"import sys, gptjax; print([n for n in {_HEAVY} if n in sys.modules]); "
    assert run_python(code + "print(gptjax.__version__, gptjax.load.__name__)")[0] == "[]"


def tracked() -> list[pathlib.Path]:
    """The files of the project: what git knows, or everything that is not hidden."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return [ROOT / line for line in done.stdout.splitlines()]
    files = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in files if "/." not in str(path.relative_to(ROOT.parent))]


def test_nothing_refers_to_a_place_outside_the_project():
    outside = [f"{before}/shared" for before in ("..", "work", "$WORK")]
    for path in tracked():
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            text = data.decode("utf-8")
            assert not [place for place in outside if place in text], path
