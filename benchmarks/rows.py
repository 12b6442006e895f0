"""Labelled rows for the benchmarks: from a file, or synthetic ones with the lengths of MRPC."""

import csv
import pathlib
from typing import Any

import numpy as np
from absl import flags

from benchmarks.harness import FLAGS
from gptjax.config.schema import FinetuneConfig
from gptjax.data import splits
from gptjax.data.tables.labelled import as_text
from gptjax.data.tokens import tokenizer
from gptjax.data.tokens.tokenizer import SPECIALS, Tokenizer
from gptjax.errors import require

flags.DEFINE_string("text", "text", "Column of the file with the text.", flag_values=FLAGS)
flags.DEFINE_integer(
    "rows", 0, "Rows at most, the first ones; 0: all (of synthetic ones, 4,076).", flag_values=FLAGS
)
flags.DEFINE_string(
    "vocab_file",
    "",
    "GPT-1's encoder_bpe_40000.json; without it a BPE is trained.",
    flag_values=FLAGS,
)
flags.DEFINE_string("merges_file", "", "GPT-1's vocab_40000.bpe.", flag_values=FLAGS)

# MRPC has 4,076 rows and sentences of 22 +- 5 words. Two of three pairs are paraphrases.
_COUNT, _WORDS, _SPREAD, _SHORTEST, _LONGEST = 4076, 22, 5, 7, 36
_POSITIVE = 0.67
Rows = list[dict[str, str]]


def load(path: str, text: str, text_pair: str, label: str, limit: int) -> Rows:
    """Returns the rows of a file as text, text_pair (where there is one) and label.

    Args:
      path: a CSV, TSV, JSON lines or Parquet file; "" means synthetic rows.
      text, text_pair, label: names of the columns; each of the last two may be empty.
      limit: the largest number of rows; 0 means all.
    """
    require(limit >= 0, f"--rows={limit}: must not be negative")
    if not path:
        return synthetic(limit or _COUNT, bool(text_pair))
    wanted = {"text": text, "text_pair": text_pair, "label": label}
    wanted = {name: column for name, column in wanted.items() if column}
    table = splits.read_labelled(path, "", tuple(wanted.values()))
    values = table.columns(tuple(wanted.values()))
    count = len(table.rows) if not limit else min(limit, len(table.rows))
    require(count, f"{path}: no rows")
    return [
        {name: as_text(values[column][i]) for name, column in wanted.items()} for i in range(count)
    ]


def synthetic(count: int, pairs: bool, seed: int = 0) -> Rows:
    """Returns random rows with the lengths of MRPC.

    The frequencies of the words follow Zipf's law. The two texts of a pair share half of them.

    Args:
      count: number of rows.
      pairs: whether the rows have a text_pair.
      seed: of the random draws.
    """
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "on", "er", "ut")]
    parts = rng.integers(0, len(syllables), (12_000, 4))
    lengths = rng.integers(1, 5, len(parts))
    words = ["".join(syllables[i] for i in row[:n]) for row, n in zip(parts, lengths, strict=True)]
    frequency = 1 / np.arange(5, len(words) + 5)
    # One call makes all draws, because each call adds up the frequencies again.
    pool = iter(rng.choice(len(words), 2 * count * _LONGEST, p=frequency / frequency.sum()))

    def sentence(share: list[str]) -> list[str]:
        length = int(np.clip(rng.normal(_WORDS, _SPREAD), _SHORTEST, _LONGEST))
        kept = [word for word in share if rng.random() < 0.5][:length]
        return kept + [words[next(pool)] for _ in range(length - len(kept))]

    found = []
    for i in range(count):
        first = sentence([])
        row = {"text": " ".join(first) + " ."}
        if pairs:
            row["text_pair"] = " ".join(sentence(first)) + " ."
        # The first two rows have different classes, so that two rows suffice for both.
        positive = i == 0 or (i > 1 and rng.random() < _POSITIVE)
        found.append(row | {"label": str(int(positive))})
    return found


def write_csv(rows: Rows, path: pathlib.Path) -> str:
    """Writes rows as CSV with a header; returns the path as text."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def make_tokenizer(rows: Rows, vocab_size: int) -> Tokenizer:
    """Returns GPT-1's tokenizer where --vocab_file and --merges_file are given, or trains one.

    Args:
      rows: the rows to train on.
      vocab_size: the largest number of tokens of a trained one, with the special tokens.
    """
    if FLAGS.vocab_file or FLAGS.merges_file:
        require(
            FLAGS.vocab_file and FLAGS.merges_file,
            "--vocab_file and --merges_file: give both or neither",
        )
        return tokenizer.load_gpt1(FLAGS.vocab_file, FLAGS.merges_file)
    texts = [value for row in rows for name, value in row.items() if name != "label"]
    return tokenizer.train_bpe(texts, vocab_size - len(SPECIALS) - 1)


def finetune_config(spec: dict[str, Any]) -> FinetuneConfig:
    """Returns gptjax's configuration of one epoch on the CSV files of a worker's spec."""
    return FinetuneConfig(
        train_file=spec["train_file"],
        validation_file=spec["validation_file"],
        task=spec["finetune_task"],
        text="text",
        text_pair="" if spec["finetune_task"] == "classification" else "text_pair",
        label="label",
        batch_size=spec["batch_size"],
        epochs=1.0,
        lm_weight=spec["lm_weight"],
    )
