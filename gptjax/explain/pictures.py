"""Figures for a paper or a lesson, drawn from the data of the page (`docs/explain_json.md`).

The letters of shapes are defined in `gptjax.batch`.
"""

import base64
import contextlib
import functools
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.config.schema import PictureFormat
from gptjax.errors import UserError
from gptjax.explain import page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Data = dict[str, Any]

# Fonts with Chinese characters, as they are called on Linux, Windows and macOS.
_CHINESE = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Noto Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Noto Sans CJK JP", "Noto Serif CJK SC", "Microsoft YaHei", "SimHei",
    "PingFang SC", "Heiti SC", "Hiragino Sans GB", "Arial Unicode MS",
)  # fmt: skip
_CHINESE_FILES = re.compile(
    r"CJK|SourceHan|NotoSansSC|wqy|msyh|simhei|PingFang|Heiti|Hiragino", re.I
)
_FONT = "DejaVu Sans"  # comes with matplotlib
_INK, _SOFT, _LINE, _MASKED = "#1c1c1e", "#6a6f76", "#c9ccd1", "#eceef1"
# The colours of the page: one hue for weights, blue and orange for signs.
_WEIGHT = ("#ffffff", "#bed9f0", "#4189c7", "#08306b")
_HEAT = ("#ffffff", "#fdd6b2", "#c85808")
_SIGN = ("#c45400", "#fac8a0", "#ffffff", "#96c6e6", "#005fa0")
_WIDTH, _DPI = 6.5, 300
# Tokens with their names on an axis; with more, every nth has its name.
_NAMED = 48
_METHODS = ("integrated_gradients", "gradient_x_input", "leave_one_out")
_UNSEEN = re.compile(
    "[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff]"
)


def draw(
    data: Data, language: str = "en", format: PictureFormat = PictureFormat.PNG
) -> Iterator[tuple[str, bytes]]:
    """Yields the pictures of a page: names of files without their ending, and their contents.

    They are `mask`, `attention_N` for each block N, `steps`, `surprise`, and for a task
    `attribution`. Equal data give equal bytes.

    Args:
      data: the data of the page, from `gptjax.explain.data.explain`.
      language: the language of the titles, en or zh.
      format: the format of the contents.

    Raises:
      UserError: no font of this machine has Chinese characters, and they are wanted.
    """
    import matplotlib

    settings: Any = {
        "font.family": fonts(language), "svg.hashsalt": "gptjax", "pdf.fonttype": 42,
        "axes.edgecolor": _LINE, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _SOFT,
        "ytick.color": _SOFT, "font.size": 8, "axes.titlesize": 9, "text.parse_math": False,
    }  # fmt: skip
    t = functools.partial(_text, _strings(language))
    makers: dict[str, Callable[[], Figure]] = {"mask": functools.partial(_mask, data, t)}
    for layer, weights_HTS in enumerate(weights(data)):
        makers[f"attention_{layer}"] = functools.partial(_attention, data, t, layer, weights_HTS)
    makers["steps"] = functools.partial(_steps, data, t)
    makers["surprise"] = functools.partial(_surprise, data, t)
    if data["attribution"]:
        makers["attribution"] = functools.partial(_attribution, data, t)
    for name, make in makers.items():
        # The reader's own settings of matplotlib change no picture. They are back before `yield`,
        # because the caller may draw between two pictures.
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(settings)
            content = _bytes(make(), format)
        yield name, content


def _bytes(figure: "Figure", format: PictureFormat) -> bytes:
    # Without a date, equal pictures are equal files.
    metadata = {
        PictureFormat.PNG: {"Software": None},
        PictureFormat.SVG: {"Date": None},
        PictureFormat.PDF: {"CreationDate": None},
    }[format]
    file = io.BytesIO()
    figure.savefig(file, format=str(format), dpi=_DPI, metadata=metadata, bbox_inches="tight")
    return file.getvalue()


# ---- texts


@functools.cache
def _strings(language: str) -> dict[str, str]:
    """Returns name -> text in one language, of the page's `strings.js`."""
    both = re.findall(
        r'(\w+): \[\s*("(?:[^"\\]|\\.)*"),\s*("(?:[^"\\]|\\.)*")\s*\]', page.strings()
    )
    return {name: json.loads((en, zh)[language == "zh"]) for name, en, zh in both}


def _text(strings: dict[str, str], name: str, **parts: Any) -> str:
    """Returns a text of the page with its parts filled in."""
    text = strings[name]
    for key, value in parts.items():
        text = text.replace(f"{{{key}}}", str(value))
    return text[:1].upper() + text[1:]


def fonts(language: str) -> list[str]:
    """Returns the names of the fonts: for each character the first that has it is used.

    Raises:
      UserError: Chinese is wanted, and this machine has no font for it.
    """
    from matplotlib import font_manager

    def chinese() -> list[str]:
        names = set(font_manager.fontManager.get_font_names())
        return [name for name in _CHINESE if name in names][:1]

    if not chinese():
        # matplotlib keeps a list of fonts, which does not have those that were installed later.
        for path in font_manager.findSystemFonts():
            if _CHINESE_FILES.search(os.path.basename(path)):
                with contextlib.suppress(Exception):  # a broken file is no font
                    font_manager.fontManager.addfont(path)
    if language == "zh" and not chinese():
        raise UserError(
            "`language`=zh: this machine has no font with Chinese characters; install one, such as "
            "fonts-noto-cjk, or give en"
        )
    return [_FONT, *chinese()]


@functools.cache
def _known(fonts: tuple[str, ...]) -> frozenset[int]:
    """Returns the code points for which one of the fonts has a glyph."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    files = [font_manager.findfont(name) for name in fonts]
    return frozenset().union(*(FT2Font(file).get_charmap() for file in files))


def _drawable(text: str) -> str:
    """Returns a text in which characters that cannot be seen or drawn are written out."""
    import matplotlib

    known = _known(tuple(matplotlib.rcParams["font.family"]))

    def shown(character: str) -> str:
        if character in "\n\t":
            return {"\n": "↵", "\t": "⇥"}[character]
        code = ord(character)
        is_mark = unicodedata.bidirectional(character) in ("R", "AL", "RLE", "RLO", "RLI")
        if _UNSEEN.match(character) or code not in known or is_mark:
            return f"⟨{code:X}⟩"
        return character

    return "".join(map(shown, text))


def _label(token: dict[str, Any], t: Callable[..., str], limit: int = 14) -> str:
    """Returns the name of a token: its text, or what kind of special token it is."""
    kind = token["kind"]
    if kind != "text":
        return t(f"kind_{kind}").lower()
    text = token["text"].removesuffix("</w>") or token["text"]
    # A character that is written out is longer, so there is a second limit.
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    text = _drawable(text.replace(" ", "␣") if text.isspace() else text)
    return text if len(text) <= 3 * limit else f"{text[: 3 * limit - 1]}…"


# ---- arrays


def _triangle(text: str, length: int, dtype: str = "u1") -> np.ndarray:
    """Returns a square matrix with a lower triangle of the page, and 0 above, [..., T, T]."""
    rows, columns = np.tril_indices(length)
    values = np.frombuffer(base64.b64decode(text), dtype).reshape(-1, len(rows))
    square = np.zeros((len(values), length, length), dtype)
    square[:, rows, columns] = values
    return square


def visible(data: Data) -> np.ndarray:
    """Returns which key (column) each query (row) sees, bool [T, T]."""
    return _triangle(data["attention"]["visible"], len(data["tokens"]))[0].astype(bool)


def weights(data: Data) -> np.ndarray:
    """Returns the attention weights, float32 [L, H, T, T], multiples of 1/255 but for the largest.

    The eight largest of each query are exact.
    """
    model, length = data["model"], len(data["tokens"])
    shape = model["layers"], model["heads"], length
    square = _triangle(data["attention"]["weights"], length).reshape(*shape, length)
    found = square.astype(np.float32) / 255
    top = data["attention"]["top"]
    keys = np.frombuffer(base64.b64decode(top["keys"]), "<u2").reshape(*shape, -1).astype(int)
    values = np.frombuffer(base64.b64decode(top["values"]), "<f4").reshape(*shape, -1)
    for place in range(keys.shape[-1]):
        at = (*np.indices(shape), keys[..., place])
        found[at] = np.where(values[..., place] > 0, values[..., place], found[at])
    return found


# ---- figures


def _figure(width: float, height: float) -> "Figure":
    # pyplot is not used, because it never frees its figures and might look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _colours(stops: Sequence[str]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("page", list(stops))


def _name_axes(
    axis: "Axes", names: Sequence[str], size: float, side: float, rows: bool, columns: bool
) -> None:
    """Writes the tokens beside the rows and under the columns of a matrix.

    Names that would overlap are smaller, down to 4.5 points. With more tokens every nth has one.

    Args:
      axis: the matrix.
      names: the names of the tokens.
      size: the largest size of the names, in points.
      side: the length of a side of the matrix, in inches.
      rows: whether the rows have names.
      columns: whether the columns have names.
    """
    room = 72 * side / 1.1  # points for all names, with a tenth between two lines
    size = min(size, max(4.5, room / len(names)))
    step = -(-len(names) // max(1, min(_NAMED, int(room / size + 1e-9))))
    places = list(range(0, len(names), step))
    shown = [names[i] if step == 1 else f"{names[i]} {i}" for i in places]
    axis.set_yticks(places if rows else [], shown if rows else [], fontsize=size)
    axis.set_xticks(places if columns else [], shown if columns else [], fontsize=size)
    axis.tick_params(length=0, pad=2)
    for label in axis.get_xticklabels():
        label.set_rotation(90)


def _names(data: Data, t: Callable[..., str]) -> list[str]:
    return [_label(token, t) for token in data["tokens"]]


def _mask(data: Data, t: Callable[..., str]) -> "Figure":
    seen_TS, names = visible(data), _names(data, t)
    length = len(names)
    size = min(_WIDTH - 1.2, max(1.6, 0.17 * length))
    figure = _figure(size + 1.2, size + 1.2)
    axis = figure.add_axes((1.1 / (size + 1.2), 0.9 / (size + 1.2), *2 * (size / (size + 1.2),)))
    axis.imshow(seen_TS, cmap=_colours((_MASKED, _WEIGHT[2])), vmin=0, vmax=1)
    _name_axes(axis, names, _font_size(length), size, True, True)
    if length <= 24:
        for i, j in np.ndindex(length, length):
            text, colour = ("0", "#ffffff") if seen_TS[i, j] else ("−∞", _SOFT)
            axis.text(j, i, text, ha="center", va="center", fontsize=5.5, color=colour)
        axis.set_xticks(np.arange(length - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(length - 1) + 0.5, minor=True)
        axis.grid(which="minor", color="#ffffff", linewidth=0.6)
        axis.tick_params(which="minor", length=0)
    axis.set_xlabel(t("picture_keys"))
    axis.set_ylabel(t("picture_queries"))
    axis.set_title(t("picture_mask"), loc="left")
    return figure


def _font_size(length: int) -> float:
    return 7 if length <= 32 else 5.5


def _attention(data: Data, t: Callable[..., str], layer: int, weights_HTS: np.ndarray) -> "Figure":
    from matplotlib.colors import PowerNorm

    seen_TS, names = visible(data), _names(data, t)
    heads, length = len(weights_HTS), len(names)
    columns = min(heads, 4 if length <= 40 else 3)
    rows = -(-heads // columns)
    labels = 0.75 if length <= _NAMED else 0.95
    size = (_WIDTH - labels - 0.1 * (columns - 1)) / columns
    height = rows * (size + 0.28) + labels + 0.55
    figure = _figure(_WIDTH, height)
    colours = _colours(_WEIGHT).with_extremes(bad=_MASKED)
    image = None
    for head in range(heads):
        row, column = divmod(head, columns)
        left = (labels + column * (size + 0.1)) / _WIDTH
        bottom = (height - 0.18 - (row + 1) * (size + 0.28)) / height
        axis = figure.add_axes((left, bottom, size / _WIDTH, size / height))
        shown = np.ma.masked_array(weights_HTS[head], ~seen_TS)
        # The root makes small weights visible, as in the page.
        image = axis.imshow(shown, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        is_last = head + columns >= heads
        _name_axes(axis, names, 5 if length > 20 else 6, size, column == 0, is_last)
        axis.set_title(f"{t('head')} {head}", fontsize=7.5, pad=3)
        for spine in axis.spines.values():
            spine.set_linewidth(0.5)
    figure.suptitle(
        t("picture_attention", layer=layer), x=0.01, y=1 - 0.06 / height, ha="left", va="top",
        fontsize=9,
    )  # fmt: skip
    bar = figure.add_axes((labels / _WIDTH, 0.12 / height, 1.6 / _WIDTH, 0.09 / height))
    assert image is not None
    figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[0, 0.1, 0.5, 1])
    bar.tick_params(labelsize=6, length=2)
    bar.text(1.06, 0.5, t("picture_weight"), transform=bar.transAxes, va="center", fontsize=7)
    return figure


def _short(count: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count) if count else "–"


def _steps(data: Data, t: Callable[..., str]) -> "Figure":
    """The step table: the embeddings, one block (all have the same sizes), and the heads."""
    steps = [step for step in data["steps"] if step["layer"] in (None, 0)]
    layers = data["model"]["layers"]
    height = 0.2 * (len(steps) + 3)
    figure = _figure(_WIDTH, height)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(len(steps) + 2, -1)
    columns = ((0.0, "left"), (0.6, "right"), (0.76, "right"), (0.89, "right"), (1.0, "right"))
    heads = ["col_step", "col_shape", "col_parameters", "col_flops", "col_norm"]

    def write(row: float, cells: Sequence[str], **style: Any) -> None:
        for (x, align), cell in zip(columns, cells, strict=True):
            axis.text(x, row, cell, ha=align, va="center", fontsize=7.5, **style)

    write(-0.4, [t(name) for name in heads], color=_SOFT)
    axis.axhline(0.15, color=_INK, linewidth=0.8)
    in_block = [i for i, step in enumerate(steps) if step["layer"] == 0]
    for i, step in enumerate(steps):
        indent = "   " if step["layer"] == 0 else ""
        norm = "–" if step["norm"] is None else f"{step['norm']:.3g}"
        write(i + 0.7, [
            indent + t(f"step_{step['name']}"), " × ".join(map(str, step["shape"])),
            f"{step['parameters']:,}" if step["parameters"] else "–", _short(step["flops"]), norm,
        ])  # fmt: skip
    if in_block:
        top, bottom = in_block[0] + 0.25, in_block[-1] + 1.15
        axis.plot([0.004, 0.004], [top, bottom], color=_WEIGHT[2], linewidth=1.5)
        axis.text(
            -0.012, (top + bottom) / 2, t("picture_blocks", count=layers), rotation=90, va="center",
            ha="right", fontsize=7, color=_WEIGHT[2],
        )  # fmt: skip
    axis.axhline(len(steps) + 0.3, color=_LINE, linewidth=0.8)
    parameters = sum(step["parameters"] for step in data["steps"])
    flops = sum(step["flops"] for step in data["steps"])
    write(
        len(steps) + 0.85, [t("steps_total"), "", f"{parameters:,}", _short(flops), ""], color=_SOFT
    )
    return figure


def _surprise(data: Data, t: Callable[..., str]) -> "Figure":
    # The surprise at a place is that of the token after it.
    values = [None, *data["lm"]["surprise"][:-1]]
    known = [value for value in values if value is not None]
    most = max([1.0, *known])
    title = t("picture_surprise", loss=f"{data['losses']['lm']:.3f}")
    return _coloured(data, t, [(title, values)], _HEAT, 0, most, t("nats"))


def _attribution(data: Data, t: Callable[..., str]) -> "Figure":
    found = data["attribution"]["methods"]
    rows = []
    for method in _METHODS:
        values = found[method]
        most = max(map(abs, values)) or 1.0
        is_text = [token["kind"] == "text" for token in data["tokens"]]
        shares = [v / most if text else None for v, text in zip(values, is_text, strict=True)]
        rows.append((f"{t(f'method_{method}')}  (±{most:.3g})", shares))
    return _coloured(data, t, rows, _SIGN, -1, 1, t("picture_share"))


def _coloured(
    data: Data,
    t: Callable[..., str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    stops: Sequence[str],
    least: float,
    most: float,
    unit: str,
) -> "Figure":
    """Draws the tokens as a text whose background tells a number, once for each row."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    colours, scale = _colours(stops), Normalize(least, most)
    names, size = _names(data, t), 9.0
    widths = _widths(names, size)
    lines = _lines(data, widths)
    line_height, title_height = 0.24, 0.3
    height = len(rows) * (title_height + line_height * len(lines) + 0.12) + 0.45
    figure = _figure(_WIDTH, height)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(0, _WIDTH)
    axis.set_ylim(height, 0)
    y = 0.0
    for title, values in rows:
        axis.text(0, y + 0.12, title, fontsize=9, va="center", fontweight="bold")
        y += title_height
        for line in lines:
            for token, x in line:
                value = values[token]
                box = (x, y + 0.015), widths[token], line_height - 0.03
                if value is None:
                    style: dict[str, Any] = {"fill": False, "edgecolor": _LINE, "linewidth": 0.5}
                    ink = _SOFT
                else:
                    colour = colours(scale(value))
                    style = {"facecolor": colour, "linewidth": 0}
                    bright = np.dot(colour[:3], (0.299, 0.587, 0.114))
                    ink = _INK if bright > 0.55 else "#ffffff"
                axis.add_patch(Rectangle(*box, **style))
                middle = x + widths[token] / 2
                axis.text(
                    middle, y + line_height / 2, names[token], fontsize=size, ha="center",
                    va="center_baseline", color=ink,
                )  # fmt: skip
            y += line_height
        y += 0.12
    bar = figure.add_axes((0.0, 0.2 / height, 1.6 / _WIDTH, 0.09 / height))
    figure.colorbar(ScalarMappable(scale, colours), cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=6, length=2)
    bar.text(1.06, 0.5, unit, transform=bar.transAxes, va="center", fontsize=7)
    return figure


def _widths(names: Sequence[str], size: float) -> list[float]:
    """Returns the width of each name in a box, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure(1, 1)
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = {name: figure.text(0, 0, name, fontsize=size) for name in set(names)}
    boxes = {name: text.get_window_extent(renderer) for name, text in texts.items()}
    return [boxes[name].width / figure.dpi + 0.1 for name in names]


def _lines(data: Data, widths: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Returns the lines of a text: each has the tokens, and their left edges in inches."""
    lines: list[list[tuple[int, float]]] = []
    for sequence in data["sequences"]:
        x = _WIDTH
        for token in range(sequence["start"], sequence["stop"]):
            if x + widths[token] > _WIDTH:
                lines.append([])
                x = 0.0
            lines[-1].append((token, x))
            following = data["tokens"][token + 1] if token + 1 < len(widths) else None
            word = data["tokens"][token]["word"]
            is_joined = following is not None and word is not None and following["word"] == word
            x += widths[token] + (0.012 if is_joined else 0.045)
    return lines
