"""What the program says of itself, as Markdown: its modes, its fields and its experiments.

A line `<!-- site: NAME -->` in a page is replaced by the text that the function NAME of `TEXTS`
returns. So these texts are those of the program, and cannot grow old. On GitHub the line is not
visible.
"""

import ast
import pathlib
import re
from collections.abc import Callable

from sphinx.application import Sphinx

from gptjax.cli import usage
from gptjax.cli.flags import COMMON, MODES
from gptjax.config import experiments, schema


def modes() -> str:
    """Returns a section for each mode: what it does, an example, and its flags."""
    parts = ["## Flags of all modes that read an experiment", _table("flag", COMMON)]
    for name, mode in MODES.items():
        rows = {flag: text + usage.default_note(flag) for flag, text in mode.flags.items()}
        parts += [
            f"## {name}",
            _escaped(mode.summary),
            f"```bash\ngptjax {name} {mode.example}\n```",
            _table("flag", rows),
        ]
    return "\n\n".join(parts)


def fields() -> str:
    """Returns a section for each part of the experiment, with its fields and their defaults."""
    texts = []
    for part in usage.PARTS.values():
        flags = [f"`--config.{path}.FIELD`" if path else "`--config.FIELD`" for path in part.paths]
        rows = dict(row for _, row in usage.fields_of(part, schema.Experiment()))
        texts += [
            f"## {part.title}: {' and '.join(flags)}",
            _escaped(" ".join((part.config.__doc__ or "").split())),
            _table("field and its default", rows, ""),
        ]
    return "\n\n".join(texts)


def recipes() -> str:
    """Returns a section for each experiment that comes with gptjax: its docstring."""
    parts = []
    for name in experiments.names():
        source = (experiments.folder() / f"{name}.py").read_text(encoding="utf-8")
        text = ast.get_docstring(ast.parse(source)) or ""
        # In the source, a backslash breaks a command. Python takes the breaks out of the docstring.
        text = re.sub(r"(?<=\S) {4,}(?=--)", " \\\\\n        ", text)
        link = f"The file: [experiments/{name}.py](../experiments/{name}.py)."
        parts += [f"## {name}", text, link]
    return "\n\n".join(parts)


def steps() -> str:
    """Returns the pages on GPT step by step, in each language that they are written in."""
    folder = pathlib.Path(__file__).parents[1]
    return "\n".join(sorted(path.stem for path in folder.glob("gpt_step_by_step*.md")))


TEXTS: dict[str, Callable[[], str]] = {
    "modes": modes, "fields": fields, "recipes": recipes, "steps": steps,
}  # fmt: skip


def _table(title: str, rows: dict[str, str], prefix: str = "--") -> str:
    lines = ["```{table}", ":class: names", "", f"| {title} | meaning |", "|---|---|"]
    lines += [f"| `{prefix}{name}` | {_escaped(text)} |" for name, text in rows.items()]
    return "\n".join([*lines, "```"]) if rows else ""


def _escaped(text: str) -> str:
    """Returns a plain text as one line of Markdown."""
    return re.sub(r"([\\`*_\[\]<>|$#])", r"\\\1", " ".join(text.split()))


def _fill(_: Sphinx, __: str, source: list[str]) -> None:
    line = re.compile("^<!-- site: (\\w+) -->$", re.MULTILINE)
    source[0] = line.sub(lambda match: TEXTS[match[1]](), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Fills the pages when they are read."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
