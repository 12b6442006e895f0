"""Normalisation and word splitting against the same rules written with `unicodedata` and `re`."""

import random
import sys
import unicodedata

import pytest
import text_rules

from gptjax.data.tokens import normalize

POOL = [
    *"aZ9.,!-'\"$+<>^_`|~ \n\t\r\v\f\x00\x1b\x1c\x85\xa0",
    *"\u00e9\u00c9\u0130\u03a3\u03c2\u1e9e\u00df\u01c4\ufb01\u00b4\u2018\u2019\u201c\u201d",
    *"\u2013\u2014\u2015\u2026\u2028\u2029\u200b\u200d\u00ad\ufeff\u202e\u180e\u3000\u2003",
    *"\u0301\u0323\u0307\u0645\u0631\u05d0\u0929\u093c\uac00\u1100\u1161\u11a8\u65e5\u3002",
    *"\U0001f600\U0001f468\u200d\U0001f469\U0001f1e9\U0001f1ea\U00010400\U0010fffd",
    "\r\n", " \n \n ", "e\u0301", "A\u030a", "it's", "\u201cOh\u2026\u201d",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(200))
def test_random_text_is_normalised_and_split_like_the_reference(seed):
    generator = random.Random(seed)
    raw = "".join(generator.choices(POOL, k=generator.randrange(60)))
    normalised = normalize.normalizer().normalize_str(raw)
    assert normalised == text_rules.normal(raw)
    split = normalize.pre_tokenizer().pre_tokenize_str(normalised)
    assert [word for word, _ in split] == text_rules.words(normalised)


def test_every_character_of_unicode_is_normalised_like_the_reference():
    known = [
        character
        for character in map(chr, range(sys.maxunicode + 1))
        # Characters of Unicode 3.2: the tables of Python and of `tokenizers` differ in version.
        if unicodedata.ucd_3_2_0.category(character) not in ("Cs", "Cn", "Co")
    ]
    assert len(known) > 90_000
    raw = "".join(f"a{character}z" for character in known)
    assert normalize.normalizer().normalize_str(raw) == text_rules.normal(raw)


def test_normalising_again_changes_nothing():
    for word in (
        "He said: \u201cWait\u2026\u201d \r\n\r\n\tthen\u2014left.",
        "\u0130\u03a3 \x0c x",
    ):
        once = normalize.normalizer().normalize_str(word)
        assert normalize.normalizer().normalize_str(once) == once


def test_white_space_that_is_a_control_character_separates_words():
    for space in text_rules.SPACE:
        assert normalize.normalizer().normalize_str(f"end{space}start") == "end start"
    for invisible in "\x00\x1b\u200b\u00ad\ufeff\u202e":
        assert normalize.normalizer().normalize_str(f"in{invisible}side") == "inside"


def test_the_rules_of_text_standardize():
    raw = "\u201cDon\u2019t\u201d\u2014she said\u2026  \n\n  Then\u2013nothing."
    assert normalize.normalizer().normalize_str(raw) == '"don\'t"-she said...\nthen-nothing.'
