"""Trained BPE, and pairs of files in GPT-1's format, against a BPE written in plain Python."""

import itertools
import os
import random
import string

import bpe
import pytest
import small
import text_rules

from gptjax.data.tables import texts as texts_lib
from gptjax.data.tokens import store
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import SPECIALS, UNKNOWN, Tokenizer


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return bpe.trained()


def test_trained_bpe_encodes_like_the_reference(trained):
    ids, merges = tokenizer_lib.vocabulary_pair(trained)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    assert len(pairs) > 50
    generator = random.Random(0)
    characters = "".join(bpe.TEXTS) + "zq?\u00df"
    texts = [*bpe.TEXTS, *bpe.ODD]
    texts += ["".join(generator.choices(characters, k=80)) for _ in range(50)]
    for raw in texts:
        assert trained.encode(raw) == bpe.reference_encode(raw, ids, pairs)


def test_merges_are_those_of_the_reference_trainer():
    """The most frequent pair is merged first, as long as no two are equally frequent."""
    texts = ["aaaab " * 7 + "abc " * 5 + "bcd " * 3]
    tokenizer = tokenizer_lib.train_bpe(texts, 40)
    words = [[*"aaaa", "b</w>"]] * 7 + [[*"ab", "c</w>"]] * 5 + [[*"bc", "d</w>"]] * 3
    _, merges = tokenizer_lib.vocabulary_pair(tokenizer)
    for found in merges:
        counts = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        pair = tuple(found.split(" "))
        assert counts[pair] == max(counts.values())
        joined = ["\x1f".join(word) for word in words]
        for i, word in enumerate(words):
            merged = []
            for symbol in word:
                if merged and (merged[-1], symbol) == pair:
                    merged[-1] = merged[-1] + symbol + "\x1f"  # closed: no second merge this round
                else:
                    merged.append(symbol)
            words[i] = [symbol.removesuffix("\x1f") for symbol in merged]
        assert joined != ["\x1f".join(word) for word in words]


@pytest.mark.parametrize(
    "raw", [*bpe.TEXTS, "  the \n\n  dog,the\tfox.  ", "THE \u2018fox\u2019\u2026"]
)
def test_round_trip_gives_the_normalised_words(trained, raw):
    words = text_rules.words(text_rules.normal(raw))
    assert trained.decode(trained.encode(raw)).rstrip(" ") == " ".join(words)


def test_every_seen_character_is_known_inside_and_at_the_end_of_a_word(trained):
    seen = sorted(set("".join(map(text_rules.normal, bpe.TEXTS))) - set(" \n"))
    assert len(seen) > 40
    for character in seen:
        inside = "a" if text_rules.is_punctuation(character) else character + "a"
        for raw in (character, "a" + character, inside, character * 3):
            assert trained.unknown_id not in trained.encode(raw), raw


def test_characters_only_seen_in_decomposed_or_capital_form_are_known():
    tokenizer = tokenizer_lib.train_bpe(["cafe\u0301s R\u0130P \u00c4A"], 200)
    for raw in ("caf\u00e9", "\u00e9e\u0301", "\u0130", "i", "\u00e4", "p"):
        assert tokenizer.unknown_id not in tokenizer.encode(raw), raw


def test_unseen_characters_are_unknown_one_by_one(trained):
    assert trained.encode("\u00df\u00df") == [trained.unknown_id] * 2
    ids = trained.encode("the \u00df the")
    assert ids == [*trained.encode("the"), trained.unknown_id, *trained.encode("the")]


def test_a_line_break_is_one_token(trained):
    line_break = trained.token_id("\n</w>")
    assert trained.encode("\n") == trained.encode(" \r\n \n\n") == [line_break]
    ids = trained.encode("the\nfox")
    assert ids == [*trained.encode("the"), line_break, *trained.encode("fox")]


def test_vocabulary_order_is_that_of_gpt1(trained):
    ids, merges = tokenizer_lib.vocabulary_pair(trained)
    tokens = sorted(ids, key=ids.get)
    ends = tokens.index("\n</w>")
    symbols = tokens[1 : 1 + (ends - 1) // 2]
    assert symbols == sorted(symbols)
    assert {len(symbol) for symbol in symbols} == {1}
    assert tokens[1 + len(symbols) : ends] == [symbol + "</w>" for symbol in symbols]
    assert tokens[ends + 1 :] == list(dict.fromkeys(merge.replace(" ", "") for merge in merges))


def test_vocabulary_size_and_alphabet_are_bounded():
    generator = random.Random(0)
    words = ["".join(generator.choices(string.ascii_lowercase, k=6)) for _ in range(500)]
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    tokenizer = tokenizer_lib.train_bpe([" ".join(words), rare], 300)
    assert len(tokenizer) == 304
    symbols = [token for token in bpe.vocabulary(tokenizer)[1:-4] if len(token) == 1]
    assert len(symbols) == 75  # a quarter of 300; the frequent ones first
    assert set(string.ascii_lowercase) < set(symbols)
    for texts in ([], [""], [" \n"]):
        empty = tokenizer_lib.train_bpe(texts, 50)
        assert bpe.vocabulary(empty) == [UNKNOWN, "\n</w>", *SPECIALS]


def test_training_is_the_same_in_every_process():
    """Where symbols and merges tie too, and where the alphabet is cut off among ties."""
    code = (
        "import hashlib, random\n"
        "from gptjax.data.tokens import tokenizer\n"
        "r = random.Random(0)\n"
        "words = [''.join(map(chr, r.choices(range(97, 400), k=5))) for _ in range(400)]\n"
        "for size in (60, 700): print(tokenizer.train_bpe([' '.join(words)], size).hash)\n"
    )
    hashes = small.outputs_by_hash_seed(code, 3)
    assert len(hashes) == 1


def test_training_reads_a_generator_once_and_pieces_do_not_matter():
    whole = tokenizer_lib.train_bpe(iter(["the cat sat\n" * 20]), 60)
    parts = tokenizer_lib.train_bpe((text for text in ["the cat sat\n"] * 20), 60)
    assert whole.hash == parts.hash


def test_tokenising_by_rows_is_tokenising_the_whole(trained, monkeypatch):
    monkeypatch.setattr(texts_lib, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(store, "_TEXTS_AT_ONCE", 7)
    lines = [text.removesuffix("\n") + end for text in bpe.TEXTS * 5 for end in ("\n", " ", ", \n")]
    rows = list(texts_lib.pieces(lines))
    assert len(rows) > 20
    assert "".join(rows) == "".join(lines)
    stream = store.token_stream(rows, trained)
    assert stream.tolist() == trained.encode("".join(lines))


# GPT-1's own format.


def test_a_pair_made_by_hand(tmp_path):
    ids = bpe.alphabet("elowrst")
    merges = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), ("lo", "w"), ("e", "s"), ("es", "t</w>")]
    for merge in merges:
        ids["".join(merge)] = len(ids)
    for header in ("#version: 0.2\n", ""):
        tokenizer = tokenizer_lib.load_gpt1(*bpe.write_pair(tmp_path, ids, merges, header))
        tokens = [tokenizer.token(i) for i in tokenizer.encode("Low lower lowest\nslow x.")]
        assert tokens == [
            "low</w>", "low", "er</w>", "low", "est</w>", "\n</w>", "s", "low</w>", UNKNOWN, UNKNOWN
        ]  # fmt: skip
        assert len(tokenizer) == len(ids) + 4
        assert tokenizer.decode(tokenizer.encode("LOWER\nlow")) == "lower \n low"


@pytest.mark.parametrize("seed", range(20))
def test_random_pairs_encode_like_the_reference(tmp_path, seed):
    generator = random.Random(seed)
    ids = bpe.alphabet("abcd.")
    merges = []
    while len(merges) < 25:
        inside = [token for token in ids if not token.endswith(("</w>", "k>"))]
        pair = (generator.choice(inside), generator.choice([*ids][1:-1]))
        if pair not in merges and "\n" not in pair[1]:
            merges.append(pair)
            ids.setdefault("".join(pair), len(ids))
    tokenizer = tokenizer_lib.load_gpt1(*bpe.write_pair(tmp_path, ids, merges))
    assert tokenizer_lib.vocabulary_pair(tokenizer) == (ids, [" ".join(pair) for pair in merges])
    for _ in range(30):
        raw = "".join(generator.choices("aabbccdd .\nxE", k=60))
        assert tokenizer.encode(raw) == bpe.reference_encode(raw, ids, merges)


def test_a_trained_tokenizer_written_as_a_pair_is_the_same(tmp_path, trained):
    pair = bpe.write_pair(tmp_path, *tokenizer_lib.vocabulary_pair(trained))
    again = tokenizer_lib.load_gpt1(*pair)
    assert bpe.vocabulary(again) == bpe.vocabulary(trained)
    assert again.hash == trained.hash


BROKEN = {
    "three symbols": (
        bpe.alphabet("ab") | {"ab</w>": 6},
        ["a b</w>", "a b a"],
        "merges.bpe: line 3",
    ),
    "one symbol": (bpe.alphabet("ab"), ["ab"], "merges.bpe: line 2"),
    "unknown symbol": (bpe.alphabet("ab"), ["a x"], "merges.bpe: line 2: 'x'"),
    "unknown result": (bpe.alphabet("ab"), ["a b</w>"], "merges.bpe: line 2: 'ab</w>'"),
    "a gap": (bpe.alphabet("ab") | {"ab": 99}, [], "encoder.json: token 'ab' has the id 99"),
    "one id twice": (bpe.alphabet("ab") | {"ab": 1}, [], "encoder.json: token 'ab' has the id 1"),
    "a negative id": ({UNKNOWN: -1}, [], "encoder.json: token '<unk>' has the id -1"),
    "ids as text": ({UNKNOWN: "0"}, [], "encoder.json: token '<unk>' has the id '0'"),
    "no unknown": ({"a": 0}, [], "encoder.json: it has no token <unk>"),
    "specials": ({UNKNOWN: 0, "<pad>": 1}, [], "encoder.json: <pad>"),
    "a list": ([UNKNOWN], [], "encoder.json: must be"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pairs_name_file_and_line(tmp_path, name):
    ids, merges, expected = BROKEN[name]
    message = bpe.fails(tokenizer_lib.load_gpt1, *bpe.write_pair(tmp_path, ids, merges))
    assert message.startswith(f"{tmp_path}{os.sep}{expected}")
