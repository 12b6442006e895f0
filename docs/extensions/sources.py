"""Pages that show the files of the repository that other pages link to, such as linear.py.

Without them the browser would save such a file instead of showing it.
"""

import pathlib
import posixpath
from collections.abc import Iterator

from docutils import nodes
from pygments import lexers
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

_FOLDER = "source"
"""The folder of these pages in the site."""
_KEY = "gptjax_sources"


class SourceLinks(SphinxTransform):
    """Makes each link to a file a link to the page of that file."""

    default_priority = 870  # before Sphinx notes what to copy, which has 880

    def apply(self, **_: object) -> None:
        """Replaces the links of one page, and notes their files for `pages`."""
        docname = self.env.docname
        for node in list(self.document.findall(addnodes.download_reference)):
            path, _ = self.env.relfn2path(node["reftarget"], docname)
            page = posixpath.relpath(f"{_FOLDER}/{path}.html", posixpath.dirname(docname) or ".")
            link = nodes.reference("", "", *node.children, refuri=page, internal=True)
            node.replace_self(link)
            # Sphinx forgets the metadata of a page when the page changes.
            self.env.metadata[docname].setdefault(_KEY, []).append(path)


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yields the name, the contents and the template of each page."""
    linked = {path for data in app.env.metadata.values() for path in data.get(_KEY, [])}
    for path in sorted(linked):
        text = pathlib.Path(app.srcdir, path).read_text(encoding="utf-8")
        try:
            language = lexers.get_lexer_for_filename(path).aliases[0]
        except ClassNotFound:
            language = "bash" if text.startswith("#!") else "none"
        body = app.builder.highlighter.highlight_block(text, language, force=True)
        name = posixpath.basename(path)
        yield (
            f"{_FOLDER}/{path}",
            {"title": name, "body": f"<h1>{path}</h1>{body}"},
            "page.html",
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the links and the pages to a build."""
    app.add_transform(SourceLinks)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
