"""The data of pages of small random models, for the tests in a browser."""

import dataclasses
import functools

import jax
import loaded
import numpy as np
import small

from gptjax.explain import data

HOSTILE = (
    "</script><script>window.hacked=1</script> <img src=x onerror=window.hacked=1> "
    "<!-- \"quotes\" 'and' &amp; {{data}} \u202eturned\u202c \x1b[31mred\x1b[0m \u200b\u2028 \ud800"
)
TEXT = " ".join([small.WORDS] * 20)


def _classifier(**changes):
    return loaded.model(
        "classification", **{"num_layers": 3, "num_heads": 4, "context_length": 64} | changes
    )


def _compared():
    """A page with five other models, of which one has a hostile name, and with another text."""
    gpt = _classifier()
    rng = np.random.default_rng(1)
    step = jax.tree.map(lambda p: 0.05 * rng.normal(size=p.shape).astype(p.dtype), gpt.params)
    others = [
        dataclasses.replace(
            gpt,
            params=jax.tree.map(lambda p, d, n=n: p + n * d, gpt.params, step),
            path=f"/tmp/runs/a/checkpoints/finetune/{n}00",
        )
        for n in range(1, 4)
    ]
    language = dataclasses.replace(loaded.model(""), path="</script><img src=x onerror=alert(1)>")
    bigger = _classifier(num_heads=2, width=32)
    return data.explain(
        gpt, "the cat sat on a mat", 1, compare=[*others, language, bigger],
        other_text="the cat ran on \u202e a mat",
    )  # fmt: skip


@functools.cache
def of(kind: str):  # noqa: C901, PLR0911 (one line for each kind)
    """The data of a page."""
    if kind == "classification":
        return data.explain(_classifier(), "the cat sat on a mat", 1)
    if kind == "five":
        return data.explain(
            _classifier(labels=("very bad", "bad", "fair", "good", "best")), "a cat"
        )
    if kind == "windows":
        return data.explain(_classifier(windows=3, context_length=8, mean=True), "the cat sat")
    if kind == "hostile":
        labels = ("</script><b>no</b>", "<img src=x onerror=window.hacked=1>")
        gpt = _classifier(labels=labels, context_length=512)
        return data.explain(gpt, HOSTILE, labels[0])
    if kind == "endless":
        return data.explain(_classifier(), "x" * 10000 + " end")
    if kind == "unusual":
        gpt = loaded.unusual()
        return data.explain(gpt, loaded.texts(gpt), loaded.LABELS["entailment"])
    if kind == "compared":
        return _compared()
    if kind == "middle":
        gpt = _classifier(num_layers=6, num_heads=8, width=64, context_length=128)
        return data.explain(gpt, TEXT)
    if kind == "large":
        # Without a task, because attribution takes minutes at this size.
        gpt = loaded.model("", num_layers=12, num_heads=12, width=96, context_length=512)
        words = TEXT.split()
        while len(gpt.tokenizer.encode(" ".join(words))) > 512:
            words.pop()
        return data.explain(gpt, " ".join(words))
    gpt = loaded.model("" if kind == "language" else kind)
    return data.explain(gpt, loaded.texts(gpt), loaded.LABELS.get(kind))
