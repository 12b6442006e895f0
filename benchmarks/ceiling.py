"""What the machine's matrix units can do at best: what the other numbers are shares of."""

from typing import Any


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the operations per second of the best product of an implementation and dtype."""
    if spec["implementation"] == "jax":
        from gptjax.model import flops

        return {"flops": flops.matmul_ceiling(spec["dtype"])}
    from benchmarks import with_torch

    return {"flops": with_torch.matmul_ceiling(spec["dtype"])}
