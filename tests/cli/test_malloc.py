"""The restart of the program with huge pages."""

import os
import pathlib
import resource
import subprocess
import sys

import pytest

from gptjax.cli import malloc

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A program that asks for huge pages. It prints its process id before and after, its setting and its
# arguments, and the page faults that 256 MiB cause.
PROGRAM = """
import os, resource, sys
sys.path.insert(0, {root!r})
from gptjax.cli import malloc
print(os.getpid(), flush=True)
malloc.use_huge_pages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
text = b"a" * 2**28
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(os.getpid(), os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.utf8_mode, faults)
"""


def run(tmp_path: pathlib.Path, *options: str, **environment: str) -> list[str]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(root=str(ROOT)))
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, *options, "-Xutf8", str(script), "--text=a b", "ü"],
        capture_output=True, text=True, check=True, env=clean | environment,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.fixture
def executed(monkeypatch, tmp_path):
    """The calls of `os.execv`, in a process for which the kernel has huge pages on request."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *args: calls.append(args))
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that its absence is restored too
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(malloc, "_KERNEL", tmp_path / "enabled")
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.35")
    # However pytest itself was started.
    monkeypatch.setattr(sys, "argv", ["launch.py", "--mode=train"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-B", "launch.py", "--mode=train"])
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    return calls


offered = pytest.mark.skipif(not malloc.is_available(), reason="no huge pages on request here")


@offered
def test_the_same_process_with_the_same_arguments_and_few_page_faults(tmp_path):
    first, again, last = run(tmp_path)
    pid, setting, rest = last.split(" ", 2)
    arguments, utf8, faults = rest.rsplit(" ", 2)
    assert pid == first == again
    assert setting == "glibc.malloc.hugetlb=1"
    assert arguments == "['--text=a b', 'ü']"
    assert utf8 == "1"
    plain = int(run(tmp_path, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")[-1].split()[-1])
    assert plain > 2**28 / resource.getpagesize() * 0.9
    assert int(faults) < plain / 10


def test_a_setting_of_the_user_stays(executed, monkeypatch):
    for value in ("", "glibc.malloc.trim_threshold=128"):
        monkeypatch.setenv("GLIBC_TUNABLES", value)
        malloc.use_huge_pages()
        assert os.environ["GLIBC_TUNABLES"] == value
    assert not executed


@pytest.mark.parametrize("kernel", ["[always] madvise never", "always madvise [never]", None])
def test_nothing_happens_where_nothing_is_to_gain(executed, kernel):
    if kernel is None:
        malloc._KERNEL.unlink()
    else:
        malloc._KERNEL.write_text(kernel)
    malloc.use_huge_pages()
    assert not executed
    assert "GLIBC_TUNABLES" not in os.environ


def test_once_and_no_more(executed):
    malloc.use_huge_pages()
    malloc.use_huge_pages()
    assert executed == [(sys.executable, [sys.executable, "-B", "launch.py", "--mode=train"])]


@pytest.mark.parametrize(
    ("original", "argv"),
    [
        (["python", "/venv/bin/gptjax", "predict"], ["/venv/bin/gptjax", "predict"]),
        (["python", "-m", "gptjax", "predict"], ["/site/gptjax/__main__.py", "predict"]),
        (["python", "-Xutf8", "-m", "gptjax"], ["/site/gptjax/__main__.py"]),
    ],
)
def test_the_installed_program_is_started_again(executed, monkeypatch, original, argv):
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(sys, "argv", argv)
    malloc.use_huge_pages()
    assert executed == [(sys.executable, [sys.executable, *original[1:]])]


def test_a_python_that_cannot_be_started_again_runs_on(executed, monkeypatch):
    def fail(*args):
        executed.append(args)
        raise FileNotFoundError(*args)

    monkeypatch.setattr(os, "execv", fail)
    malloc.use_huge_pages()
    assert len(executed) == 1
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(sys, "executable", None)
    malloc.use_huge_pages()
    assert len(executed) == 1


@pytest.mark.parametrize(
    ("original", "argv"),
    [
        (["python", "-m", "pdb", "launch.py"], ["launch.py"]),
        (["python", "-mpdb", "launch.py"], ["launch.py"]),
        (["python", "-c", "import launch"], ["-c"]),
        (["python", "-"], ["launch.py"]),
        (["python", "-m", "gptjax_of_another", "--help"], ["/site/gptjax_of_another.py", "--help"]),
        (["python", "-m", "ipykernel_launcher", "-f", "x.json"], ["launch.py", "--mode=train"]),
        (["python"], [""]),
    ],
)
def test_the_process_of_another_program_is_not_replaced(executed, monkeypatch, original, argv):
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(sys, "argv", argv)
    malloc.use_huge_pages()
    assert not executed


@pytest.mark.parametrize("library", ["glibc 2.31", "musl 1.2", "", ValueError, OSError])
def test_other_c_libraries_are_left_alone(executed, monkeypatch, library):
    def confstr(_):
        if isinstance(library, str):
            return library
        raise library

    monkeypatch.setattr(os, "confstr", confstr)
    malloc.use_huge_pages()
    assert not executed
