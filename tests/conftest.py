"""Eight CPU devices, strict JAX, and no outside caches, for every test."""

import importlib.util
import os
import sys
from collections.abc import Iterator

# Before JAX starts. The persistent compilation cache of a user must not decide what tests run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GPTJAX_CACHE"] = ""  # keep nothing

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


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
