"""GPT-1's words against Hugging Face's slow tokenizer, which runs ftfy and spaCy like the authors.

golden/words.json holds a small vocabulary and its merges, texts of every odd kind, and the ids that
transformers 4.57.6 gave with ftfy 6.3.1 and spaCy 3.8.18. That one puts the whole text in lower
case first, where the authors' code does so with each word after spaCy has cut it: "mrs." is not the
abbreviation that spaCy knows. It also spaces out backslashes, which the authors' pattern does not
(it is no raw string). We do as the authors did, and are compared without capitals and backslashes.
"""

import builtins
import difflib
import json
import pathlib

import pytest

from gptjax.config.schema import TokenizerConfig
from gptjax.data.builtin import tasks
from gptjax.data.tokens import gpt1_words, tokenizer
from gptjax.errors import UserError

GOLDEN = json.loads(
    pathlib.Path(__file__).parents[1].joinpath("golden").joinpath("words.json").read_text()
)


@pytest.fixture
def libraries():
    pytest.importorskip("ftfy")
    pytest.importorskip("spacy")


@pytest.fixture
def pair(tmp_path):
    """The paths of a vocabulary/merges pair."""
    (tmp_path / "vocab.json").write_text(json.dumps(GOLDEN["vocabulary"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *GOLDEN["merges"], ""]))
    return str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")


@pytest.fixture
def english(pair):
    """The same with "n't", which a vocabulary learnt from spaCy's words has, as GPT-1's does."""
    vocabulary, merges = map(pathlib.Path, pair)
    tokens = json.loads(vocabulary.read_text())
    for new in ("n'", "n't</w>"):
        tokens[new] = len(tokens)
    vocabulary.write_text(json.dumps(tokens))
    merges.write_text(merges.read_text() + "n '\nn' t</w>\n")
    return pair


@pytest.fixture
def exact(pair, libraries):
    return tokenizer.load_gpt1(*pair, exact=True)


@pytest.mark.parametrize("number", range(len(GOLDEN["texts"])))
def test_ids_are_those_of_transformers(exact, number):
    text = GOLDEN["texts"][number].lower()
    assert exact.encode(text) == GOLDEN["ids"][number]


def test_a_batch_is_its_texts(exact):
    texts = [text.lower() for text in GOLDEN["texts"]]
    assert [ids.tolist() for ids in exact.encode_batch(texts)] == GOLDEN["ids"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mrs. Smith isn't here.", ["mrs.", "smith", "is", "n't", "here", "."]),
        ("a--b…c — “d”", ["a", "--", "b", "...", "c", "-", '"', "d", '"']),
        ("one\n \n two", ["one", "\n", "two"]),
        ("don´t x/y (z)!!", ["do", "n't", "x", "/", "y", "(", "z", ")", "!", "!"]),
        ("schÃ¶n", ["schön"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_words(libraries, text, expected):
    assert gpt1_words.words(text) == expected


def test_standardize_is_the_authors():
    """Every run of a listed mark stands alone; no space is double, none is at an end."""
    text = ' a-b--c~!!";;?+,)(/*[]}{|_d\t \n\n e…´ f\\g '
    expected = "a - b -- c ~ !! \" ;; ? + , ) ( / * [ ] } { | _ d \n e...' f\\g"
    assert gpt1_words.standardize(text) == expected


def test_how_words_were_made_travels_with_the_tokenizer(exact, pair):
    again = tokenizer.from_json(exact.to_json())
    assert again.exact
    assert again.hash == exact.hash
    fast = tokenizer.load_gpt1(*pair)
    assert not fast.exact
    assert fast.hash != exact.hash
    text = "mrs. smith isn't here..."
    assert again.encode(text) == exact.encode(text) != fast.encode(text)
    assert exact.decode(exact.encode("the dog's mat")) == "the dog 's mat"


def test_a_missing_library_is_one_line_and_no_other_words(pair, monkeypatch):
    usual = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("ftfy", "spacy"):
            raise ImportError(f"No module named {name!r}")
        return usual(name, *args, **kwargs)

    gpt1_words._libraries.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    config = TokenizerConfig(kind="gpt1", vocab_file=pair[0], merges_file=pair[1], words="exact")
    with pytest.raises(UserError, match="pip install ftfy spacy"):
        tokenizer.build(config, []).encode("a text")


def test_the_fast_path_comes_close_on_real_text(libraries, english):
    """Of the exact path's tokens the fast one finds nearly all, in the same order.

    What differs is mostly code; docs/tokenization.md lists what does in prose.
    """
    exact, fast = (tokenizer.load_gpt1(*english, exact=exact) for exact in (True, False))
    same = total = 0
    for text in list(tasks.builtin_text("validation"))[:60]:
        for line in filter(str.strip, text.splitlines()):
            ours, theirs = (each.encode(line) for each in (fast, exact))
            blocks = difflib.SequenceMatcher(None, theirs, ours, autojunk=False)
            total += len(theirs)
            same += sum(block.size for block in blocks.get_matching_blocks())
    print(f"\ntokens that both paths find: {same / total:.1%} of {total:,}")
    assert total > 20_000
    assert same / total > 0.98


@pytest.mark.parametrize(
    "line",
    [
        "I don't think they'd say we're sure; it's John's, isn't it?",
        "He cannot go... Well -- who can? Nobody!!",
        "Mr. Smith and Dr. Brown met Mrs. J. R. Jones of the U.S. Senate.",
        "It costs 3.50 or 10,000 at 12:30, give or take.",
        'She said: "the well-known and/or half-done thing" (see below).',
    ],
)
def test_the_fast_path_cuts_plain_english_as_the_exact_one_does(libraries, english, line):
    exact, fast = (tokenizer.load_gpt1(*english, exact=exact) for exact in (True, False))
    assert [fast.token(i) for i in fast.encode(line)] == [
        exact.token(i) for i in exact.encode(line)
    ]
