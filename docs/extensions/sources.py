"""Pages that show the files of the repository that other pages link to, such as linear.py.

Without them the browser would save such a file instead of showing it.
"""

import functools
import importlib
import inspect
import pathlib
import posixpath
from collections.abc import Iterator, Mapping

from docutils import nodes
from pygments import lexers
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

_FOLDER = "source"
"""The folder of these pages in the site."""
_LINE = "line"
"""The anchor of a line is this word, a hyphen and the number of the line."""
_KEY = "gptjax_sources"


def address(path: str, docname: str) -> str:
    """Returns the address of the page of a file, seen from the page of a document."""
    return posixpath.relpath(f"{_FOLDER}/{path}.html", posixpath.dirname(docname) or ".")


class SourceLinks(SphinxTransform):
    """Makes each link to a file a link to the page of that file."""

    default_priority = 870  # before Sphinx notes what to copy, which has 880

    def apply(self, **_: object) -> None:
        """Replaces the links of one page."""
        for node in list(self.document.findall(addnodes.download_reference)):
            if node["reftarget"].endswith(".ipynb"):
                continue  # a notebook is for Jupyter: the browser saves it
            path, _ = self.env.relfn2path(node["reftarget"], self.env.docname)
            uri = address(path, self.env.docname)
            node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def linkcode_resolve(_: str, info: Mapping[str, str]) -> str | None:
    """Returns the address of the code of a documented object, for `sphinx.ext.linkcode`.

    The documented objects are all in docs/api.md. The result is None for what has no code of its
    own, such as a field.
    """
    value = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        value = getattr(value, name, None)
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    try:
        path, (_, line) = inspect.getsourcefile(value), inspect.getsourcelines(value)
    except (TypeError, OSError):
        return None
    root = pathlib.Path(__file__).parents[2]
    file = pathlib.Path(str(path)).relative_to(root).as_posix()
    return f"{address(file, 'docs/api')}#{_LINE}-{line}"


def _note(app: Sphinx, doctree: nodes.document) -> None:
    """Notes the files that a document links to, for `pages`."""
    # The metadata of a document is forgotten when the document changes.
    docname = app.env.docname
    for node in doctree.findall(nodes.reference):
        uri = node.get("refuri", "").partition("#")[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(docname), uri))
        if path.startswith(f"{_FOLDER}/"):
            file = path.removeprefix(f"{_FOLDER}/").removesuffix(".html")
            app.env.metadata[docname].setdefault(_KEY, []).append(file)


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yields the name, the contents and the template of each page."""
    linked = {path for data in app.env.metadata.values() for path in data.get(_KEY, [])}
    for path in sorted(linked):
        text = pathlib.Path(app.srcdir, path).read_text(encoding="utf-8")
        try:
            language = lexers.get_lexer_for_filename(path).aliases[0]
        except ClassNotFound:
            language = "bash" if text.startswith("#!") else "none"
        body = app.builder.highlighter.highlight_block(
            text, language, force=True, lineanchors=_LINE
        )
        name = posixpath.basename(path)
        yield (
            f"{_FOLDER}/{path}",
            {"title": name, "body": f"<h1>{path}</h1>{body}"},
            "page.html",
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the links and the pages to a build."""
    app.add_transform(SourceLinks)
    # After `sphinx.ext.linkcode` has added its links.
    app.connect("doctree-read", _note, priority=900)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
