"""Texts, and GPT-1's BPE in plain Python: what the tests of tokenizers share."""

import functools
import itertools
import json

import pytest
import text_rules

from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import UNKNOWN, Tokenizer
from gptjax.errors import UserError

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n",
    "\u201cPack my box,\u201d she said \u2014 with five dozen liquor jugs!\n",
    "Na\u00efve caf\u00e9 d\u00e9j\u00e0 vu; e\u0301 \u65e5\u672c\u8a9e \u0434\u043e\u043c\n",
    "Don\u2019t the the them then these other others another 1984 2001 (x_y)\n",
]
ODD = [
    "", " ", "\n", "\n\n \n", "\x00", "\u0301", "e\u0301\u0323", "\U0001f468\u200d\U0001f469",
    "\U0001f1e9\U0001f1ea", "\u202eabc\u05d0\u0645", "\u200b\u200d\ufeff", "\u0130\u03a3\u1e9e",
    "\ufffd", "\U0010ffff", "\ue000", "a\u0300" * 50, "\r\n\x85\u2028", "</w>", "a</w>", UNKNOWN,
]  # fmt: skip


def vocabulary(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token(i) for i in range(len(tokenizer))]


def fails(function, *args) -> str:
    with pytest.raises(UserError) as info:
        function(*args)
    assert "\n" not in str(info.value)
    return str(info.value)


def reference_encode(raw, ids, merges) -> list[int]:
    """GPT-1's BPE as published: of all pairs in a word, merge the one of lowest rank first."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    out = []
    for word in text_rules.words(text_rules.normal(raw)):
        symbols = [*word[:-1], word[-1] + "</w>"]
        symbols = [symbol if symbol in ids else UNKNOWN for symbol in symbols]
        while True:
            pairs = set(itertools.pairwise(symbols)) & ranks.keys()
            if not pairs:
                break
            first, second = min(pairs, key=ranks.__getitem__)
            merged, i = [], 0
            while i < len(symbols):
                if symbols[i : i + 2] == [first, second]:
                    merged.append(first + second)
                    i += 2
                else:
                    merged.append(symbols[i])
                    i += 1
            symbols = merged
        out += [ids[symbol] for symbol in symbols]
    return out


def write_pair(folder, ids, merges, header="#version: 0.2\n"):
    """The two files of GPT-1's format; `merges` are pairs or lines."""
    lines = [line if isinstance(line, str) else " ".join(line) for line in merges]
    (folder / "encoder.json").write_text(json.dumps(ids), encoding="utf-8")
    text = header + "".join(line + "\n" for line in lines)
    (folder / "merges.bpe").write_text(text, encoding="utf-8")
    return str(folder / "encoder.json"), str(folder / "merges.bpe")


def alphabet(characters):
    """Ids of <unk>, the characters, the characters at a word's end, and the line break."""
    tokens = [UNKNOWN, *characters, *(c + "</w>" for c in characters), "\n</w>"]
    return {token: i for i, token in enumerate(tokens)}


@functools.cache
def trained() -> Tokenizer:
    """A tokenizer of `TEXTS`, for reading only."""
    return tokenizer_lib.train_bpe(TEXTS * 3, 400)
