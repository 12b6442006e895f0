"""Eight CPU devices, strict JAX, and no outside caches, for every test."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

# Before JAX starts. The persistent compilation cache of a user must not decide what tests run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GPTJAX_CACHE"] = ""  # keep nothing
# Compilation takes most of the time of these tests. LLVM's optimisations change no result, and cost
# more than they save in programs that run a few steps. CI runs the slow proofs with XLA_FLAGS="".
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# One folder for all processes of a test session. pytest-xdist's workers inherit the variable.
if "GPTJAX_TESTS_FOLDER" not in os.environ:
    os.environ["GPTJAX_TESTS_FOLDER"] = tempfile.mkdtemp(prefix="gptjax-tests-")
    atexit.register(shutil.rmtree, os.environ["GPTJAX_TESTS_FOLDER"], ignore_errors=True)

import devices
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _devices(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets the tests of a module use one device, or as many as its mark `devices` says.

    Compiling a program for eight devices takes twice as long as for one.
    """
    mark = request.node.get_closest_marker("devices")
    with devices.use(mark.args[0] if mark else 1):
        yield


@pytest.fixture
def eight_devices() -> Iterator[None]:
    """Lets one test use eight devices."""
    with devices.use(8):
        yield


@pytest.fixture(autouse=True)
def _no_process_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the processes that a test has started, above all where it failed."""
    yield
    # Not imported here: it turns on a compilation cache.
    runs = sys.modules.get("runs")
    left = runs.kill_running() if runs else []
    assert not left, f"{request.node.name} has left processes: {left}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what compiles for TPUs where libtpu is not installed (requirements-tpu.txt)."""
    if importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH"):
        return
    for item in items:
        if "tpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="libtpu is not installed"))
