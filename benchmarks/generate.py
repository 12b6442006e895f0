"""Times greedy generation with gptjax, PyTorch (with our own cache) and transformers.

python benchmarks/generate.py --size=gpt1 --batch=1,16 --tokens=128

transformers has no key/value cache for GPT-1. Its `generate` computes the whole text again for each
token (transformers-openai). Its GPT-2 has a cache, so a GPT-2 of the same size is measured as well
(transformers-gpt2).
"""

import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from absl import flags

from benchmarks import harness, sizes, summary
from benchmarks.harness import FLAGS
from gptjax.config.schema import split_names
from gptjax.errors import require

flags.DEFINE_string("batch", "1,16", "Comma-separated: texts at a time.", flag_values=FLAGS)
flags.DEFINE_integer("tokens", 128, "New tokens of each text.", flag_values=FLAGS)
flags.DEFINE_integer("prompt_tokens", 32, "Tokens of the prompt.", flag_values=FLAGS)

CASES: dict[str, dict[str, Any]] = {
    f"{implementation}-{dtype}": {"implementation": implementation, "dtype": dtype}
    for implementation in ("ours", "pytorch", "transformers-gpt2", "transformers-openai")
    for dtype in ("bfloat16", "float32")
}


def generation(spec: dict[str, Any], size: sizes.Size) -> Any:
    """Returns a function of the implementation: (prompt, batch, tokens) -> int [batch, tokens]."""
    name, _, kind = spec["implementation"].partition("-")
    if name == "ours":
        from benchmarks import with_gptjax

        return with_gptjax.Generation(size, spec["dtype"])
    if name == "pytorch":
        from benchmarks import with_torch

        return with_torch.Generation(size, spec["dtype"])
    from benchmarks import with_transformers

    return with_transformers.Generation(size, spec["dtype"], kind)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Times the generation of complete texts in a worker."""
    size = sizes.find(spec["size"])
    run = generation(spec, size)
    prompt = np.random.default_rng(0).integers(0, size.vocab_size, spec["prompt_tokens"])
    seconds = []
    for _ in range(1 + spec["steps"]):
        start = time.perf_counter()
        found = run(prompt, spec["batch"], spec["tokens"])
        seconds.append(time.perf_counter() - start)
        assert found.shape == (spec["batch"], spec["tokens"]), found.shape
    return {
        "seconds": seconds[1:], "first_seconds": seconds[0],
        "units": spec["batch"] * spec["tokens"],
    }  # fmt: skip


def main() -> None:
    """Measures all variants at every batch size and writes the results."""
    size = sizes.find(FLAGS.size)
    names = split_names(FLAGS.batch)
    require(
        names and all(name.isdecimal() and int(name) for name in names),
        f"--batch={FLAGS.batch}: must be numbers above 0, comma-separated",
    )
    require(FLAGS.steps > 0, f"--steps={FLAGS.steps}: must be greater than 0")
    longest = size.context_length - FLAGS.prompt_tokens
    require(
        FLAGS.prompt_tokens > 0 and 0 < FLAGS.tokens <= longest,
        f"--tokens={FLAGS.tokens}: with a prompt of {FLAGS.prompt_tokens} must be 1 to {longest}",
    )
    for batch in map(int, names):
        common = {
            "size": size.name, "steps": FLAGS.steps, "batch": batch, "tokens": FLAGS.tokens,
            "prompt_tokens": FLAGS.prompt_tokens,
        }  # fmt: skip
        about = summary.About(
            name=f"generate_{size.name}_batch{batch}",
            title=f"Greedy generation of {FLAGS.tokens} tokens after {FLAGS.prompt_tokens}, batch "
            f"{batch}: {size.num_layers} layers x {size.width}, {size.num_heads} heads, "
            f"{size.vocab_size:,} tokens",
            unit="token",
            what="call",
            notes=(
                "transformers-openai: GPT-1, for which transformers has no key/value cache; "
                "transformers-gpt2: a GPT-2 of the same size, which has one.",
            ),
        )
        summary.run(about, harness.variants("generate", CASES, common))


if __name__ == "__main__":
    harness.command(main)
