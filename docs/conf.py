"""How Sphinx makes the site out of the Markdown files of the repository.

    sphinx-build --fail-on-warning --nitpicky -c docs . docs/_build

The source folder is the whole repository, so README.md, deploy/README.md and docs/ are pages of the
site under their own names, and a link that works on GitHub works here. The site needs no network:
neither when it is built, nor when it is read, from a server or from the disk.
"""

import pathlib
import sys

DOCS = pathlib.Path(__file__).resolve().parent
# The extensions, and the gptjax of this clone, not an installed one.
sys.path[:0] = [str(DOCS / "extensions"), str(DOCS.parent)]

import sources  # noqa: E402 (the path above)

import gptjax  # noqa: E402

project = "gptjax"
author = "The gptjax developers"
version = release = gptjax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "docstrings",
    "mathml",
    "program",
    "sources",
]
root_doc = "docs/index"
include_patterns = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md", "docs/*.md",
]  # fmt: skip
exclude_patterns = ["docs/_build", ".*", "build", "dist", "runs"]

myst_enable_extensions = ["dollarmath"]  # $...$ and $$...$$, as on GitHub
# As on GitHub, $ begins a formula only if no digit follows the end: "$5 and $6" is no formula.
myst_dmath_allow_digits = False
myst_dmath_allow_space = False
myst_heading_anchors = 4  # the anchors of GitHub: "#long-texts"

# Flags begin with two hyphens, which are no dash, and code in plain text keeps its quotes.
smartquotes = False
# Blocks without a language are output, which no lexer understands.
highlight_language = "none"
linkcode_resolve = sources.linkcode_resolve
autodoc_member_order = "bysource"
autodoc_typehints = "none"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"gptjax {release}"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
# The folder that a server shows begins with the start page.
html_additional_pages = {"index": "start.html"}
