"""The built-in data: the same everywhere, split by module, no leak between splits, no shortcut."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from gptjax.data import fingerprints
from gptjax.data.builtin import corpus as corpus_lib
from gptjax.data.builtin.corpus import read_entries
from gptjax.data.builtin.tasks import SPLITS, TASKS, builtin_task, builtin_text
from gptjax.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for this file, filled by its first test, so that a user's own is never touched."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GPTJAX_CACHE", str(folder))
        corpus_lib.collect.cache_clear()
        yield folder


def plain(text):
    return " ".join(text.casefold().split())


def texts_of(dataset):
    columns = [name for name in dataset.column_names if name != "label"]
    return {plain(text) for name in columns for text in dataset[name]}


def corpus(split):
    return "".join(builtin_text(split))


def test_collects_what_ast_finds_and_inspects_c_modules():
    entries = read_entries()
    assert len(entries) > 6000
    assert sum(len(entry.doc) for entry in entries) > 1_500_000
    assert len({entry.unit for entry in entries}) > 300
    docs = {plain(entry.doc)[:400] for entry in entries}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("textwrap.py", "configparser.py", "email/message.py"):
            path = Path(sysconfig.get_path("stdlib"), name)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    assert plain(ast.get_docstring(node) or "")[:400] in docs | {""}
    signatures = {entry.signature: entry for entry in entries}
    assert signatures["TextWrapper.fill(text)"].unit == "textwrap"
    assert signatures["gcd(*integers)"].unit == "math"
    assert signatures["class TextWrapper"].subject == "class"


def test_every_module_is_in_one_split_and_every_docstring_in_one_module():
    entries = read_entries()
    assert max(Counter(plain(entry.doc)[:400] for entry in entries).values()) == 1
    splits = {(entry.unit, entry.split) for entry in entries}
    assert len(splits) == len({entry.unit for entry in entries})
    # The pure Python twin of a C module says the same in almost the same words.
    units = {entry.unit for entry in entries}
    assert not {"_pydecimal", "_pyio", "_collections_abc", "_io"} & units
    volume = Counter()
    for entry in entries:
        volume[entry.split] += len(entry.doc)
    assert set(volume) == set(SPLITS)
    for split in ("validation", "test"):
        assert 0.06 < volume[split] / volume.total() < 0.16


def test_running_text_is_english_of_its_own_modules_only():
    text = {split: corpus(split) for split in SPLITS}
    assert len(text["train"]) > 1_500_000
    words = Counter(re.findall(r"[a-z]+", text["train"].lower()))
    assert {"the", "a", "of", "to", "is"} <= {word for word, _ in words.most_common(10)}
    flat = {split: plain(each) for split, each in text.items()}
    for entry in read_entries():
        paragraph = plain(entry.doc.split("\n\n")[0])
        if len(paragraph.split()) > 25 and re.fullmatch(r"[\w ,.'\"()]+", paragraph):
            assert paragraph in flat[entry.split]
            for other in set(SPLITS) - {entry.split}:
                assert paragraph not in flat[other], (entry.unit, other)
    for each in list(builtin_text("train"))[:-1]:
        assert each.endswith("\n")
        assert len(each) <= 1 << 16
    assert "\n\n\n" not in text["train"]


@pytest.mark.parametrize("task", TASKS)
def test_no_text_of_a_task_is_in_two_splits(task):
    train, validation, test = (texts_of(builtin_task(task, split)) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("task", ["classification", "similarity", "entailment", "word_order"])
def test_texts_of_test_are_not_in_the_pretraining_text(task):
    train = plain(corpus("train"))
    column = "text" if task in ("classification", "word_order") else "text_pair"
    rows = builtin_task(task, "test")
    if task == "word_order":
        rows = rows.filter(lambda row: row["label"] == "original", keep_in_memory=True)
    limit = 60 if task == "word_order" else 120
    long = [plain(text) for text in rows[column] if len(text) > limit]
    assert len(long) > 50
    # A few sentences of the licence kind are repeated from module to module inside longer texts.
    assert sum(text in train for text in long) <= 0.01 * len(long)


def test_classification_has_every_class_in_every_split():
    rows = {split: Counter(builtin_task("classification", split)["label"]) for split in SPLITS}
    assert 6 <= len(rows["train"]) <= 10
    assert rows["train"].total() > 1500
    for counts in rows.values():
        assert set(counts) == set(rows["train"])
        assert min(counts.values()) >= 5
        assert max(counts.values()) < 0.4 * counts.total()


@pytest.mark.parametrize("split", SPLITS)
def test_shuffled_sentences_have_the_words_of_a_docstring(split):
    docs = [entry for entry in read_entries() if entry.split == split]
    by_words = defaultdict(set)  # the sorted words of a sentence -> its orders
    for entry in docs:
        for sentence in re.split(r"(?<=[.!?:;])\s+", " ".join(entry.doc.split())):
            sentence = sentence.rstrip(" .!?:;")
            by_words[tuple(sorted(sentence.split()))].add(sentence)
    rows = builtin_task("word_order", split)
    assert len(rows) > 500
    counts = Counter(rows["label"])
    assert abs(counts["original"] - counts["shuffled"]) <= 1
    assert len({tuple(sorted(plain(text).split())) for text in rows["text"]}) > 0.99 * len(rows)
    found = 0
    for row in rows:
        words = row["text"].split()
        orders = by_words.get(tuple(sorted(words)), ())
        found += bool(orders)
        assert not orders or (row["text"] in orders) == (row["label"] == "original"), row
    # Other sentences have a bracket or a quotation mark after the full stop.
    assert found > 0.8 * len(rows)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["entailment", "similarity"])
def test_pairs_are_balanced_for_each_text(task, split):
    rows = builtin_task(task, split)
    assert len(rows) > 500
    for column in ("text", "text_pair"):
        positive = Counter(row[column] for row in rows if row["label"] == 1)
        negative = Counter(row[column] for row in rows if row["label"] == 0)
        assert positive == negative
        assert set(positive.values()) == {1}
    lengths = [sorted(len(row["text_pair"]) for row in rows if row["label"] == k) for k in (0, 1)]
    assert lengths[0] == lengths[1]
    assert all(20 <= len(text) <= 400 for text in rows["text_pair"])


@pytest.mark.parametrize("split", SPLITS)
def test_choices_are_right_once_and_wrong_three_times(split):
    rows = builtin_task("multiple_choice", split)
    assert len(rows) > 500
    choices = [f"choice{number}" for number in (1, 2, 3, 4)]
    right = Counter(row[choices[row["label"]]] for row in rows)
    offered = Counter(row[name] for row in rows for name in choices)
    assert set(right.values()) == {1}
    assert set(offered.values()) == {4}
    assert set(Counter(rows["label"]).values()) == {len(rows) // 4}
    # The right docstring is that of the signature, as ast sees it.
    docs = defaultdict(list)
    for entry in read_entries():
        docs[entry.signature].append(plain(entry.doc))
    for row in rows.select(range(200)):
        end = plain(row[choices[row["label"]]])[-20:]
        assert any(end in doc for doc in docs[row["text"]]), row


@pytest.mark.parametrize("split", SPLITS)
def test_parts_are_those_of_one_docstring(split):
    docs = "\0".join(plain(entry.doc) for entry in read_entries() if entry.split == split)
    rows = builtin_task("similarity", split)
    rows = rows.filter(lambda row: len(row["text"]) > 60, keep_in_memory=True)
    for row in rows.select(range(60)):
        joined = plain(f"{row['text']} {row['text_pair']}")
        assert (joined in docs) == bool(row["label"])


def test_words_in_common_tell_more_than_chance_but_not_all():
    def words(text):
        return set(re.findall(r"[a-z]{3,}", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower()))

    rows = builtin_task("multiple_choice", "test")
    right = 0
    for row in rows:
        shared = [len(words(row["text"]) & words(row[f"choice{k}"])) for k in (1, 2, 3, 4)]
        right += shared.index(max(shared)) == row["label"]
    assert 0.5 < right / len(rows) < 0.95


@pytest.mark.slow
def test_the_same_in_another_process_and_without_a_cache(cache, tmp_path):
    code = (
        "from gptjax.data.builtin.tasks import *;"
        "from gptjax.data import fingerprints;"
        "rows = [map(repr, builtin_task(name, 'test')) for name in TASKS];"
        "print(*map(fingerprints.of_texts, rows), builtin_text('test').fingerprint)"
    )
    unwritable = tmp_path / "file"
    unwritable.write_text("a file where the folder should be")
    environment = os.environ | {"PYTHONHASHSEED": "99", "GPTJAX_CACHE": str(unwritable)}
    run = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    rows = [map(repr, builtin_task(task, "test")) for task in TASKS]
    here = [*map(fingerprints.of_texts, rows), builtin_text("test").fingerprint]
    assert out.stdout.split() == here
    (warning,) = out.stderr.splitlines()
    assert f"{unwritable}/data: cannot write the cache there" in warning


def test_cache_is_used_and_a_broken_one_is_rebuilt(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "new"))
    calls = []
    entry = corpus_lib.Entry("p", "u", "function", "f()", "Says it.", "train")
    monkeypatch.setattr(corpus_lib, "collect", lambda stdlib: calls.append(stdlib) or [entry])
    assert read_entries() == read_entries() == [entry]
    assert len(calls) == 1
    (path,) = (tmp_path / "new" / "data").iterdir()
    whole = path.read_bytes()
    # It reads as well with one letter changed.
    other = whole.replace(b"Says it.", b"Says at.")
    assert other != whole
    for broken in (b"", b"PAR1", whole[:-20], whole[20:], other):
        path.write_bytes(broken)
        assert read_entries() == [entry]
    assert len(calls) == 6
    assert read_entries() == [entry]
    assert len(calls) == 6
    monkeypatch.setattr(corpus_lib, "SCHEMA_VERSION", -1)
    read_entries()
    assert len(calls) == 7
    assert sorted(each.suffix for each in path.parent.iterdir()) == [".parquet"] * 2


def test_works_on_a_small_library_and_says_so_on_none(tmp_path):
    for package in ("alpha", "beta"):
        for module in ("one", "two", "three"):
            (tmp_path / package).mkdir(exist_ok=True)
            code = f'"""Module {module} of {package}."""\n'
            code += f'def f(a, *b, c=1, **d):\n    "Text of {module} in {package}."'
            (tmp_path / package / f"{module}.py").write_text(code)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "x.py").write_text('"""A test."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    entries = corpus_lib.collect(str(tmp_path))
    own = [entry for entry in entries if entry.package in ("alpha", "beta")]
    assert len(own) == 12
    assert {entry.signature for entry in own if entry.subject == "function"} == {"f(a, *b, c, **d)"}
    for package in ("alpha", "beta"):
        assert {entry.split for entry in own if entry.package == package} == set(SPLITS)
    assert not any(entry.unit in ("tests.x", "broken", "latin") for entry in entries)


def test_wrong_names_are_answered():
    with pytest.raises(UserError, match="train, validation, test"):
        builtin_text("dev")
    with pytest.raises(UserError, match="classification, entailment"):
        builtin_task("sentiment", "train")
    with pytest.raises(UserError, match="train, validation, test"):
        builtin_task("similarity", "dev")
