"""Texts -> token ids in a row, kept in the cache and mapped into memory from there.

A stream is a raw `.npy` file: a corpus larger than memory is tokenised to disk a piece at a time,
and training reads the windows it needs.
"""

import hashlib
import importlib.metadata
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from gptjax.data import cache
from gptjax.data.tokens.tokenizer import Tokenizer

_VERSION = 1  # raise it when equal texts and tokenizers give other ids than before
# Texts tokenised at a time: bounds memory on a large corpus, and keeps all cores busy.
_TEXTS = max(64, 2 * (os.cpu_count() or 1))
# Columns with fewer characters are tokenised in a few hundredths of a second.
_WORTH_KEEPING = 1 << 17
# Tokens looked at a time.
_TOKENS = 1 << 22


def token_stream(texts: Iterable[str], tokenizer: Tokenizer, content: str = "") -> np.ndarray:
    """Returns [n]: the ids of all texts, one after the other; uint16 where all ids fit, else int32.

    Args:
      texts: in order.
      tokenizer: text -> ids.
      content: names the contents of the texts. The stream is then kept in the cache, and the array
        reads from there; "": it is held in memory.
    """
    return _stream(texts, tokenizer, content, ends=False)


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """As `Tokenizer.encode_batch`, but kept in the cache where there is much text; ids may be
    uint16.
    """
    if sum(map(len, texts)) < _WORTH_KEEPING or not cache.folder():
        return tokenizer.encode_batch(texts)
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(b"%d:" % len(data))
        digest.update(data)
    stream = _stream(texts, tokenizer, digest.hexdigest(), ends=True)
    ends = np.flatnonzero(stream == tokenizer.padding_id)
    starts = [0, *(ends[:-1] + 1).tolist()]
    return [stream[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]


def count(stream: np.ndarray, token_id: int) -> int:
    """Returns how often a token occurs, without reading all of the stream at once."""
    pieces = (stream[i : i + _TOKENS] for i in range(0, len(stream), _TOKENS))
    return sum(int(np.count_nonzero(piece == token_id)) for piece in pieces)


def _stream(texts: Iterable[str], tokenizer: Tokenizer, content: str, ends: bool) -> np.ndarray:
    # No text holds a padding token: it can mark where each text ends.
    end = [tokenizer.padding_id] if ends else []
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)

    def write(file: BinaryIO) -> None:
        _write(file, _pieces(texts, tokenizer, end), dtype)

    if content:
        name = cache.key("tokens", _VERSION, content, *_identity(tokenizer), dtype.str, ends)
        found = cache.kept(name, ".npy", write, _open)
        if found is not None:
            return found
    buffer = io.BytesIO()
    write(buffer)
    buffer.seek(0)
    np.lib.format.read_magic(buffer)
    (length,), _, _ = np.lib.format.read_array_header_1_0(buffer)
    if not length:
        return np.zeros(0, dtype)
    return np.frombuffer(buffer.getbuffer(), dtype, length, buffer.tell())


def _open(path: str) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # a view, nothing is read


def _identity(tokenizer: Tokenizer) -> Iterator[str]:
    """All that decides the ids of a text: the tokenizer with its normaliser, and libraries."""
    yield tokenizer.hash
    for library in ("tokenizers", "ftfy", "spacy") if tokenizer.exact else ("tokenizers",):
        yield importlib.metadata.version(library)


def _pieces(texts: Iterable[str], tokenizer: Tokenizer, end: list[int]) -> Iterator[np.ndarray]:
    iterator = iter(texts)
    mark = np.array(end, np.int32)
    while chunk := list(itertools.islice(iterator, _TEXTS)):
        for ids in tokenizer.encode_batch(chunk):
            yield ids
            yield mark


def _write(file: BinaryIO, pieces: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Writes a `.npy` file whose length is known only at the end."""

    def header(length: int) -> int:
        file.seek(0)
        descr = np.lib.format.dtype_to_descr(dtype)
        fields = {"descr": descr, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, fields)  # leaves room for a longer number
        return file.tell()

    start, length = header(0), 0
    for piece in pieces:
        file.write(np.ascontiguousarray(piece, dtype).data)
        length += len(piece)
    if header(length) != start:
        raise OSError("the header of the file has grown")
