"""GPT-1's text normalisation, with the normalizers of the `tokenizers` library.

It runs in Rust on all cores, and it is saved inside `tokenizer.json`, so that every checkpoint
contains it.

The authors repaired text with ftfy, standardised punctuation and white space, and divided it into
words with spaCy. The rules here are faster: the same punctuation and white space, NFC, lower case,
and words that end at white space and punctuation. With a vocabulary that was learnt from spaCy's
words, as GPT-1's was, words end mostly where spaCy ends them (docs/tokenization.md counts the
differences).
"""

from tokenizers import Regex, normalizers, pre_tokenizers

from gptjax.data.tokens.gpt1_words import REPLACED

# ftfy straightens the curly quotes.
_PUNCTUATION = REPLACED | {"‘": "'", "’": "'", "“": '"', "”": '"'}
NEWLINE = "\n"


def normalizer() -> normalizers.Normalizer:
    """Returns the normalizer: NFC, standard punctuation, lower case, single spaces."""
    return normalizers.Sequence(
        [
            normalizers.NFC(),
            *(normalizers.Replace(old, new) for old, new in _PUNCTUATION.items()),
            normalizers.Lowercase(),
            # Control characters and zero-width marks are no text. But those that are white space,
            # such as form feeds, stay for now: they separate words.
            normalizers.Replace(Regex(r"[\p{Cc}\p{Cf}&&\S]"), ""),
            normalizers.Replace(Regex(r"\s*\n\s*"), NEWLINE),
            normalizers.Replace(Regex(r"[^\S\n]+"), " "),
        ]
    )


# The frequent cases of spaCy's English rules. The first lines match strings that spaCy keeps whole:
# endings of contractions, runs of some marks, numbers with marks inside, abbreviations and
# initials. The last alternative matches any other single mark.
_ENGLISH = Regex(
    r"n't(?!\w)|(?<!\w)can(?=not(?!\w))|'(?:s|ll|re|ve|d|m|em)(?!\w)|'{2,}"
    r"|-+|~+|/+|\.{2,}|\d+(?:[.:]\d+)+"
    r"|(?<!\w)(?:mr|mrs|ms|dr|st|jr|sr|prof|gen|rev|sen|gov|inc|corp|ltd|co|jan|feb|aug|sept|oct"
    r"|nov|dec)\.|(?<!\w)\p{L}\.(?:\p{L}\.)*|[\p{P}$+<=>^`|~]"
)


def pre_tokenizer(english: bool = False) -> pre_tokenizers.PreTokenizer:
    """Returns a splitter into words at white space and punctuation.

    White space is removed; line breaks and punctuation are words themselves.

    Args:
      english: whether to come close to spaCy's English rules, for vocabularies that were learnt
        from spaCy's words.
    """
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Split(_ENGLISH, "isolated")
            if english
            else pre_tokenizers.Punctuation("isolated"),
        ]
    )
