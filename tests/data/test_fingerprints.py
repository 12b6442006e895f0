"""Fingerprints: equal for equal contents, and computed once."""

import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import small

from gptjax.config.schema import OptimizerConfig, PretrainConfig, TokenizerConfig
from gptjax.data import fingerprints, splits
from gptjax.data.tables import texts as texts_lib
from gptjax.data.tables.texts import Texts, holdout_text
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.train import stages
from gptjax.train.context import Setup


def test_arrays():
    one = np.arange(12, dtype=np.int32)
    other = np.arange(24, dtype=np.int32)[::2] // 2
    assert fingerprints.of_arrays(one) == fingerprints.of_arrays(other.astype(np.int32))
    assert fingerprints.of_arrays(one) == fingerprints.of_arrays(one.astype(np.uint16))
    different = [
        (one,), (one.astype(np.int64),), (one.reshape(3, 4),), (one[::-1],), (one, one),
        (one[:-1],), (),
    ]  # fmt: skip
    assert len({fingerprints.of_arrays(*arrays) for arrays in different}) == len(different)
    assert fingerprints.of_arrays(one, None) == fingerprints.of_arrays(one)


def test_the_fingerprint_of_token_ids_is_that_of_earlier_versions():
    """Checkpoints hold it."""
    expected = "0f9003d9e45519bd37eb5fb9d4102daf"
    for dtype in (np.int32, np.uint16):
        assert fingerprints.of_arrays(np.arange(1000).astype(dtype)) == expected


def test_arrays_are_read_in_pieces(monkeypatch):
    array = np.arange(1000, dtype=np.uint16)
    whole = fingerprints.of_arrays(array)
    for rows in (1, 7, 1000, 4096):
        monkeypatch.setattr(fingerprints, "_ROWS_AT_ONCE", rows)
        assert fingerprints.of_arrays(array) == whole


ROWS = ["one\n", "", "two é\n", "x" * 1000, "half \ud800 of a pair"]


def test_texts():
    whole = fingerprints.of_texts(ROWS)
    assert fingerprints.of_texts(iter(ROWS)) == whole
    others = [
        ROWS[:-1], ROWS[::-1], [*ROWS, ""], ["".join(ROWS)], ["one", "\n", *ROWS[1:]],
        ["one\n", "two é\n", "", *ROWS[3:]], ["One\n", *ROWS[1:]],
    ]  # fmt: skip
    assert len({fingerprints.of_texts(other) for other in others} | {whole}) == len(others) + 1


def test_rows_have_the_fingerprint_of_their_texts_in_whatever_chunks():
    rows = ROWS[:-1]
    expected = fingerprints.of_texts(rows)
    assert Texts.of(rows).fingerprint == expected
    for cuts in ([1], [2, 2], [0, 3]):
        parts = np.split(np.arange(len(rows)), cuts)
        chunks = [pa.array([rows[i] for i in part], pa.string()) for part in parts]
        texts = Texts.of(pa.chunked_array(chunks))
        assert texts.fingerprint == expected
        assert list(texts) == list(texts) == rows


def test_the_parts_of_a_text_have_fingerprints_of_their_own():
    rows = [f"line {i}\n" for i in range(100)]
    one, same, other = Texts.of(rows), Texts.of(list(rows)), Texts.of([*rows[:-1], "line 9x\n"])
    parts = [
        part.fingerprint
        for texts, fraction in ((one, 0.1), (one, 0.2), (other, 0.1))
        for part in holdout_text(texts, fraction)
    ]
    assert len({*parts, one.fingerprint}) == 7
    assert [part.fingerprint for part in holdout_text(same, 0.1)] == parts[:2]


# How often the text is read for them.


@pytest.fixture
def hashed(monkeypatch):
    """The numbers of bytes that were hashed."""
    sizes: list[int] = []
    new_hash = fingerprints._new_hash

    class Counting:
        def __init__(self):
            self._hash = new_hash()

        def update(self, data):
            sizes.append(memoryview(data).nbytes)
            self._hash.update(data)

        def hexdigest(self):
            return self._hash.hexdigest()

    monkeypatch.setattr(fingerprints, "_new_hash", Counting)
    return sizes


def prepare(config: PretrainConfig, tables=None):
    """All that a pretraining does with its text before the first step."""
    texts = splits.text_splits(config, tables)
    train = texts["train"]
    tokenizer = tokenizer_lib.build(TokenizerConfig(vocab_size=200), train, train.fingerprint)
    model = small.config(vocab_size=len(tokenizer))
    return stages.pretrain(config, texts, Setup(model, tokenizer, small.mesh(), seed=0))


def test_a_text_is_hashed_once_before_the_first_step(tmp_path, monkeypatch, hashed):
    """And each file of the cache once, when it is opened."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    text = "".join(f"{text}\n" for text in small.texts(20_000))
    size = len(text.encode())
    (tmp_path / "a.txt").write_text(text)
    config = PretrainConfig(
        train_files=str(tmp_path / "a.txt"), line_breaks="keep", batch_size=4, steps=1, window=16,
        optimizer=OptimizerConfig(),
    )  # fmt: skip
    # Cached rows: the file, for its name in the cache; and the cached rows themselves.
    # Rows in memory: the rows.
    for worth, passes in ((0, 2), (1 << 30, 1)):
        monkeypatch.setattr(texts_lib, "_WORTH_CACHING", worth)
        cold = prepare(config)
        hashed.clear()
        warm = prepare(config)
        assert warm.fingerprint == cold.fingerprint
        tokens = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.bin"))
        assert tokens > 0.4 * size
        small_files = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.json"))
        own = passes * size + tokens + small_files
        assert own <= sum(hashed) < 1.1 * own
        shutil.rmtree(tmp_path / "cache")
    rows = {"train": datasets.Dataset.from_dict({"text": text.split("\n")})}
    prepare(config, rows)
    hashed.clear()
    prepare(config, rows)
    assert sum(hashed) < 2.2 * size
