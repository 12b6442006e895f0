"""GPT-1's text normalisation, as `tokenizers` normalizers: it runs in Rust, on all cores, and is
saved inside `tokenizer.json`, so that a checkpoint carries it.

The authors cleaned text with ftfy, standardised punctuation and whitespace, and split words with
spaCy. This is the fast path: the same punctuation and whitespace rules, NFC, lower case, and words
split at whitespace and punctuation.
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


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits into words: at whitespace (dropped), line breaks and punctuation (kept as words)."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
