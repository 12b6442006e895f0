"""The token ids of texts, which are computed once and kept in the cache.

The token ids of a corpus are a file of raw uint16 or int32 values, which is mapped into memory. A
corpus can be larger than memory, because it is tokenised to disk in pieces, and training reads only
the tokens of its batches.
"""

import importlib.metadata
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from gptjax.data import cache, fingerprints
from gptjax.data.tokens.tokenizer import Tokenizer

_VERSION = 2  # raise it when the same texts and tokenizer give other ids or other files
# The number of texts that are tokenised together: few enough for memory, and enough to keep all
# cores busy.
_TEXTS_AT_ONCE = max(64, 2 * (os.cpu_count() or 1))
# Columns with fewer characters are not cached, because tokenising them takes only a few hundredths
# of a second.
_WORTH_CACHING = 1 << 17
_TOKENS_AT_ONCE = 1 << 22


class StreamStatistics(NamedTuple):
    """Facts about all tokens of a stream. A stream is the token ids of a corpus."""

    fingerprint: str
    """The fingerprint of the token ids. Equal fingerprints mean equal ids."""
    unknown: int
    """The number of tokens that are `<unk>`."""


def token_stream(texts: Iterable[str], tokenizer: Tokenizer, fingerprint: str = "") -> np.ndarray:
    """Returns the ids of all texts in one array [n]: uint16 if every id fits, else int32.

    Args:
      texts: the texts, in their order.
      tokenizer: the tokenizer.
      fingerprint: the fingerprint of the texts. With it the array is mapped from a file of the
        cache. An empty string means that the array is held in memory.
    """
    dtype = _id_type(tokenizer)

    def pieces() -> Iterator[np.ndarray]:
        iterator = iter(texts)
        while chunk := list(itertools.islice(iterator, _TEXTS_AT_ONCE)):
            for ids in tokenizer.encode_batch(chunk):
                yield ids.astype(dtype)

    def write(file: BinaryIO) -> None:
        for ids in pieces():
            file.write(ids.data)

    def read(path: str) -> np.ndarray:
        if not os.path.getsize(path):  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        return np.asarray(np.memmap(path, dtype, mode="r"))  # nothing is read from disk yet

    def make() -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *pieces()])

    name = _cache_name("tokens", fingerprint, tokenizer)
    return cache.get_or_make(name, ".bin", write, read, make)


def statistics(stream: np.ndarray, tokenizer: Tokenizer, fingerprint: str = "") -> StreamStatistics:
    """Returns the statistics of a stream. The whole stream is read for this.

    Args:
      stream: integers [n], token ids.
      tokenizer: the tokenizer that made the stream.
      fingerprint: the fingerprint of the texts. With it the statistics are kept in the cache, so
        the next call does not read the stream. An empty string means that they are not kept.
    """

    def compute() -> StreamStatistics:
        pieces = (stream[i : i + _TOKENS_AT_ONCE] for i in range(0, len(stream), _TOKENS_AT_ONCE))
        unknown = sum(int(np.count_nonzero(piece == tokenizer.unknown_id)) for piece in pieces)
        return StreamStatistics(fingerprints.of_arrays(stream), unknown)

    def write(file: BinaryIO) -> None:
        file.write(json.dumps(compute()._asdict()).encode())

    def read(path: str) -> StreamStatistics:
        with open(path, "rb") as file:
            return StreamStatistics(**json.load(file))

    name = _cache_name("statistics", fingerprint, tokenizer)
    return cache.get_or_make(name, ".json", write, read, compute)


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, use_cache: bool = True
) -> list[np.ndarray]:
    """Returns the token ids of each text, int32 [length].

    Args:
      texts: the texts.
      tokenizer: the tokenizer.
      use_cache: whether to keep the ids in the cache if the texts are long together.
    """

    def make() -> list[np.ndarray]:
        return tokenizer.encode_batch(texts)

    def write(file: BinaryIO) -> None:
        encoded = make()
        ids = np.concatenate(encoded).astype(_id_type(tokenizer))
        np.savez(file, ids=ids, lengths=np.array(list(map(len, encoded)), np.int32))

    def read(path: str) -> list[np.ndarray]:
        with np.load(path, allow_pickle=False) as arrays:
            ids, lengths = arrays["ids"].astype(np.int32), arrays["lengths"]
        ends = np.cumsum(lengths).tolist()
        return [ids[start:end] for start, end in itertools.pairwise([0, *ends])]

    if not use_cache or not cache.folder() or sum(map(len, texts)) < _WORTH_CACHING:
        return make()
    name = _cache_name("texts", fingerprints.of_texts(texts), tokenizer)
    return cache.get_or_make(name, ".npz", write, read, make)


def _id_type(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)


def _cache_name(contents: str, fingerprint: str, tokenizer: Tokenizer) -> str:
    """Returns the name of a cache entry that is made from texts with a tokenizer.

    The name also depends on the versions of the libraries that the tokenizer uses. It is "" (no
    entry) if the texts have no fingerprint.

    Args:
      contents: the kind of the entry, for example "tokens".
      fingerprint: the fingerprint of the texts, or "".
      tokenizer: the tokenizer.
    """
    if not fingerprint:
        return ""
    libraries = ("tokenizers", "ftfy", "spacy") if tokenizer.exact else ("tokenizers",)
    versions = map(importlib.metadata.version, libraries)
    dtype = _id_type(tokenizer).str
    return fingerprints.of_values(contents, _VERSION, fingerprint, tokenizer.hash, dtype, *versions)
