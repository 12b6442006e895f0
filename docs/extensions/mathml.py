"""Formulas as MathML, which browsers draw themselves: no script and no font.

docutils converts the TeX. What it does not understand is a warning, so a build that takes warnings
for errors never shows a wrong formula.
"""

import re
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_LOGGER = logging.getLogger(__name__)
# What docutils writes for \hat, \bar, \tilde, \dot, \ddot, \vec and \overline.
_ACCENTS = frozenset("ˆˉ~˙¨→_")


def convert(tex: str, is_block: bool) -> str:
    r"""Returns a formula as a MathML element.

    Args:
      tex: the formula, as LaTeX's mathematics mode reads it.
      is_block: whether the formula is a paragraph of its own.

    Raises:
      ValueError: docutils does not know a command, or would draw it in another way than LaTeX.

    >>> convert(r"\hat{m}_t", False).count("<mover"), convert(r"\hat{m}_t", False).count("<msub")
    (1, 1)
    """
    if short := re.search(r"\\[td]?frac\s*\d", tex):
        raise ValueError(f"{short[0]}: write \\frac{{1}}{{2}}, with braces")
    braces = re.sub(r"\\\\|\\[{}]", "", tex)
    if braces.count("{") != braces.count("}"):
        raise ValueError("a brace is missing")
    tex = re.sub(r"\\dots(?![a-z])", r"\\ldots", tex)  # docutils does not know \dots
    try:
        text = latex2mathml.tex2mathml(tex, as_block=is_block)
    except (MathError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    root = ElementTree.fromstring(text.replace("&ApplyFunction;", "\u2061"))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}munderover") and child[2].text in _ACCENTS:
                parent[list(parent).index(child)] = _with_index(child)
    ElementTree.register_namespace("", "http://www.w3.org/1998/Math/MathML")
    return ElementTree.tostring(root, encoding="unicode")


def _with_index(accented: ElementTree.Element) -> ElementTree.Element:
    r"""Returns \hat{m}_t with its index behind the letter. (docutils puts it below the letter.)"""
    base, index, accent = accented
    space = accented.tag.removesuffix("munderover")
    found = ElementTree.Element(f"{space}msub")
    over = ElementTree.SubElement(found, f"{space}mover", {"accent": "true"})
    over.extend([base, accent])
    found.append(index)
    return found


def _visit(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    is_block = isinstance(node, nodes.math_block)
    try:
        element = convert(node.astext(), is_block)
    except ValueError as error:
        _LOGGER.warning("formula %r: %s", node.astext(), error, location=node)
        element = self.encode(node.astext())
    self.body.append(f'<div class="formula">{element}</div>' if is_block else element)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer, and makes it the one that is used."""
    app.add_html_math_renderer("mathml", (_visit, None), (_visit, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
