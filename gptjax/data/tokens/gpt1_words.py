"""GPT-1's exact words, into which the authors' code divided a text before byte-pair encoding.

ftfy repairs the text, `standardize` puts spaces around punctuation, spaCy's English rules (without
a model) divide it into words, and each word is put in lower case. `normalize.py` is faster and
comes close to this.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from gptjax.errors import UserError

# Characters that the authors' `text_standardize` maps to ASCII.
REPLACED = {"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"}
# The authors' pattern also has `\\+` for backslashes. Their string is not raw, so that it means
# `\+`, which matches a plus sign. Therefore backslashes get no spaces here either.
_PUNCTUATION = re.compile(r"(-+|~+|!+|\"+|;+|\?+|\++|,+|\)+|\(+|\/+|\*+|\[+|\]+|}+|{+|\|+|_+)")
_LINE_BREAK = re.compile(r"\s*\n\s*")
_SPACES = re.compile(r"[^\S\n]+")


def standardize(text: str) -> str:
    """Returns a text with plain dashes, and with spaces around punctuation and line breaks.

    This is the authors' `text_standardize`.
    """
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    text = _PUNCTUATION.sub(r" \1 ", text)
    text = _LINE_BREAK.sub(" \n ", text)
    return _SPACES.sub(" ", text).strip()


@functools.cache
def _libraries() -> tuple[Callable[[str], str], Callable[[str], Any]]:
    """Returns the function of ftfy that repairs a text, and that of spaCy that divides it."""
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
    fix, divide = _libraries()
    lower = (token.text.lower() for token in divide(standardize(fix(text))))
    # A line break and the space after it are one token of spaCy.
    return ["\n" if word.isspace() else word for word in lower]
