"""GPT-1's words, exactly: what the authors' code made of a text before byte-pair encoding.

ftfy mends the text, `standardize` spaces out punctuation, spaCy's English rules (no model) cut it
into words, and each word is put in lower case. `text.py` is the fast path that comes close to it.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from gptjax.errors import UserError

_REPLACED = {"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"}
# No backslash: theirs is in a pattern that is not a raw string, where it means another plus.
_PUNCTUATION = re.compile(r"(-+|~+|!+|\"+|;+|\?+|\++|,+|\)+|\(+|\/+|\*+|\[+|\]+|}+|{+|\|+|_+)")
_LINE_BREAK = re.compile(r"\s*\n\s*")
_SPACES = re.compile(r"[^\S\n]+")


def standardize(text: str) -> str:
    """The authors' `text_standardize`: plain dashes, spaces around punctuation and line breaks."""
    for old, new in _REPLACED.items():
        text = text.replace(old, new)
    text = _PUNCTUATION.sub(r" \1 ", text)
    text = _LINE_BREAK.sub(" \n ", text)
    return _SPACES.sub(" ", text).strip()


@functools.cache
def _libraries() -> tuple[Callable[[str], str], Callable[[str], Any]]:
    try:
        import ftfy
        import spacy
    except ImportError as error:
        raise UserError(
            f"tokenizer: GPT-1's exact words need ftfy and spacy ({error}); run "
            "`pip install ftfy spacy`, or train with `tokenizer.words`=fast"
        ) from error
    return ftfy.fix_text, spacy.blank("en").tokenizer


def words(text: str) -> list[str]:
    """Returns the words of a text, in lower case; a line break is the word "\\n".

    Raises:
      UserError: ftfy or spaCy is not installed.
    """
    fix, cut = _libraries()
    # spaCy makes one token of a line break and the space after it.
    found = (token.text.lower() for token in cut(standardize(fix(text))))
    return ["\n" if word.isspace() else word for word in found]
