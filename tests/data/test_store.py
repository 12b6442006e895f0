"""Token streams: the same ids from memory, from a new file and from the cache."""

import os
import subprocess
import sys

import numpy as np
import pytest
import small

from gptjax.config.schema import TaskSpec
from gptjax.data import fingerprints, loader, tasks
from gptjax.data.tables import texts as texts_lib
from gptjax.data.tables.labelled import LabelledTable
from gptjax.data.tokens import store
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import UserError

TEXTS = small.texts(11)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return small.small_tokenizer()


@pytest.fixture
def encoded(monkeypatch):
    """How many texts were tokenised."""
    counts = []
    original = tokenizer_lib.Tokenizer.encode_batch

    def encode_batch(self, texts):
        counts.append(len(texts))
        return original(self, texts)

    monkeypatch.setattr(tokenizer_lib.Tokenizer, "encode_batch", encode_batch)
    return counts


def is_mapped(array):
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = getattr(array, "base", None)
    return False


@pytest.mark.parametrize("fingerprint", ["", "f"])
def test_a_stream_joins_texts_in_order(tokenizer, place, fingerprint, monkeypatch):
    monkeypatch.setattr(store, "_TEXTS_AT_ONCE", 4)
    for count in (0, 1, 4, 5, 11):
        texts = small.texts(count)
        expected = [i for text in texts for i in tokenizer.encode(text)]
        for _ in range(2):
            name = fingerprint and fingerprint + str(count)
            stream = store.token_stream(iter(texts), tokenizer, name)
            assert stream.tolist() == expected
            assert stream.dtype == np.uint16
            assert is_mapped(stream) == bool(fingerprint and count)
            assert type(stream) is np.ndarray


def test_a_large_vocabulary_takes_four_bytes(place):
    ids = {"<unk>": 0} | {f"w{i}": i + 1 for i in range(70_000)}
    backend = tokenizer_lib.tokenizers.Tokenizer(
        tokenizer_lib.models.WordLevel(ids, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizer_lib.pre_tokenizers.Whitespace()
    large = tokenizer_lib._add_specials(backend)
    for content in ("", "c", "c"):
        stream = store.token_stream(["w69999 w3", "w65535"], large, content)
        assert (stream.dtype, stream.tolist()) == (np.int32, [70_000, 4, 65_536])


def test_tokenised_once_for_each_text_and_tokenizer(tokenizer, place, encoded, monkeypatch):
    def made(texts, by=tokenizer):
        encoded.clear()
        stream = store.token_stream(texts, by, fingerprints.of_texts(texts))
        assert stream.tolist() == [i for text in texts for i in by.encode_batch([text])[0]]
        return len(encoded) > len(texts)

    assert made(TEXTS)
    assert not made(list(TEXTS))
    assert made([*TEXTS[:-1], TEXTS[-1] + "x"])
    assert made([TEXTS[0] + TEXTS[1], *TEXTS[2:]])  # the same characters, other rows
    assert not made(TEXTS, tokenizer_lib.from_json(tokenizer.to_json()))
    # The same vocabulary, other words.
    changed = tokenizer.to_json().replace("\\u2014", "\\u2015").replace('"\u2014"', '"\u2016"')
    assert made(TEXTS, tokenizer_lib.from_json(changed))
    monkeypatch.setattr(store, "_VERSION", -1)
    assert made(TEXTS)


def test_a_library_decides_ids_too(tokenizer, place, encoded, monkeypatch):
    store.token_stream(TEXTS, tokenizer, "c")
    monkeypatch.setattr(store.importlib.metadata, "version", lambda name: "other")
    encoded.clear()
    store.token_stream(TEXTS, tokenizer, "c")
    assert encoded


@pytest.mark.parametrize("where", ["first", "last", "end"])
def test_a_damaged_file_is_tokenised_again(tokenizer, place, encoded, where):
    first = store.token_stream(TEXTS, tokenizer, "c").tolist()
    (path,) = place.iterdir()
    data = bytearray(path.read_bytes())
    if where == "end":
        del data[-2:]
    else:
        data[{"first": 0, "last": -3}[where]] ^= 1
    path.write_bytes(data)
    encoded.clear()
    assert store.token_stream(TEXTS, tokenizer, "c").tolist() == first
    assert encoded


def test_a_full_disk_halfway_is_memory(tokenizer, place, monkeypatch, caplog):
    open_file = open

    class Full:
        """A file on a disk that has room for 40 bytes."""

        def __init__(self, path, mode):
            self._file, self._room = open_file(path, mode), 40

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._file.close()

        def write(self, data):
            self._room -= memoryview(data).nbytes
            if self._room < 0:
                raise OSError(28, "No space left on device")
            self._file.write(data)

    monkeypatch.setattr(store.cache, "open", Full, raising=False)
    stream = store.token_stream(TEXTS, tokenizer, "c")
    assert list(place.iterdir()) == []
    assert stream.tolist() == [i for text in TEXTS for i in tokenizer.encode(text)]
    assert not is_mapped(stream)
    assert len(caplog.records) == 1


def test_batches_are_the_same_with_and_without_the_cache(tokenizer, place):
    texts = small.texts(80)
    held = store.token_stream(texts, tokenizer)
    for _ in range(2):
        kept = store.token_stream(texts, tokenizer, "c")
        assert is_mapped(kept)
        for stream in (held, held.astype(np.int32)):
            ours, theirs = (
                [
                    *loader.TextBatches(each, 16, 4, seed=3).iterate(2, 30),
                    *loader.text_in_order(each, 16, 4),
                ]
                for each in (kept, stream)
            )
            for one, other in zip(ours, theirs, strict=True):
                for name in ("tokens", "segment_ids", "positions", "lm_weights"):
                    a, b = getattr(one, name), getattr(other, name)
                    assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())


def test_statistics_are_those_of_all_tokens(tokenizer, monkeypatch):
    stream = np.random.default_rng(0).integers(0, 5, 1000).astype(np.uint16)
    stream[::9] = tokenizer.unknown_id
    for size in (1, 7, 1000, 4096):
        monkeypatch.setattr(store, "_TOKENS_AT_ONCE", size)
        found = store.statistics(stream, tokenizer)
        assert found.unknown == (stream == tokenizer.unknown_id).sum()
        assert found.fingerprint == fingerprints.of_arrays(stream)
    assert store.statistics(stream[:0], tokenizer).unknown == 0


def test_statistics_are_kept_for_each_text_and_tokenizer(tokenizer, place):
    stream = np.arange(50, dtype=np.uint16)
    first = store.statistics(stream, tokenizer, "a")
    assert store.statistics(stream[:9], tokenizer, "a") == first  # from the cache
    assert store.statistics(stream[:9], tokenizer, "b") != first
    (path, _) = sorted(place.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    path.write_bytes(path.read_bytes()[:-1])
    assert store.statistics(stream, tokenizer, "a") == first


# Columns of labelled rows.

ODD = ["", "_start_ <pad> </w>", "<pad>", "a\ud800b", "", "the cat sat", " ", "\n", ""]


@pytest.mark.parametrize("texts", [ODD, [""], ["", ""], small.texts(40)])
def test_kept_columns_are_those_of_the_tokenizer(tokenizer, place, texts, monkeypatch, encoded):
    monkeypatch.setattr(store, "_WORTH_CACHING", 0)
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    for found in (store.encode_texts(texts, tokenizer) for _ in range(2)):
        assert [ids.tolist() for ids in found] == expected
    assert len(encoded) == 2
    assert len(list(place.iterdir())) == 1


def test_columns_differ_by_where_texts_end(tokenizer, place, monkeypatch):
    monkeypatch.setattr(store, "_WORTH_CACHING", 0)
    for texts in (["the cat", "sat"], ["the", "cat sat"], ["the cat sat"], ["1:a"], ["", "1:a"]):
        found = store.encode_texts(texts, tokenizer)
        assert [i.tolist() for i in found] == [tokenizer.encode(text) for text in texts]
    assert len(list(place.iterdir())) == 5


def test_little_text_is_not_kept(tokenizer, place):
    store.encode_texts(TEXTS, tokenizer)
    assert not place.exists()


def test_examples_are_the_same_with_and_without_the_cache(tokenizer, place, monkeypatch):
    monkeypatch.setattr(store, "_WORTH_CACHING", 0)
    rows = {"text": small.texts(30), "pair": small.texts(30, 1), "label": list("ab") * 15}
    table = LabelledTable(rows, "rows")
    spec = tasks.find_labels(TaskSpec("similarity", "text", "pair"), table)
    plain = tasks.encode(spec, table, tokenizer, 16)
    assert not place.exists()
    for _ in range(2):
        kept = tasks.encode(spec, table, tokenizer, 16, use_cache=True)
        for one, other in zip(kept.tokens, plain.tokens, strict=True):
            assert (one.dtype, one.tolist()) == (other.dtype, other.tolist())
        assert (kept.second_start == plain.second_start).all()
        assert (kept.cut, kept.empty) == (plain.cut, plain.empty)


# Rows of text files.


def rows_of(path, monkeypatch, worth=0, **kwargs):
    monkeypatch.setattr(texts_lib, "_WORTH_CACHING", worth)
    return list(texts_lib.read_text(str(path), **kwargs))


def test_rows_are_kept_by_content(tmp_path, place, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("One line\nthat goes\n\non.\n" * 50)
    expected = rows_of(path, monkeypatch, worth=1 << 30)
    assert not place.exists()
    assert rows_of(path, monkeypatch) == expected
    (entry,) = place.iterdir()
    path.rename(tmp_path / "b.txt")
    assert rows_of(tmp_path / "b.txt", monkeypatch) == expected
    assert list(place.iterdir()) == [entry]
    # An edit that leaves size and time as they were.
    stamp = (tmp_path / "b.txt").stat()
    (tmp_path / "b.txt").write_text("Two line\nthat goes\n\non.\n" * 50)
    os.utime(tmp_path / "b.txt", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert rows_of(tmp_path / "b.txt", monkeypatch)[0].startswith("Two")
    joined = rows_of(tmp_path / "b.txt", monkeypatch, line_breaks="join")
    assert joined[0].startswith("Two line that goes\n")
    assert len(list(place.iterdir())) == 3


def test_a_mistake_in_a_text_is_not_kept(tmp_path, place, monkeypatch):
    for data, words in ((b"\n \n", "no text"), (b"one\n\xff\n", "line 2")):
        (tmp_path / "t.txt").write_bytes(data)
        with pytest.raises(UserError, match=words):
            rows_of(tmp_path / "t.txt", monkeypatch)
        assert list(place.iterdir()) == []


def test_a_text_that_changes_while_it_is_read_is_not_kept(tmp_path, place, monkeypatch, caplog):
    path = tmp_path / "t.txt"
    path.write_text("one\n")
    digests = iter(["before", "after"])
    monkeypatch.setattr(texts_lib.fingerprints, "of_file", lambda path: next(digests))
    assert rows_of(path, monkeypatch) == ["one\n"]
    assert list(place.iterdir()) == []
    assert "has changed" in caplog.text


_LARGE = """
import sys
from gptjax.data.tables import texts as texts_lib
from gptjax.data.tokens import store, tokenizer
import pyarrow as pa
own = tokenizer.load(sys.argv[2])
texts_lib._WORTH_CACHING = 1 << 20
texts = texts_lib.read_text(sys.argv[1], 'keep')
train, _ = texts_lib.holdout_text(texts, 0.1)
allocated = pa.total_allocated_bytes() / 2**20
stream = store.token_stream(train, own, train.fingerprint)
statistics = store.statistics(stream, own, train.fingerprint)
print(len(stream), statistics.fingerprint, statistics.unknown, allocated)
"""


@pytest.mark.slow
def test_a_corpus_is_not_held_in_memory(tmp_path, place):
    """With the cache Arrow holds none of its 8 MiB of text, and the ids are the same."""
    line = "the cat sat on a mat while some dogs ran far away " * 20 + "\n"
    path = tmp_path / "large.txt"
    with open(path, "w") as file:
        for i in range(2**23 // len(line)):
            file.write(f"{i} {line}")
    small.small_tokenizer().save(tmp_path / "t.json")

    def run(folder):
        done = subprocess.run(
            [sys.executable, "-c", _LARGE, str(path), str(tmp_path / "t.json")],
            capture_output=True, text=True, check=True, env=os.environ | {"GPTJAX_CACHE": folder},
        )  # fmt: skip
        length, digest, unknown, allocated = done.stdout.split()
        return (length, digest, unknown), float(allocated)

    kept, allocated = run(str(tmp_path / "cache"))
    again, allocated_again = run(str(tmp_path / "cache"))
    held, allocated_held = run("")
    assert kept == again == held
    assert allocated_held > 7
    assert max(allocated, allocated_again) < 1
