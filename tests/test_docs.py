"""The documentation: its links, commands and messages are true, and the site is whole."""

import ast
import doctest
import functools
import html.parser
import importlib
import itertools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import urllib.parse

import pytest

from gptjax.cli import flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md")),
    *sorted(DOCS.glob("*.md")),
]
EXTENSIONS = sorted(path.stem for path in (DOCS / "extensions").glob("*.py"))

# The tests with the oldest packages have no Sphinx.
MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
pytest.importorskip("myst_parser")


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


pages = pytest.mark.parametrize("path", PAGES, ids=name)


@pytest.fixture
def extension(monkeypatch):
    """A function that imports an extension of the site by its name."""
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    yield importlib.import_module
    for each in EXTENSIONS:
        sys.modules.pop(each, None)


# Markdown


def tokens(path: pathlib.Path) -> list:
    """The tokens of a page, with those inside of paragraphs."""
    found = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    return [each for token in found for each in (token, *(token.children or ()))]


def anchors(path: pathlib.Path) -> set[str]:
    """GitHub's anchors of the headings: lower case, without punctuation, hyphens for spaces."""
    found: set[str] = set()
    flat = tokens(path)
    for opening, inline in itertools.pairwise(flat):
        if opening.type == "heading_open":
            text = "".join(each.content for each in inline.children)
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            same = [anchor, *(f"{anchor}-{i}" for i in range(1, 20))]
            found.add(next(each for each in same if each not in found))
    return found


def links(path: pathlib.Path) -> list[str]:
    return [
        urllib.parse.unquote(str(token.attrs.get("href") or token.attrs.get("src")))
        for token in tokens(path)
        if token.type in ("link_open", "image")
    ]


@pages
def test_links_lead_to_files_and_headings_of_the_repository(path):
    for link in links(path):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), f"{name(path)}: ]({link})"
        if anchor:
            assert anchor in anchors(target), f"{name(path)}: ]({link})"


def test_most_pages_have_links():
    assert sum(bool(links(path)) for path in PAGES) > len(PAGES) / 2


@pages
def test_files_that_a_page_names_are_there(path):
    folders = "gptjax|tests|docs|deploy|experiments|benchmarks|scripts"
    for token in tokens(path):
        if token.type == "code_inline" and path.name != "CHANGELOG.md":  # it names old files
            for file in re.findall(rf"(?<![\w./])(?:{folders})/[\w/]+\.\w+", token.content):
                # The site is there once it is built.
                is_pattern = re.search(r"ROOM|FILE|NAME|^docs/_build/", file)
                assert is_pattern or (ROOT / file).exists(), f"{name(path)}: {file}"


@pages
def test_commands_are_understood(path):
    """Each `gptjax` command of a page has flags, fields and an experiment that exist."""
    for token in tokens(path):
        if token.type != "fence" or token.info != "bash":
            continue
        for line in token.content.replace("\\\n", " ").splitlines():
            # A variable of the shell, such as $D, may hold several arguments; ... stands for some.
            is_whole = "$" not in line and "=..." not in line
            if line.startswith(("gptjax ", "python launch.py ")) and is_whole:
                words = shlex.split(line, comments=True)
                _, *arguments = words[words[0] == "python" :]
                assert flags.parse(["gptjax", *arguments]), line


def test_every_page_is_in_the_table_of_contents(extension):
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    steps = extension("program").steps()
    entries = re.findall(r"```\{toctree\}\n(?::.*\n)*\n((?:.+\n)*)```", text)
    names = "\n".join(entries).replace("<!-- site: steps -->", steps).split("\n")
    found = [re.sub(r".*<(.*)>", r"\1", each) for each in names if each]
    wanted = [os.path.relpath(path.with_suffix(""), DOCS) for path in PAGES]
    assert sorted(found) == sorted(set(wanted) - {"index"})


# docs/errors.md


@functools.cache
def templates() -> list[re.Pattern[str]]:
    """A pattern for each string of the program with enough letters to be recognised."""
    found = []
    for path in (ROOT / "gptjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if not all(text is None or isinstance(text, str) for text in texts):
                continue
            if len(re.findall(r"[a-z]", "".join(text or "" for text in texts))) >= 10:
                pattern = "".join(".*" if text is None else re.escape(text) for text in texts)
                # The command line turns `name` into a flag.
                pattern = re.sub("`([^`]*)`", r"--(?:config\\.)?\1", pattern)
                found.append(re.compile(pattern))
    return found


def quoted() -> list[str]:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    return re.findall(r"^error: (.*)$", text, re.MULTILINE)


def is_known(message: str) -> bool:
    """Whether the program has the message, or what follows one of its colons (the problem)."""
    ends = [message[match.end() :] for match in re.finditer("^|: ", message)]
    return any(pattern.fullmatch(end) for pattern in templates() for end in ends)


def test_the_messages_of_the_page_are_the_program_s():
    # absl, which reads the flags, has the one about unknown flags.
    own = [message for message in quoted() if "Unknown command line flag" not in message]
    assert len(own) > 40
    for message in own:
        assert is_known(message), message


@pytest.mark.parametrize(
    "message",
    [
        "trian: no such mood; did you mean 'train'?",
        "--config.model.num_heads=7: must be a divisor of --config.model.width=128",
        "reviews.csv: row 2, column stars: there is no label",
    ],
)
def test_a_message_that_the_program_does_not_have_is_found(message):
    assert not is_known(message)


@pytest.mark.parametrize(
    ("arguments", "index"),
    [
        (["trian"], 0),
        (["--config=finetun_file"], 2),
        (["--config.finetune.epoch=3"], 3),
        (["train", "predict"], 4),
        (["--config=pretrain_file", "--config.finetune.epochs=3"], 5),
    ],
)
def test_the_first_messages_of_the_page_are_printed_as_they_stand(arguments, index):
    with pytest.raises(flags.UserError) as info:
        flags.parse(["gptjax", *arguments])
    text = str(info.value).replace("`config`", "--config")
    assert text == quoted()[1 + index]  # the one before is the example at the top


# The extensions


@pytest.mark.parametrize("each", EXTENSIONS)
def test_examples_of_the_extensions_give_what_they_show(each, extension):
    assert doctest.testmod(extension(each)).failed == 0


def test_formulas_become_mathml(extension):
    convert = extension("mathml").convert
    for tex in (
        r"\frac{a}{b}",
        r"\hat{m}_t",
        r"\sum_{i=1}^n x_i",
        r"\mathrm{softmax}(x)",
        r"a, \dots, b",
    ):
        found = convert(tex, True)
        assert found.startswith("<math")
        assert "\\" not in found
        assert 'display="block"' in found
    # The hat is over the letter alone, and the index is beside it.
    hat = "".join(convert(r"\hat{m}_t", False).split())
    assert re.search("<msub><mover[^>]*><mi>m</mi><mo[^>]*>ˆ</mo></mover><mi>t</mi></msub>", hat)
    # The limits of a sum stay below and above it.
    assert "<munderover>" in convert(r"\sum_{i=1}^n x_i", True)


@pytest.mark.parametrize("tex", [r"\nosuchcommand{x}", r"\frac12", r"\frac{1}{", r"a_{b"])
def test_a_formula_that_is_not_understood_is_refused(tex, extension):
    with pytest.raises(ValueError, match=r"."):
        extension("mathml").convert(tex, True)


def test_the_reference_has_every_mode_field_and_recipe(extension):
    from gptjax.config import experiments, schema

    program = extension("program")
    modes, fields, recipes = program.modes(), program.fields(), program.recipes()
    for mode, entry in flags.MODES.items():
        assert f"\n## {mode}\n" in modes
        assert all(f"`--{flag}`" in modes for flag in entry.flags)
    names = list(schema.field_names(schema.Experiment))
    for field in names:
        is_part = any(each.startswith(f"{field}.") for each in names)
        assert is_part or f"`{field.rpartition('.')[2]}=" in fields, field
    lines = [line for line in (modes + fields).splitlines() if line.startswith("| ")]
    assert all(line.endswith(" |") for line in lines), "a row is one line"
    for each in experiments.names():
        assert f"## {each}\n\n{experiments.summary(each)}" in recipes


# The site


class Page(html.parser.HTMLParser):
    """What a page loads, what it links to, and its anchors."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Notes an element."""
        found = {key: value for key, value in attrs if value is not None}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and "href" in found:
            self.loads.append(found["href"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])


BUILD = """
import socket, sys
def refuse(*_):
    raise OSError("the site is built without a network")
socket.socket.connect = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    """The site, built as CI builds it."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--keep-going", "--nitpicky", "-q", "-c", "docs", "."]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *options, str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere_and_its_links_resolve(site):
    found = {path: Page(path) for path in site.rglob("*.html")}
    assert len(found) > len(PAGES)
    for path, page in found.items():
        for link in page.loads + page.links:
            where = f"{path.relative_to(site)}: {link}"
            parts = urllib.parse.urlsplit(link)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                assert link not in page.loads, where
                continue
            file = urllib.parse.unquote(parts.path)
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), where
            anchor = urllib.parse.unquote(parts.fragment)
            if anchor and target in found:
                assert anchor in found[target].anchors, where
    # Styles may load fonts and pictures.
    for path in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")]+)", path.read_text(encoding="utf-8"))
        assert all(url.startswith("data:") for url in urls), path


@pytest.mark.slow
def test_the_site_has_the_texts_of_the_program(site):
    def text(page: str) -> str:
        return re.sub(r"<[^>]+>", "", (site / page).read_text(encoding="utf-8"))

    assert "--config=finetune_file" in text("docs/command_line.html")
    assert "(default: 300)" in text("docs/command_line.html")
    assert "--num_processes and --process_id" in text("docs/command_line.html")
    assert "learning_rate=" in text("docs/fields.html")
    assert "Trains a model on labelled rows" in text("docs/api.html")
    assert "The linear model that is shown beside" in text("source/gptjax/evaluate/linear.py.html")
    assert "<!-- site:" not in (site / "docs" / "recipes.html").read_text(encoding="utf-8")
