"""Times one pretraining step with gptjax, transformers, the fastest PyTorch and plain Flax.

python benchmarks/train_step.py --size=gpt1 --allocators=all

All do the same work: dropout 0.1 at the embedding, in attention and on both residuals, the LM loss
at all positions of random tokens, clipping at norm 1, AdamW with decay 0.01. A test in
tests/test_benchmarks.py compares their losses without dropout.
"""

import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import harness, sizes, summary
from benchmarks.harness import FLAGS
from gptjax.errors import require

CASES: dict[str, dict[str, Any]] = {
    f"{implementation}-{dtype}{'-compiled' if compiled else ''}": {
        "implementation": implementation, "dtype": dtype, "compiled": compiled,
    }
    for implementation, dtype, compiled in (
        ("ours", "bfloat16", False),
        ("ours", "float32", False),
        ("transformers", "float32", False),
        ("transformers", "autocast", False),
        ("pytorch", "float32", False),
        ("pytorch", "autocast", False),
        ("pytorch", "bfloat16", False),
        ("pytorch", "autocast", True),
        ("pytorch", "bfloat16", True),
        ("flax", "float32", False),
        ("flax", "bfloat16", False),
    )
}  # fmt: skip


def training(spec: dict[str, Any], size: sizes.Size) -> Any:
    """Returns an object of the implementation with a method `step(tokens) -> loss`."""
    arguments = (size, spec["dtype"], sizes.DROPOUT)
    if spec["implementation"] == "ours":
        from benchmarks import with_gptjax

        return with_gptjax.pretraining(*arguments)
    if spec["implementation"] == "flax":
        from benchmarks import with_flax

        return with_flax.pretraining(*arguments)
    if spec["implementation"] == "pytorch":
        from benchmarks import with_torch

        return with_torch.pretraining(*arguments, compiled=spec["compiled"])
    from benchmarks import with_transformers

    return with_transformers.pretraining(*arguments)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Times steps in a worker; returns their seconds and losses, and the tokens of a step."""
    size = sizes.find(spec["size"])
    began = time.perf_counter()
    run = training(spec, size)
    setup = time.perf_counter() - began
    rng = np.random.default_rng(0)
    seconds, losses = [], []
    # Two steps are not timed. The first compiles. The second still finds the state of memory and
    # caches that the first left.
    for _ in range(2 + spec["steps"]):
        tokens = rng.integers(0, size.vocab_size, (size.batch_size, size.context_length))
        start = time.perf_counter()
        losses.append(run.step(tokens))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds[2:], "first_seconds": seconds[0], "setup_seconds": setup,
        "units": size.batch_size * size.context_length, "losses": losses,
    }  # fmt: skip


def main() -> None:
    """Measures all variants and writes the results."""
    from gptjax.model import flops

    size = sizes.find(FLAGS.size)
    require(FLAGS.steps > 0, f"--steps={FLAGS.steps}: must be greater than 0")
    common = {"size": size.name, "steps": FLAGS.steps}
    every = harness.variants("train_step", CASES, common)
    per_token = flops.train_flops_per_token(
        sizes.model_config(size, "float32"), size.context_length
    )
    about = summary.About(
        name=f"train_step_{size.name}",
        title=f"Pretraining step, {size.name}: {size.num_layers} layers x {size.width}, "
        f"{size.num_heads} heads, {size.vocab_size:,} tokens, batch {size.batch_size} x "
        f"{size.context_length}, dropout {sizes.DROPOUT:g}",
        unit="token",
        what="step",
        flops_per_unit=per_token,
    )
    summary.run(about, every)


if __name__ == "__main__":
    harness.command(main)
