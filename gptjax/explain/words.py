"""The words of a token row, and the merges of byte pair encoding that made their tokens."""

import itertools
from collections.abc import Sequence

from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import END_OF_WORD, SPECIALS, UNKNOWN, Tokenizer

# The steps of longer words are left out, because their size grows with the square of the length.
_LONG = 40


def readable(token: str) -> str:
    """Returns a token for people, without the mark of the end of a word.

    >>> readable("film</w>"), readable("fil"), readable("<unk>")
    ('film', 'fil', '<unk>')
    """
    return token.removesuffix(END_OF_WORD) or token


def group(tokens: Sequence[str], marked: bool) -> list[list[int]]:
    """Returns the indices of the tokens of each word. Special tokens belong to no word.

    A word ends with the mark `</w>`. An unknown token is a word of its own, because nothing says
    where its word ends.

    >>> group(["_start_", "fil", "m</w>", "<unk>", "a</w>", "_classify_"], marked=True)
    [[1, 2], [3], [4]]

    Args:
      tokens: the tokens of the row.
      marked: whether the tokenizer marks the ends of words. Otherwise each token is a word.
    """
    words: list[list[int]] = []
    is_open = False
    for i, token in enumerate(tokens):
        if token in SPECIALS:
            is_open = False
            continue
        alone = token == UNKNOWN or not marked
        if is_open and not alone:
            words[-1].append(i)
        else:
            words.append([i])
        is_open = not alone and not token.endswith(END_OF_WORD)
    return words


class Merges:
    """The merges of a tokenizer. A tokenizer of characters has none."""

    def __init__(self, tokenizer: Tokenizer):
        pair = tokenizer_lib.vocabulary_pair(tokenizer)
        lines = pair[1] if pair else []
        self._ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}

    @property
    def known(self) -> bool:
        """Whether there are merges, and so marks for the ends of words."""
        return bool(self._ranks)

    def steps(self, pieces: Sequence[str]) -> list[list[str]]:
        """Returns the pieces of a word, from its characters to its tokens, after each merge.

        In each step the pair with the lowest rank is merged, the leftmost if there are several
        (Sennrich et al. 2016, with the order of the library `tokenizers`).

        Args:
          pieces: the tokens of the word, as they are written in the vocabulary. A word of more
            than 40 characters has only its first and its last step.
        """
        end = pieces[-1].endswith(END_OF_WORD) if pieces else False
        text = "".join(pieces).removesuffix(END_OF_WORD)
        if UNKNOWN in pieces or not self._ranks or not text:
            return [list(pieces)]
        if len(text) > _LONG:
            return [list(text), list(pieces)]
        parts = [*text[:-1], text[-1] + END_OF_WORD if end else text[-1]]
        steps = [parts]
        while len(parts) > 1:
            ranked = [
                (self._ranks[pair], i)
                for i, pair in enumerate(itertools.pairwise(parts))
                if pair in self._ranks
            ]
            if not ranked:
                break
            _, i = min(ranked)
            parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
            steps.append(parts)
        return steps
