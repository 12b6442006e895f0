"""Docstrings as this project writes them: Google's sections, and code in single backquotes."""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

_SECTIONS = Config(napoleon_use_rtype=False)


class Docstring(GoogleDocstring):
    """A docstring of Google's style whose "Returns" has no type in front of a colon.

    Sphinx takes the text before a colon for a type. Our shapes and sentences are no types.
    """

    def _consume_returns_section(
        self, preprocess_types: bool = False
    ) -> list[tuple[str, str, list[str]]]:
        return [("", "", self._dedent(self._consume_to_next_section()))]


def code(line: str) -> str:
    r"""Returns a line with code in double backquotes, as reStructuredText wants it.

    >>> print(code("sets `top_p`=2 at most"))
    sets \ ``top_p``\ =2 at most
    >>> code("... f('`a`')")  # an example
    "... f('`a`')"
    """
    if line.lstrip().startswith((">>>", "...")):
        return line
    return re.sub(r"(?<!`)`([^`]+)`(?!`)", r"\\ ``\1``\\ ", line)


def _process(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    # Every kind is read as a function, because of attributes too Sphinx would read a type.
    lines[:] = Docstring([code(line) for line in lines], _SECTIONS, app, "function", name).lines()


def _dashes(_: Sphinx, doctree: nodes.document) -> None:
    """Puts a dash after the name of an argument, where Sphinx writes two hyphens.

    (`smartquotes` would do it, and would turn the hyphens of flags into dashes too.)
    """
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> dict[str, bool]:
    """Reads the docstrings that autodoc finds."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", _process)
    app.connect("doctree-read", _dashes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
