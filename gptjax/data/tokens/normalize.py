"""GPT-1's text normalisation, approximated with the normalizers of the `tokenizers` library.

These normalizers run in Rust on all cores. They are saved inside `tokenizer.json`, so every
checkpoint contains them.

The authors of GPT-1 repaired text with ftfy, standardised punctuation and white space, and divided
the text into words with spaCy. The rules here are faster: the same punctuation and white space,
NFC, lower case, and words that end at white space and punctuation. For a vocabulary that was
learnt from spaCy's words, such as GPT-1's, there are more rules (`_ENGLISH`). With these rules,
most words end at the same characters as in spaCy. docs/tokenization.md counts the differences.
"""

from tokenizers import Regex, normalizers, pre_tokenizers

from gptjax.data.tokens.gpt1_words import REPLACED

# ftfy replaces curly quotes by straight quotes.
_PUNCTUATION = REPLACED | {"‘": "'", "’": "'", "“": '"', "”": '"'}
NEWLINE = "\n"


def normalizer() -> normalizers.Normalizer:
    """Returns the normalizer: NFC, standard punctuation, lower case, single spaces."""
    return normalizers.Sequence(
        [
            normalizers.NFC(),
            *(normalizers.Replace(old, new) for old, new in _PUNCTUATION.items()),
            normalizers.Lowercase(),
            # Control characters and zero-width marks are removed. White space, such as a form feed,
            # is not removed here, because it separates words.
            normalizers.Replace(Regex(r"[\p{Cc}\p{Cf}&&\S]"), ""),
            normalizers.Replace(Regex(r"\s*\n\s*"), NEWLINE),
            normalizers.Replace(Regex(r"[^\S\n]+"), " "),
        ]
    )


# The most frequent cases of spaCy's English rules. All alternatives except the last match strings
# that are one word in spaCy: endings of contractions, repeated marks, numbers with marks inside,
# abbreviations and initials. The last alternative matches any other single mark.
_ENGLISH = Regex(
    r"n't(?!\w)|(?<!\w)can(?=not(?!\w))|'(?:s|ll|re|ve|d|m|em)(?!\w)|'{2,}"
    r"|-+|~+|/+|\.{2,}|\d+(?:[.:]\d+)+"
    r"|(?<!\w)(?:mr|mrs|ms|dr|st|jr|sr|prof|gen|rev|sen|gov|inc|corp|ltd|co|jan|feb|aug|sept|oct"
    r"|nov|dec)\.|(?<!\w)\p{L}\.(?:\p{L}\.)*|[\p{P}$+<=>^`|~]"
)


def pre_tokenizer(english: bool = False) -> pre_tokenizers.PreTokenizer:
    """Returns a splitter into words at white space and punctuation.

    White space is removed. Line breaks and punctuation become words.

    Args:
      english: whether to use the approximation of spaCy's English rules. It is for vocabularies
        that were learnt from spaCy's words.
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
