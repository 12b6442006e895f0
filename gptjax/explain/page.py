"""The page of `gptjax explain`: one HTML file, made of the data, a template and static files.

The page needs no network. Its policy allows only the script and the style that are in it, by their
SHA-256, so nothing in a text or in a label can run.
"""

import base64
import gzip
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
    "views/time.js",
    "live/tokenizer.js",
    "live/model.js",
    "views/live.js",
    "app.js",
)
_VENDOR = ("vendor/htm-preact-standalone.umd.js",)

# The arrays of a head whose parts travel.
_PARTS = ("q", "k", "v", "out")

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
        "more": more,
        "script": script,
    }
    # One pass, so that a text that looks like a placeholder stays a text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("template.html"))


def read(text: str) -> dict[str, Any]:
    """Returns the data of a page: `read(render(data)) == data`."""
    first, more = re.findall(r'<script type="[^"]+" id="\w+">(.*?)</script>', text, re.DOTALL)
    return _joined(json.loads(first), more)


def _split(data: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns the data in two parts. The large arrays come after the script.

    So a browser can paint the answer before it has read them. The second part is base64 of a gzip
    file. The file has the length of a JSON text as a little-endian uint32, this text, and the bytes
    of the arrays. The JSON text has `[start, stop]` in the place of an array.
    """
    arrays = bytearray()

    def put(array: str) -> list[int]:
        start = len(arrays)
        arrays.extend(base64.b64decode(array))
        return [start, len(arrays)]

    attention = data["attention"]
    names = [{"layer": each["layer"], "head": each["head"]} for each in data["heads"]]
    first = data | {"attention": {"visible": attention["visible"]}, "heads": names}
    more = {
        "attention": {
            "weights": put(attention["weights"]),
            "top": {name: put(array) for name, array in attention["top"].items()},
        },
        "heads": [{name: put(each[name]) for name in _PARTS} for each in data["heads"]],
    }
    if weights := data["weights"]:
        more["weights"] = {"float16": put(weights["float16"]), "tokenizer": weights["tokenizer"]}
        first["weights"] = {name: x for name, x in weights.items() if name not in more["weights"]}
    header = embed(more).encode()
    file = len(header).to_bytes(4, "little") + header + arrays
    # Without a time in it, equal data give equal pages.
    return first, base64.b64encode(gzip.compress(file, 6, mtime=0)).decode()


def _joined(first: dict[str, Any], more: str) -> dict[str, Any]:
    """Returns the data of the two parts of `_split`."""
    file = gzip.decompress(base64.b64decode(more))
    size = int.from_bytes(file[:4], "little")
    header, arrays = json.loads(file[4 : 4 + size]), file[4 + size :]

    def get(place: list[int]) -> str:
        return base64.b64encode(arrays[slice(*place)]).decode()

    attention = header["attention"]
    first["attention"]["weights"] = get(attention["weights"])
    first["attention"]["top"] = {name: get(place) for name, place in attention["top"].items()}
    for each, parts in zip(first["heads"], header["heads"], strict=True):
        each |= {name: get(place) for name, place in parts.items()}
    if first["weights"]:
        first["weights"] |= header["weights"] | {"float16": get(header["weights"]["float16"])}
    return first


def embed(data: dict[str, Any]) -> str:
    """Returns `data` as JSON that is ASCII and cannot end a script element or begin a comment.

    >>> embed({"text": "</script>"})
    '{"text":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def strings() -> str:
    """Returns the source of the texts of the page in both languages, `strings.js`."""
    return _read("strings.js")


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
