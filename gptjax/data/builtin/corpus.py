"""The docstrings of the Python standard library, divided into train, validation and test.

Python sources are parsed, not imported. C modules, which have no Python source, are imported and
inspected. The collection is kept in the cache as a Parquet file. A **unit** is a module, or a topic
of the language reference. All docstrings of a unit are in the same split. If several docstrings are
equal, only the first is kept, so no docstring is in two splits.
"""

import ast
import functools
import gc
import hashlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from gptjax.data import cache
from gptjax.errors import UserError

# A part of the name in the cache. To be increased when `collect` returns other entries.
SCHEMA_VERSION = 2
# A docstring is left out if an earlier docstring has the same first 400 characters.
COMPARED_CHARACTERS = 400
# A docstring is also left out if it shares a paragraph of at least 60 characters with an earlier
# docstring of another unit (a module, or a topic of the language reference).
SHARED_CHARACTERS = 60
_OPENING_SIGNATURE = re.compile(r"^[\w.]+\([^\n]*?\)[ \t]*(?:->[^\n]*|--|:|\n|$)\s*")

# Folders that are not read. `encodings` repeats one sentence a hundred times. The other folders
# contain tests, test data, build data and packages that are not in the standard library.
_SKIP_FOLDERS = {
    *("__pycache__", "__phello__", "dist-packages", "encodings", "idle_test", "lib-dynload"),
    *("pydoc_data", "site-packages", "test", "tests"),
}
# C modules that are quick and safe to import. A module that does not exist on this machine is
# skipped.
_C_MODULES = (
    *("_asyncio", "_bisect", "_codecs", "_collections", "_csv", "_ctypes", "_datetime", "_decimal"),
    *("_elementtree", "_functools", "_hashlib", "_heapq", "_io", "_json", "_locale", "_lzma"),
    *("_operator", "_pickle", "_posixsubprocess", "_queue", "_random", "_socket", "_sqlite3"),
    *("_sre", "_ssl", "_stat", "_statistics", "_string", "_struct", "_symtable", "_thread"),
    *("_tracemalloc", "_warnings", "_weakref", "_zoneinfo", "array", "atexit", "binascii"),
    *("builtins", "cmath", "errno", "faulthandler", "fcntl", "gc", "grp", "itertools", "marshal"),
    *("math", "mmap", "posix", "pwd", "pyexpat", "resource", "select", "signal", "sys", "syslog"),
    *("termios", "time", "unicodedata", "zlib"),
)


class Entry(NamedTuple):
    """A docstring, or a topic of the language reference."""

    package: str
    unit: str  # a module or a topic. All entries of a unit are in one split
    subject: str  # "module", "class", "function" or "topic"
    signature: str
    doc: str
    split: str = ""


def name_hash(text: str) -> bytes:
    """Returns a hash of 8 bytes, equal on all machines. It decides orders and splits."""
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()


def plain(text: str) -> str:
    """Returns a text for comparisons, in lower case and with single spaces."""
    return " ".join(text.casefold().split())


def without_signature(doc: str) -> str:
    """Returns `doc` without a signature at its start, such as "find(sub[, start]) -> int"."""
    return _OPENING_SIGNATURE.sub("", doc, count=1)


def read_entries() -> Sequence[Entry]:
    """Returns all entries of this Python installation, from the cache if it has them."""
    import pyarrow.parquet as pq

    stdlib = sysconfig.get_path("stdlib")
    version = ".".join(map(str, sys.version_info[:3]))
    name = f"builtin-v{SCHEMA_VERSION}-{sys.implementation.name}-{version}-"

    def write(file: BinaryIO) -> None:
        pq.write_table(pa.Table.from_pylist([entry._asdict() for entry in collect(stdlib)]), file)

    def read(path: str) -> list[Entry]:
        return [Entry(**row) for row in pq.ParquetFile(path).read().to_pylist()]

    make = functools.partial(collect, stdlib)
    return cache.get_or_make(name + name_hash(stdlib).hex(), ".parquet", write, read, make)


@functools.lru_cache(maxsize=1)  # for processes that cannot write the cache on disk
def collect(stdlib: str) -> Sequence[Entry]:
    """Reads the docstrings of all modules, without repeated docstrings, and assigns their splits.

    Args:
      stdlib: the folder of the standard library.
    """
    docstrings: list[Entry] = []
    gc_was_enabled = gc.isenabled()
    gc.disable()  # this halves the time, because the parser makes millions of objects, no cycles
    try:
        # The standard library itself has invalid escape sequences and deprecated modules. Their
        # warnings are ignored.
        with warnings.catch_warnings(action="ignore"):
            for module, path in _sources(stdlib):
                docstrings.extend(_parsed(module, path))
            for module in _C_MODULES:
                docstrings.extend(_inspected(module))
            docstrings.extend(_topics())
    finally:
        if gc_was_enabled:
            gc.enable()
    entries = _without_repeats(docstrings)
    if not any(entry.subject == "function" for entry in entries):
        raise UserError(f"{stdlib}: has no Python sources to read; give files to train on instead")
    splits = _assign(entries)
    return tuple(entry._replace(split=splits[entry.unit]) for entry in entries)


def _without_repeats(docstrings: Sequence[Entry]) -> list[Entry]:
    """Returns the docstrings that do not repeat an earlier docstring.

    Repeats are common. For example, many C modules have a Python version with the same docstrings.
    """
    seen: set[str] = set()
    owners: dict[str, str] = {}
    entries = []
    for entry in docstrings:
        text = without_signature(entry.doc)
        key = plain(text)[:COMPARED_CHARACTERS]
        paragraphs = [plain(paragraph) for paragraph in re.split(r"\n\s*\n", text)]
        long = [paragraph for paragraph in paragraphs if len(paragraph) >= SHARED_CHARACTERS]
        own = all(owners.get(paragraph, entry.unit) == entry.unit for paragraph in long)
        if key and key not in seen and own:
            seen.add(key)
            owners |= dict.fromkeys(long, entry.unit)
            entries.append(entry)
    return entries


def _assign(entries: Sequence[Entry]) -> dict[str, str]:
    """Returns the split of each unit.

    Test and validation each get about 10% of every package, counted in characters. Packages of one
    or two units are treated as one package together. In each package the units are tried in the
    order of a hash of their name, first for test and then for validation. A unit is taken if the
    split has too little text without it, and not too much with it. The other units are for
    training. If the split still has less
    than half of its text, the unit with the best size is taken too. A package of three or more
    units has at least one unit in each split.
    """
    volumes: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        volumes[entry.package][entry.unit] += len(entry.doc)
    pool = Counter[str]()
    for package in [name for name, units in volumes.items() if len(units) < 3]:
        pool.update(volumes.pop(package))
    splits = dict.fromkeys((entry.unit for entry in entries), "train")
    for units in [*volumes.values(), pool]:
        left = sorted(units, key=name_hash)
        for split, others in (("test", 2), ("validation", 1)):
            budget = 0.1 * units.total()
            used = 0
            for unit in list(left):
                fits = used < 0.85 * budget and used + units[unit] <= 1.3 * budget
                if fits and len(left) > others:
                    used += units[unit]
                    splits[unit] = split
                    left.remove(unit)
            # Most units were too large. The unit with the best size is taken so that the split is
            # not empty.
            if used < 0.5 * budget and len(left) > others:
                _, best = min((abs(used + units[unit] - budget), unit) for unit in left)
                splits[best] = split
                left.remove(best)
    return splits


def _unit(module: str) -> str:
    """Returns the unit of a module. `_pydecimal`, `_decimal` and `decimal` are the same unit."""
    first, *rest = module.split(".")
    return ".".join([first.removeprefix("_py").removeprefix("_") or first, *rest])


def _sources(stdlib: str) -> Iterator[tuple[str, str]]:
    """Yields (name of the module, path) for every Python file."""
    for folder, folders, files in os.walk(stdlib):
        folders[:] = sorted(name for name in folders if name not in _SKIP_FOLDERS)
        folders[:] = [name for name in folders if not name.startswith("config-")]
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = os.path.join(folder, file)
                name = os.path.relpath(path, stdlib)[: -len(".py")].replace(os.sep, ".")
                yield name.removesuffix(".__init__"), path


def _parsed(module: str, path: str) -> Iterator[Entry]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):  # the library has files that are invalid on purpose
        return
    unit = _unit(module)
    todo: list[tuple[Any, str]] = [(tree, "")]
    while todo:
        node, scope = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            subject, signature = _signature(node, scope)
            doc = ast.get_docstring(node)
            if doc:
                yield Entry(unit.split(".")[0], unit, subject, signature or module, doc)
            if not isinstance(node, ast.Module):
                scope = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        inner = [child for field in ("body", "orelse") for child in getattr(node, field, ())]
        todo.extend((child, scope) for child in reversed(inner))


def _signature(node: Any, scope: str) -> tuple[str, str]:
    """Returns (subject, signature) of a syntax node.

    The signature of a function contains only the names of its arguments. Defaults and annotations
    are left out, because they would fill the model's context.

    Args:
      node: a module, a class or a function.
      scope: the text before the name of a function, for example "Path.".
    """
    if isinstance(node, ast.Module):
        return "module", ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return "class", f"class {node.name}({bases})" if bases else f"class {node.name}"
    args = node.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    names += [f"**{args.kwarg.arg}"] if args.kwarg else []
    return "function", f"{scope}{node.name}({_names(names)})"


def _names(names: Sequence[str]) -> str:
    return ", ".join(name for name in names if name not in ("self", "cls"))


def _inspected(module: str) -> Iterator[Entry]:
    try:
        namespace = importlib.import_module(module)
    except Exception:  # this build of Python lacks the module, or it does not work on this machine
        return
    unit = _unit(module)
    if namespace.__doc__:
        yield Entry(unit, unit, "module", module, inspect.cleandoc(namespace.__doc__))
    for name, value in sorted(vars(namespace).items()):
        if inspect.isclass(value):
            yield Entry(unit, unit, "class", f"class {name}", inspect.getdoc(value) or "")
            for inner, method in sorted(vars(value).items()):
                if not inner.startswith("__") and callable(method):
                    yield _c_function(unit, f"{name}.{inner}", method)
        elif inspect.isbuiltin(value):
            yield _c_function(unit, name, value)


def _c_function(unit: str, name: str, function: Any) -> Entry:
    try:
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
        parameters = inspect.signature(function).parameters.values()
        arguments = _names([stars.get(p.kind.name, "") + p.name for p in parameters])
    except Exception:  # Python knows no signature, so the signature in the docstring is used
        opening = re.match(r"[\w.]+\(([^\n]*?)\)", function.__doc__ or "")
        arguments = opening[1] if opening else "..."
    doc = inspect.cleandoc(function.__doc__ or "")
    return Entry(unit, unit, "function", f"{name}({arguments})", doc)


def _topics() -> Iterator[Entry]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield Entry("topics", f"topic {name}", "topic", "", inspect.cleandoc(text))
