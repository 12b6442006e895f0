"""The exact division of a text into words, as in the authors' code.

The authors' code is OpenAI's finetune-transformer-lm. It divides a text into words, and then
divides each word by byte-pair encoding. To get its words, ftfy repairs the text, `standardize` puts
spaces around punctuation, spaCy's English rules (without a model) divide the text, and each word is
put in lower case. `normalize.py` is faster, and its words are nearly the same.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from gptjax.errors import UserError

# Characters that the authors' `text_standardize` maps to ASCII.
REPLACED = {"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"}
_REPLACED = str.maketrans({**REPLACED})
# The authors' pattern also has `\\+` for backslashes. But their string is not a raw string, so it
# means `\+`, which matches a plus sign. Therefore backslashes get no spaces here either.
_PUNCTUATION = re.compile(r"(-+|~+|!+|\"+|;+|\?+|\++|,+|\)+|\(+|\/+|\*+|\[+|\]+|}+|{+|\|+|_+)")
_LINE_BREAK = re.compile(r"\s*\n\s*")
_SPACES = re.compile(r"[^\S\n]+")


def standardize(text: str) -> str:
    """Returns a text with ASCII dashes, and with spaces around punctuation and line breaks.

    It does the same as `text_standardize` in the authors' code.
    """
    text = _PUNCTUATION.sub(r" \1 ", text.translate(_REPLACED))
    text = _LINE_BREAK.sub(" \n ", text)
    return _SPACES.sub(" ", text).strip()


@functools.cache
def _libraries() -> tuple[Callable[[str], str], Callable[[str], Any]]:
    """Returns ftfy's function that repairs a text, and spaCy's function that divides a text."""
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
    """Returns the words of a text, in lower case. A line break is the word "\\n".

    Raises:
      UserError: ftfy or spaCy is not installed.
    """
    fix, divide = _libraries()
    lower = (token.text.lower() for token in divide(standardize(fix(text))))
    # In spaCy, a line break and the space after it are one token.
    return ["\n" if word.isspace() else word for word in lower]
