"""What no text may break in tokenizers of any kind; characters; files; the configuration."""

import random
import string
import time

import bpe
import numpy as np
import pytest
import tokenizers

from gptjax.config.schema import TokenizerConfig
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import SPECIALS, UNKNOWN, Tokenizer


@pytest.fixture(scope="module", params=["bpe", "character", "gpt1"])
def any_tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "bpe":
        return bpe.trained()
    if request.param == "character":
        return tokenizer_lib.train_characters(bpe.TEXTS)
    ids = bpe.alphabet(string.ascii_lowercase)
    ids["th"], ids["the</w>"] = len(ids), len(ids) + 1
    folder = tmp_path_factory.mktemp("pair")
    return tokenizer_lib.load_gpt1(*bpe.write_pair(folder, ids, [("t", "h"), ("th", "e</w>")]))


# What holds for every kind.


def test_special_tokens_are_the_last_four_in_order(any_tokenizer):
    tokens = bpe.vocabulary(any_tokenizer)
    assert tuple(tokens[-4:]) == SPECIALS == ("_start_", "_delimiter_", "_classify_", "<pad>")
    t = any_tokenizer
    size = len(t)
    assert [t.start_id, t.delimiter_id, t.extract_id, t.padding_id] == [*range(size - 4, size)]
    assert (t.unknown_id, tokens[0]) == (0, UNKNOWN)
    assert len(set(tokens)) == size
    assert [t.token_id(token) for token in tokens] == [*range(size)]


@pytest.mark.parametrize("raw", [*bpe.ODD, *SPECIALS, "x " + " ".join(SPECIALS) + "y"])
def test_no_text_gives_an_id_outside_the_plain_vocabulary(any_tokenizer, raw):
    ids = any_tokenizer.encode(raw)
    assert all(0 <= i < len(any_tokenizer) - 4 for i in ids)
    assert any_tokenizer.encode_batch([raw])[0].tolist() == ids
    assert not set(SPECIALS) & {any_tokenizer.token(i) for i in ids}


def test_special_tokens_stay_plain_text_after_loading(any_tokenizer):
    again = tokenizer_lib.from_json(any_tokenizer.to_json())
    for raw in (*SPECIALS, "a <pad> b", UNKNOWN):
        assert again.encode(raw) == any_tokenizer.encode(raw)
        assert max(again.encode(raw)) < len(again) - 4


def test_special_and_unknown_tokens_are_not_in_decoded_text(any_tokenizer):
    t = any_tokenizer
    word = t.encode("the")
    ids = [t.start_id, *word, t.delimiter_id, t.unknown_id, t.extract_id, t.padding_id]
    assert t.decode(ids) == "the"
    assert t.decode([]) == ""


def test_lone_surrogates_are_unknown_characters(any_tokenizer):
    assert any_tokenizer.encode("\ud800") == [any_tokenizer.unknown_id]
    (whole, broken) = any_tokenizer.encode_batch(["the", "the\udcff"])
    assert whole.tolist() == any_tokenizer.encode("the")
    assert any_tokenizer.unknown_id in broken
    emoji = "\U0001f600"
    halves = emoji.encode("utf-16-be", "surrogatepass")
    pair = "".join(chr(int.from_bytes(halves[i : i + 2], "big")) for i in (0, 2))
    assert any_tokenizer.encode(pair) == any_tokenizer.encode(emoji)


def test_save_load_and_hash(any_tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    any_tokenizer.save(path)
    for again in (tokenizer_lib.load(path), tokenizer_lib.from_json(any_tokenizer.to_json())):
        assert again.hash == any_tokenizer.hash
        assert bpe.vocabulary(again) == bpe.vocabulary(any_tokenizer)
        for raw in (*bpe.TEXTS, *bpe.ODD):
            assert again.encode(raw) == any_tokenizer.encode(raw)
            assert again.decode(again.encode(raw)) == any_tokenizer.decode(again.encode(raw))
    other = tokenizer_lib.train_characters(["something else"])
    assert other.hash != any_tokenizer.hash


def test_batches_are_the_texts_one_by_one(any_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer_lib, "_CHUNK", 3)
    texts = [*bpe.TEXTS, *bpe.ODD]
    batch = any_tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [any_tokenizer.encode(text) for text in texts]
    assert {ids.dtype for ids in batch} == {np.dtype(np.int32)}
    assert any_tokenizer.encode_batch([]) == []


def test_a_million_characters_are_quick(any_tokenizer):
    generator = random.Random(0)
    running = "".join(generator.choices("abcde  \n.", k=1_000_000))
    for raw in (running, "a" * 300_000):
        start = time.perf_counter()
        assert any_tokenizer.encode(raw)
        assert time.perf_counter() - start < 20  # quadratic would be hours


def test_unknown_token_name(any_tokenizer):
    assert "no token zebra" in bpe.fails(any_tokenizer.token_id, "zebra")
    assert any_tokenizer.token(10**6) == UNKNOWN


# Characters.


@pytest.mark.parametrize("raw", [*bpe.TEXTS, "\n\n\t\r\n \x00", "_start_ <pad> </w>", ""])
def test_characters_round_trip_exactly(raw):
    tokenizer = tokenizer_lib.train_characters(
        [*bpe.TEXTS, "\n\n\t\r\n \x00", "_start_ <pad> </w>"]
    )
    ids = tokenizer.encode(raw)
    assert len(ids) == len(raw)
    assert tokenizer.decode(ids) == raw
    assert tokenizer.unknown_id not in ids


def test_characters_are_numbered_by_code_point():
    tokenizer = tokenizer_lib.train_characters(["ba\n", "\u65e5A"])
    assert bpe.vocabulary(tokenizer) == [UNKNOWN, "\n", "A", "a", "b", "\u65e5", *SPECIALS]
    assert tokenizer.encode("ab?") == [3, 4, 0]
    assert tokenizer_lib.vocabulary_pair(tokenizer) is None


# Files, and the configuration.


def test_unreadable_files(tmp_path):
    vocab_file, merges_file = bpe.write_pair(tmp_path, bpe.alphabet("ab"), [])
    missing = str(tmp_path / "none.json")
    assert missing in bpe.fails(tokenizer_lib.load_gpt1, missing, merges_file)
    assert missing in bpe.fails(tokenizer_lib.load_gpt1, vocab_file, missing)
    assert missing in bpe.fails(tokenizer_lib.load, missing)
    bad = tmp_path / "bad.json"
    bad.write_bytes(b'{"\xff": 0}')
    assert "not UTF-8" in bpe.fails(tokenizer_lib.load_gpt1, str(bad), merges_file)
    for content in ("{", "", "null", '{"version": "1.0"}'):
        bad.write_text(content)
        assert bpe.fails(tokenizer_lib.load, bad).startswith(str(bad))
    bad.write_text("{")
    assert "not JSON" in bpe.fails(tokenizer_lib.load_gpt1, str(bad), merges_file)
    model = tokenizers.models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN)
    bad.write_text(tokenizers.Tokenizer(model).to_str())
    assert bpe.fails(tokenizer_lib.load, bad) == f"{bad}: it has no token _start_"


def test_build_follows_the_configuration(tmp_path):
    trained = bpe.trained()

    def never():
        raise AssertionError("a saved tokenizer needs no text")
        yield

    trained.save(tmp_path / "tokenizer.json")
    config = TokenizerConfig(file=str(tmp_path / "tokenizer.json"))
    assert tokenizer_lib.build(config, never()).hash == trained.hash
    pair = bpe.write_pair(tmp_path, *tokenizer_lib.vocabulary_pair(trained))
    config = TokenizerConfig(kind="gpt1", vocab_file=pair[0], merges_file=pair[1])
    assert tokenizer_lib.build(config, never()).hash == trained.hash
    config = TokenizerConfig(kind="gpt1", vocab_file=pair[0])
    assert "`tokenizer.vocab_file`" in bpe.fails(tokenizer_lib.build, config, [])
    characters = tokenizer_lib.build(TokenizerConfig(kind="character"), iter(bpe.TEXTS))
    assert characters.hash == tokenizer_lib.train_characters(bpe.TEXTS).hash
    again = tokenizer_lib.build(TokenizerConfig(vocab_size=400), iter(bpe.TEXTS * 3))
    assert again.hash == trained.hash


def test_a_trained_tokenizer_is_kept_by_texts_and_size(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    calls = []
    train = tokenizer_lib.train_bpe

    def counted(texts, size):
        calls.append(size)
        return train(texts, size)

    monkeypatch.setattr(tokenizer_lib, "train_bpe", counted)

    def build(content, **changes):
        return tokenizer_lib.build(TokenizerConfig(vocab_size=300, **changes), bpe.TEXTS, content)

    plain = build("")
    assert {build(content).hash for content in ("", "a", "a", "b")} == {plain.hash}
    assert len(calls) == 4
    assert tokenizer_lib.build(TokenizerConfig(vocab_size=200), bpe.TEXTS, "a").hash != plain.hash
    characters = build("a", kind="character")
    assert characters.hash == build("a", kind="character").hash != plain.hash
    assert len(calls) == 5
    monkeypatch.setattr(tokenizer_lib.normalize, "NEWLINE", " \n")
    build("a")
    assert len(calls) == 6
