"""The page of `gptjax explain`: one HTML file, made of the data, a template and static files.

The page needs no network. Its policy allows only the script and the style that are in it, by their
SHA-256, so nothing in a text or in a label can run.
"""

import base64
import hashlib
import html
import json
import pathlib
import re
from typing import Any

LANGUAGES = ("en", "zh")

_STATIC = pathlib.Path(__file__).parent / "static"

# The order matters: a file uses only names of the files before it.
_SCRIPTS = (
    "strings.js",
    "state.js",
    "data.js",
    "parts.js",
    "formulas.js",
    "views/answer.js",
    "views/ids.js",
    "views/lookup.js",
    "views/steps.js",
    "views/head.js",
    "views/heads.js",
    "views/layers.js",
    "views/lm.js",
    "views/task.js",
    "views/training.js",
    "live/tokenizer.js",
    "live/model.js",
    "views/live.js",
    "app.js",
)
_VENDOR = ("vendor/htm-preact-standalone.umd.js",)

# The parts of `weights` that stand after the script.
_LARGE = ("float16", "tokenizer")

_TITLES = {"en": "How the model reads this text", "zh": "模型如何读这段文本"}


def render(data: dict[str, Any], language: str = "en") -> str:
    """Returns the page as one string of HTML.

    Args:
      data: the object that docs/explain_json.md describes. It must not contain NaN or infinity.
      language: the language that the page starts with, "en" or "zh". A reader can switch it.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language={language!r}: must be one of {', '.join(LANGUAGES)}")
    script, style = _script(), _read("style.css")
    first, more = _split(data)
    parts = {
        "language": {"en": "en", "zh": "zh-Hans"}[language],
        "title": html.escape(f"{_TITLES[language]} · gptjax"),
        "policy": html.escape(
            "default-src 'none'; "
            f"script-src {_source(script)}; style-src {_source(style)}; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        "style": style,
        "data": embed(first),
        "more": embed(more),
        "script": script,
    }
    # One pass, so that a text that looks like a placeholder stays a text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("template.html"))


def read(text: str) -> dict[str, Any]:
    """Returns the data of a page: `read(render(data)) == data`."""
    blocks = re.findall(r'<script type="application/json" id="\w+">(.*?)</script>', text, re.DOTALL)
    first: dict[str, Any] = json.loads(blocks[0])
    more: dict[str, Any] = json.loads(blocks[1])
    first["attention"] |= more["attention"]
    first["heads"] = more["heads"]
    if first["weights"] is not None:
        first["weights"] |= more["weights"]
    return first


def _split(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the data in two parts. The large arrays come after the script.

    So a browser can paint the answer before it has read them.
    """
    attention = data["attention"]
    heads = [{"layer": each["layer"], "head": each["head"]} for each in data["heads"]]
    first = data | {"attention": {"visible": attention["visible"]}, "heads": heads}
    large = {name: value for name, value in attention.items() if name != "visible"}
    more = {"attention": large, "heads": data["heads"]}
    weights = data["weights"]
    if weights is not None:
        more["weights"] = {name: weights[name] for name in _LARGE}
        first["weights"] = {name: x for name, x in weights.items() if name not in _LARGE}
    return first, more


def embed(data: dict[str, Any]) -> str:
    """Returns `data` as JSON that is ASCII and cannot end a script element or begin a comment.

    >>> embed({"text": "</script>"})
    '{"text":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _read(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def _script() -> str:
    """Returns one script. Our files share one function, so they make no global names."""
    ours = "\n".join(_read(name) for name in _SCRIPTS)
    vendor = "\n".join(_read(name) for name in _VENDOR)
    script = f'{vendor}\n(() => {{\n"use strict";\n{ours}\n}})();\n'
    # These would end the element early. None of our files contains them.
    assert not re.search(r"</script|<!--", script, re.IGNORECASE)
    return script


def _source(text: str) -> str:
    """Returns the name of an inlined script or style in a policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
