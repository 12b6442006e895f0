"""Writes "GPT-1 step by step": docs/gpt_step_by_step.md, .zh.md, their notebooks and pictures.

    python scripts/step_by_step/build.py            # the pages, from the kept model
    python scripts/step_by_step/build.py --train    # the model too (a few minutes)
    python scripts/step_by_step/build.py --explain  # and pictures of the page of `explain`
    python scripts/step_by_step/build.py --check    # only says whether the files are up to date

`en.md` and `zh.md` hold the prose, and `cells.py` the computation. The cells run once, so both
pages and both notebooks have the same numbers. A template has three kinds of marks:

    {{EXPRESSION}}                                  the value of a Python expression after all cells
    <!-- code: FILE NAME | FIRST | LAST -->         the lines of a function or class of FILE, from
                                                    the line with FIRST to the next line with LAST
    <!-- cell: NAME -->                             a cell of the notebook; not in the page

`--check` compares texts and code exactly. Numbers may differ by one unit in the last digit, because
another processor rounds differently, and pictures a little, because another matplotlib does too.
The pictures of the page need playwright and Debian's chromium, and are not compared.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import textwrap
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCS = ROOT / "docs"
ASSETS = DOCS / "step_by_step"
LANGUAGES = {"en": "gpt_step_by_step", "zh": "gpt_step_by_step.zh"}
"""Language -> name of its page and notebook without the suffix."""

_CODE = re.compile(
    r"^<!-- code: (?P<file>\S+) (?P<name>\S+)(?: \| (?P<first>.+?) \| (?P<last>.+?))? -->$", re.M
)
_CELL = re.compile(r"^<!-- cell: (\w+) -->\n+", re.M)
_VALUE = re.compile(r"\{\{(.+?)\}\}")
_PICTURE = re.compile(r"^!\[[^\]]*\]\(step_by_step/(\w+)\.png\)\n+", re.M)
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
# The mean difference of two pictures, of colours from 0 to 1.
_SAME_PICTURE = 0.02


def cells() -> dict[str, str]:
    """Returns the cells of `cells.py`: name -> source."""
    parts = re.split(r"^# %% (\w+)\n", (HERE / "cells.py").read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))


def run(train: bool = False) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Runs the cells in the folder docs/.

    Args:
      train: whether to train the models, instead of reading the kept ones.

    Returns:
      The variables after the last cell, and name of a cell -> its picture as PNG.
    """
    variables: dict[str, Any] = {"__name__": "cells"}
    pictures = {}
    style = {"svg.hashsalt": "gptjax", "font.size": 9, "figure.facecolor": "white"}
    with contextlib.chdir(DOCS), plt.rc_context(style):
        for name, source in cells().items():
            if train:
                source = source.replace("TRAIN = False", "TRAIN = True")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, f"cells.py: {name}", "exec"), variables)
            if plt.get_fignums():
                file = io.BytesIO()
                # Without metadata the file does not name the version of matplotlib.
                plt.gcf().savefig(file, dpi=110, metadata={"Software": None})
                pictures[name] = file.getvalue()
                plt.close("all")
    return variables, pictures


def code(file: str, name: str, first: str | None = None, last: str | None = None) -> str:
    """Returns lines of a function or class, without their common indentation.

    Args:
      file: the path below the root.
      name: the name of the function or class, such as "Block.__call__".
      first, last: parts of the first and of the last line. None means the whole definition.

    Raises:
      ValueError: there is no such definition or line. The template must then be changed.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if not found:
            raise ValueError(f"{file}: has no {name}")
        node = found[0]
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    if first is not None and last is not None:
        starts = [i for i, line in enumerate(lines) if first in line]
        ends = [i for i, line in enumerate(lines) if starts and i >= starts[0] and last in line]
        if not ends:
            raise ValueError(f"{file}: {name} has no lines from {first!r} to {last!r}")
        lines = lines[starts[0] : ends[0] + 1]
    return textwrap.dedent("\n".join(lines))


def number(value: float, digits: int = 3) -> str:
    """Returns a number with some digits after the point, and never "-0.000"."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def significant(value: float, digits: int = 4) -> str:
    """Returns a number with some digits in all, such as 0.0001234 or 1.234e-07."""
    return f"{value:.{digits}g}"


def listed(values: Any, digits: int = 3) -> str:
    """Returns numbers as a list in parentheses."""
    return "(" + ", ".join(number(x, digits) for x in values) + ")"


def table(values: Any, rows: Any, columns: Any, corner: str = "", digits: int = 3) -> str:
    """Returns a matrix as a Markdown table.

    Args:
      values: the cells: numbers, or texts that are not changed.
      rows: the name of each row.
      columns: the name of each column.
      corner: the text above the names of the rows.
      digits: the number of digits after the point.
    """

    def cell(x: Any) -> str:
        whole = isinstance(x, str | int | np.integer)
        return str(x) if whole else number(x, digits)

    def is_number(column: int) -> bool:
        return all(re.fullmatch(r"-?[\d.e-]*(?: %)?", cell(line[column])) for line in values)

    values = [list(line) for line in values]
    rules = ["---:" if is_number(i) else "---" for i in range(len(values[0]))]
    lines = [[corner, *columns], ["---", *rules]]
    lines += [[name, *map(cell, values)] for name, values in zip(rows, values, strict=True)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def render(template: str, variables: dict[str, Any]) -> str:
    """Returns a page with its code and numbers; the marks of cells stay in it."""
    helpers = {"n": number, "s": significant, "listed": listed, "table": table}

    def block(match: re.Match[str]) -> str:
        found = code(match["file"], match["name"], match["first"], match["last"])
        link = f"[{match['file']}](../{match['file']}), `{match['name']}`"
        return f"{match[0]}\n{link}:\n\n```python\n{found}\n```"

    page = _CODE.sub(block, template)
    return _VALUE.sub(lambda match: str(eval(match[1], variables | helpers)), page)


def page_of(rendered: str) -> str:
    """Returns the page without the marks of cells."""
    return _CELL.sub("", rendered)


def notebook_of(rendered: str) -> str:
    """Returns the notebook: the text of the page, with cells that compute its numbers."""
    sources, found = cells(), []
    for i, part in enumerate(_CELL.split(rendered)):
        if i % 2:
            found.append(nbformat.v4.new_code_cell(sources[part]))
        elif text := _PICTURE.sub(
            lambda match: "" if match[1] in sources else match[0], part
        ).strip():
            found.append(nbformat.v4.new_markdown_cell(text))
    for i, cell in enumerate(found):
        cell.id = f"cell-{i}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    book = nbformat.v4.new_notebook(cells=found, metadata=metadata)
    return json.dumps(book, ensure_ascii=False, indent=1) + "\n"


def same_text(kept: str, made: str) -> bool:
    """Whether two texts are equal but for one unit in the last digit of their numbers."""
    if _NUMBER.sub("#", kept) != _NUMBER.sub("#", made):
        return False
    pairs = zip(_NUMBER.findall(kept), _NUMBER.findall(made), strict=True)
    return all(abs(float(a) - float(b)) <= max(_unit(a), _unit(b)) * 1.01 for a, b in pairs)


def _unit(text: str) -> float:
    """Returns one unit of the last digit of a number."""
    digits, _, exponent = text.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def same_picture(kept: bytes, made: bytes) -> bool:
    """Whether two PNG pictures have the same size, and nearly the same colours."""
    a, b = (plt.imread(io.BytesIO(x))[..., :3] for x in (kept, made))
    return a.shape == b.shape and float(np.abs(a - b).mean()) <= _SAME_PICTURE


def files(variables: dict[str, Any], pictures: dict[str, bytes]) -> dict[pathlib.Path, bytes]:
    """Returns the pages, the notebooks and the pictures: path -> contents."""
    found = {ASSETS / f"{name}.png": picture for name, picture in pictures.items()}
    for language, name in LANGUAGES.items():
        template = (HERE / f"{language}.md").read_text(encoding="utf-8")
        rendered = render(template, variables)
        found[DOCS / f"{name}.md"] = page_of(rendered).encode()
        found[DOCS / f"{name}.ipynb"] = notebook_of(rendered).encode()
    return found


def stale(made: dict[pathlib.Path, bytes]) -> list[str]:
    """Returns the names of the files that are missing or differ from what was made."""

    def is_same(path: pathlib.Path, contents: bytes) -> bool:
        if not path.exists():
            return False
        if path.suffix == ".png":
            return same_picture(path.read_bytes(), contents)
        return same_text(path.read_text(encoding="utf-8"), contents.decode())

    return [str(path.relative_to(ROOT)) for path, x in made.items() if not is_same(path, x)]


# View of the page -> the first of its parts in the picture, and the part after the last, both from
# 0. None means that the picture goes to the end of the view.
_VIEWS = {"head": (0, 1), "training": (2, None)}


def explain(variables: dict[str, Any]) -> None:
    """Writes pictures of parts of the page of `gptjax explain`, in each language."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    layer, head = variables["READER"]
    address = f"head={layer}.{head}&token={variables['T'] - 1}"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme="light")
        for language in LANGUAGES:
            page = variables["gpt"].explain(
                variables["SENTENCE"], variables["LABEL"], [(layer, head)], language
            )
            page.save(f"{folder}/{language}.html")
            for view, (first, last) in _VIEWS.items():
                tab.goto(f"file://{folder}/{language}.html#at={view}&{address}")
                tab.wait_for_selector("html[data-ready]")
                parts = tab.locator(f"#view-{view} h3")
                # The page draws what is in the window.
                parts.nth(first).evaluate("part => part.scrollIntoView()")
                tab.wait_for_timeout(1000)
                box = tab.locator(f"#view-{view}").bounding_box()
                top = parts.nth(first).bounding_box()["y"]
                end = (
                    box["y"] + box["height"]
                    if last is None
                    else parts.nth(last).bounding_box()["y"]
                )
                shift = tab.evaluate("scrollY")
                clip = {"x": box["x"] - 8, "y": top + shift - 8, "width": box["width"] + 8,
                        "height": end - top}  # fmt: skip
                picture = Image.open(io.BytesIO(tab.screenshot(full_page=True, clip=clip)))
                small = picture.convert("RGB").quantize(64)
                small.save(ASSETS / f"explain_{view}_{language}.png", optimize=True)
        browser.close()


def keep_models(variables: dict[str, Any]) -> None:
    """Replaces the kept models by those that were trained."""
    from gptjax.interop import convert

    for model, stage in ((variables["pretrained"], "pretrain"), (variables["gpt"], "finetune")):
        shutil.rmtree(ASSETS / "model" / stage, ignore_errors=True)
        convert.export_weights(model.path, str(ASSETS / "model" / stage), "huggingface")
    scores = json.dumps(variables["training"], indent=1)
    (ASSETS / "model" / "training.json").write_text(scores + "\n")


def main() -> int:
    """Runs the command; returns 1 if `--check` finds a file that is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", action="store_true", help="train the two models again")
    parser.add_argument("--explain", action="store_true", help="pictures of the page too")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is stale")
    arguments = parser.parse_args()
    if arguments.train and not arguments.check:
        keep_models(run(train=True)[0])
    # The numbers are those of the kept models, which a reader has too.
    variables, pictures = run()
    made = files(variables, pictures)
    if arguments.check:
        for name in stale(made):
            print(f"{name}: is not up to date; run python scripts/step_by_step/build.py")
        return int(bool(stale(made)))
    for path, contents in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
        print(os.path.relpath(path))
    if arguments.explain:
        explain(variables)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
