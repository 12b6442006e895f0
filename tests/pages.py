"""The data of pages of small random models, for the tests in a browser."""

import functools

import loaded
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


@functools.cache
def of(kind: str):  # noqa: PLR0911 (one line for each kind)
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
