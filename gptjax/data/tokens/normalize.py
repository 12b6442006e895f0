"""GPT-1's text normalisation, as `tokenizers` normalizers: it runs in Rust, on all cores, and is
saved inside `tokenizer.json`, so that a checkpoint carries it.

The authors cleaned text with ftfy, standardised punctuation and whitespace, and split words with
spaCy. This is the fast path: the same punctuation and whitespace rules, NFC, lower case, and words
split at whitespace and punctuation; with a vocabulary learnt from spaCy's words, as GPT-1's was,
mostly where spaCy splits them
(docs/tokenization.md counts the differences).
"""

from tokenizers import Regex, normalizers, pre_tokenizers

# The punctuation that the authors' `text_standardize` maps to ASCII, and the curly quotes that
# ftfy straightens before it.
_PUNCTUATION = {
    "—": "-",
    "–": "-",
    "―": "-",
    "…": "...",
    "´": "'",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}
NEWLINE = "\n"


def normalizer() -> normalizers.Normalizer:
    """Returns NFC, standard punctuation, lower case, and single spaces and line breaks."""
    return normalizers.Sequence(
        [
            normalizers.NFC(),
            *(normalizers.Replace(old, new) for old, new in _PUNCTUATION.items()),
            normalizers.Lowercase(),
            # Control characters, zero-width marks and the like carry no text. Form feeds and other
            # control characters that are white space separate words: they must not join them.
            normalizers.Replace(Regex(r"[\p{Cc}\p{Cf}&&\S]"), ""),
            normalizers.Replace(Regex(r"\s*\n\s*"), NEWLINE),
            normalizers.Replace(Regex(r"[^\S\n]+"), " "),
        ]
    )


# What spaCy's English rules keep together, of what is frequent: endings of contractions, runs of
# some marks, numbers with marks inside, abbreviations and initials. The rest is split at each mark.
_ENGLISH = Regex(
    r"n't(?!\w)|(?<!\w)can(?=not(?!\w))|'(?:s|ll|re|ve|d|m|em)(?!\w)|'{2,}"
    r"|-+|~+|/+|\.{2,}|\d+(?:[.:]\d+)+"
    r"|(?<!\w)(?:mr|mrs|ms|dr|st|jr|sr|prof|gen|rev|sen|gov|inc|corp|ltd|co|jan|feb|aug|sept|oct"
    r"|nov|dec)\.|(?<!\w)\p{L}\.(?:\p{L}\.)*|[\p{P}$+<=>^`|~]"
)


def english_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits into words much as spaCy's English rules do, for a vocabulary learnt from those."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Split(_ENGLISH, "isolated"),
        ]
    )


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits into words: at whitespace (dropped), line breaks and punctuation (kept as words)."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
