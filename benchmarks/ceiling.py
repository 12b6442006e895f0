"""The highest speed of matrix products on this machine. Other speeds are given as shares of it."""

from typing import Any


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the operations per second of the fastest product of an implementation and dtype."""
    if spec["implementation"] == "jax":
        from gptjax.model import flops

        return {"flops": flops.matmul_ceiling(spec["dtype"])}
    from benchmarks import with_torch

    return {"flops": with_torch.matmul_ceiling(spec["dtype"])}
