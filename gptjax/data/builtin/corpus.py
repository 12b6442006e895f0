"""Every docstring of the Python standard library, by module, with the split it belongs to.

Sources are parsed, not imported; C modules, which have no source, are inspected. What is collected
is cached as Parquet under $GPTJAX_CACHE (default ~/.cache/gptjax). Splitting is by **unit**, a
module or a topic of the language reference, with a hash of its name: a docstring (and an equal one
elsewhere: only the first is kept) is in one of train, validation and test.
"""

from __future__ import annotations

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

from gptjax.data import cache
from gptjax.errors import UserError

SCHEMA_VERSION = 1  # part of the cache's name: raise it when `collect` gives something else
# Of two docstrings that begin with the same so many characters only the first is kept, and none
# that shares a paragraph this long with another module.
COMPARED_CHARACTERS = 400
SHARED_CHARACTERS = 60
_OPENING_SIGNATURE = re.compile(r"^[\w.]+\([^\n]*?\)[ \t]*(?:->[^\n]*|--|:|\n|$)\s*")

# `encodings` is a hundred times the same sentence; the others are tests, fixtures and build data.
_SKIP_FOLDERS = {
    *("__pycache__", "__phello__", "dist-packages", "encodings", "idle_test", "lib-dynload"),
    *("pydoc_data", "site-packages", "test", "tests"),
}
# Compiled modules that are quick and safe to import. Those a machine lacks are left out.
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
    """One docstring or topic. `unit` is what a split keeps together: a module or a topic."""

    package: str
    unit: str
    kind: str  # "module", "class", "function" or "topic"
    signature: str
    doc: str
    split: str = ""


def name_hash(text: str) -> bytes:
    """8 bytes that look random and are the same everywhere: the source of all orders and splits."""
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()


def plain(text: str) -> str:
    """`text` up to case and white space, for comparing."""
    return " ".join(text.casefold().split())


def without_signature(doc: str) -> str:
    """`doc` without a signature it opens with, such as "find(sub[, start]) -> int"."""
    return _OPENING_SIGNATURE.sub("", doc, count=1)


def read_entries() -> Sequence[Entry]:
    """All entries of this Python installation, from the cache where it can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stdlib = sysconfig.get_path("stdlib")
    version = ".".join(map(str, sys.version_info[:3]))
    name = f"builtin-v{SCHEMA_VERSION}-{sys.implementation.name}-{version}-"

    def write(file: BinaryIO) -> None:
        pq.write_table(pa.Table.from_pylist([each._asdict() for each in collect(stdlib)]), file)

    def read(path: str) -> list[Entry]:
        return [Entry(**row) for row in pq.ParquetFile(path).read().to_pylist()]

    found = cache.kept(name + name_hash(stdlib).hex(), ".parquet", write, read)
    return collect(stdlib) if found is None else found


@functools.lru_cache(maxsize=1)  # where the cache on disk cannot be written
def collect(stdlib: str) -> Sequence[Entry]:
    """Parses and inspects everything, keeps the first of equal docstrings, and splits by unit."""
    found: list[Entry] = []
    collecting = gc.isenabled()
    gc.disable()  # the parser makes millions of objects and no cycles: twice as fast
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes and deprecated modules are not our news
            for module, path in _sources(stdlib):
                found.extend(_parsed(module, path))
            for module in _C_MODULES:
                found.extend(_inspected(module))
            found.extend(_topics())
    finally:
        if collecting:
            gc.enable()
    entries = _without_repeats(found)
    if not any(entry.kind == "function" for entry in entries):
        raise UserError(f"{stdlib}: has no Python sources to read; give files to train on instead")
    splits = _assign(entries)
    return tuple(entry._replace(split=splits[entry.unit]) for entry in entries)


def _without_repeats(found: Sequence[Entry]) -> list[Entry]:
    """Without docstrings that say what came before: C modules and their Python twins, platforms."""
    seen: set[str] = set()
    owners: dict[str, str] = {}
    entries = []
    for entry in found:
        text = without_signature(entry.doc)
        key = plain(text)[:COMPARED_CHARACTERS]
        paragraphs = [plain(each) for each in re.split(r"\n\s*\n", text)]
        long = [each for each in paragraphs if len(each) >= SHARED_CHARACTERS]
        if key and key not in seen and all(owners.get(e, entry.unit) == entry.unit for e in long):
            seen.add(key)
            owners |= dict.fromkeys(long, entry.unit)
            entries.append(entry)
    return entries


def _assign(entries: Sequence[Entry]) -> dict[str, str]:
    """unit -> split: about 10% of the volume of each package for test and validation each.

    Packages of one or two modules are split as one pool. Units are taken in the order of a hash of
    their name, as long as they fit; a package of three modules has one in each split.
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
            # Nothing was small enough: take the nearest, so that no split is as good as empty.
            if used < 0.5 * budget and len(left) > others:
                off = {unit: abs(used + units[unit] - budget) for unit in left}
                _, nearest = min((distance, unit) for unit, distance in off.items())
                splits[nearest] = split
                left.remove(nearest)
    return splits


def _unit(module: str) -> str:
    """`_pydecimal`, `_decimal` and `decimal` describe the same things: one unit."""
    first, *rest = module.split(".")
    return ".".join([first.removeprefix("_py").removeprefix("_") or first, *rest])


def _sources(stdlib: str) -> Iterator[tuple[str, str]]:
    for folder, folders, files in os.walk(stdlib):
        folders[:] = sorted(each for each in folders if each not in _SKIP_FOLDERS)
        folders[:] = [each for each in folders if not each.startswith("config-")]
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = os.path.join(folder, file)
                name = os.path.relpath(path, stdlib)[: -len(".py")].replace(os.sep, ".")
                yield name.removesuffix(".__init__"), path


def _parsed(module: str, path: str) -> Iterator[Entry]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):  # a broken or deliberately odd file is no loss
        return
    unit = _unit(module)
    todo: list[tuple[Any, str]] = [(tree, "")]
    while todo:
        node, scope = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kind, signature = _signature(node, scope)
            doc = ast.get_docstring(node)
            if doc:
                yield Entry(unit.split(".")[0], unit, kind, signature or module, doc)
            if not isinstance(node, ast.Module):
                scope = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        inner = [each for field in ("body", "orelse") for each in getattr(node, field, ())]
        todo.extend((each, scope) for each in reversed(inner))


def _signature(node: Any, scope: str) -> tuple[str, str]:
    """(kind, signature): names only, as defaults and annotations would crowd out what is said."""
    if isinstance(node, ast.Module):
        return "module", ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return "class", f"class {node.name}({bases})" if bases else f"class {node.name}"
    args = node.args
    names = [each.arg for each in (*args.posonlyargs, *args.args)]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [each.arg for each in args.kwonlyargs]
    names += [f"**{args.kwarg.arg}"] if args.kwarg else []
    return "function", f"{scope}{node.name}({_names(names)})"


def _names(names: Sequence[str]) -> str:
    return ", ".join(name for name in names if name not in ("self", "cls"))


def _inspected(module: str) -> Iterator[Entry]:
    try:
        namespace = importlib.import_module(module)
    except Exception:  # left out of this build, or not working on this machine
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
        arguments = _names([stars.get(each.kind.name, "") + each.name for each in parameters])
    except Exception:  # none that machines can read, or a wrong one: take that of the docstring
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
