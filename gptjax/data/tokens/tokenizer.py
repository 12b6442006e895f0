"""Tokenizers. The kinds are a byte-pair encoding (BPE) as in GPT-1, GPT-1's own, and characters.

All tokenizers use the `tokenizers` library. A tokenizer is saved as one file, `tokenizer.json`,
with its normalisation, vocabulary and decoder. The ids of the vocabulary come first. Then come the
ids of the special tokens, in the order of `SPECIALS`.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import tokenizers
from etils import epath
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from gptjax.config.schema import TokenizerConfig, TokenizerKind, Words
from gptjax.data import cache, fingerprints
from gptjax.data.tokens import gpt1_words, normalize
from gptjax.errors import UserError, require

UNKNOWN = "<unk>"
START, DELIMITER, EXTRACT, PADDING = "_start_", "_delimiter_", "_classify_", "<pad>"
SPECIALS = (START, DELIMITER, EXTRACT, PADDING)
END_OF_WORD = "</w>"

# A field that we add to `tokenizer.json` if `gpt1_words.py` divides the text into words. The
# `tokenizers` library raises an error for a file with this field, as it should, because it cannot
# make these words.
_WORDS = "gptjax_words"

# To be increased when the same texts give another trained tokenizer.
_VERSION = 1
# The number of characters that one call of the library encodes. It is enough to keep all cores busy
# (a row of a corpus has up to 64 Ki characters). A larger number would need more memory, because
# the results need some hundred bytes for each character.
_CHUNK = max(1 << 20, (os.cpu_count() or 1) << 16)


class Tokenizer:
    """A tokenizer, which converts text to token ids and back.

    Attributes:
      exact: whether `gpt1_words.py` divides the text into words. Otherwise the `tokenizers` library
        does.
      start_id, delimiter_id, extract_id, padding_id, unknown_id: the ids of the special tokens.
      hash: the SHA-256 of the serialised tokenizer. Equal hashes mean equal ids for all texts, if
        the versions of the libraries (`tokenizers`, ftfy, spaCy) are equal too.
    """

    def __init__(self, backend: tokenizers.Tokenizer, exact: bool = False):
        self._backend, self.exact = backend, exact
        ids = map(self.token_id, (*SPECIALS, UNKNOWN))
        self.start_id, self.delimiter_id, self.extract_id, self.padding_id, self.unknown_id = ids

    def __len__(self) -> int:
        """Returns the number of ids, including the special tokens."""
        return self._backend.get_vocab_size()

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256 of the serialised tokenizer."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text. The name of a special token in the text is ordinary text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 [length]. All cores are used."""
        ids: list[np.ndarray] = []
        for chunk in _chunks(texts):
            words = [gpt1_words.words(text) for text in chunk] if self.exact else chunk
            encodings = self._backend.encode_batch_fast(
                words, is_pretokenized=self.exact, add_special_tokens=False
            )
            ids += [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without special tokens."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_id(self, token: str) -> int:
        """Returns the id of a token.

        Args:
          token: the token as it is written in the vocabulary, for example "the</w>".

        Raises:
          UserError: there is no such token.
        """
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"tokenizer: it has no token {token}")
        return token_id

    def token(self, token_id: int) -> str:
        """Returns the token with an id, as it is written in the vocabulary."""
        return self._backend.id_to_token(int(token_id)) or UNKNOWN

    def to_json(self) -> str:
        """Returns the serialised tokenizer."""
        text = self._backend.to_str(pretty=False)
        if not self.exact:
            return text
        return json.dumps(json.loads(text) | {_WORDS: Words.EXACT}, ensure_ascii=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`."""
        pathlib.Path(path).write_text(self.to_json(), encoding="utf-8")


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yields the texts in lists of about `_CHUNK` characters."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(_well_formed(text))
        size += len(text) + 1
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _well_formed(text: str) -> str:
    """Returns `text` with each lone surrogate replaced by U+FFFD.

    The `tokenizers` library raises an error for lone surrogates. They come from half an emoji in
    JSON, or from bytes on the command line that are not UTF-8.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _add_specials(backend: tokenizers.Tokenizer, exact: bool = False) -> Tokenizer:
    # With `encode_special_tokens`, the name of a special token in a text is encoded as ordinary
    # characters, so no text can contain a special token. `<unk>` keeps its id.
    backend.add_special_tokens([UNKNOWN, *SPECIALS])
    backend.encode_special_tokens = True
    return Tokenizer(backend, exact)


def from_json(text: str, source: str = "tokenizer.json") -> Tokenizer:
    """Returns the tokenizer from the text that `to_json` has returned.

    Args:
      text: the contents of `tokenizer.json`.
      source: the name of the file, for error messages.

    Raises:
      UserError: the text is not a tokenizer, or the tokenizer lacks our special tokens.
    """
    try:
        values = json.loads(text)
        exact = isinstance(values, dict) and values.pop(_WORDS, None) == Words.EXACT
        backend = tokenizers.Tokenizer.from_str(json.dumps(values) if exact else text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{source}: not a tokenizer ({error})") from error
    for name in (UNKNOWN, *SPECIALS):
        require(backend.token_to_id(name) is not None, f"{source}: it has no token {name}")
    backend.encode_special_tokens = True
    return Tokenizer(backend, exact)


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a `tokenizer.json` file."""
    return from_json(_read(path), str(path))


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return epath.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error


def _bpe(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], exact: bool = False
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNKNOWN, end_of_word_suffix=END_OF_WORD)
    )
    if not exact:
        backend.normalizer = normalize.normalizer()
        # Only a vocabulary that was learnt from spaCy's words has this token. Our own rules never
        # join an apostrophe and a letter to one word.
        english = f"n't{END_OF_WORD}" in vocabulary
        backend.pre_tokenizer = normalize.pre_tokenizer(english)
    backend.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    return backend


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-pair encoding of the same kind as GPT-1's.

    Its tokens are in lower case. `</w>` marks the end of a word, and `<unk>` stands for unknown
    characters.

    Args:
      texts: the training texts. They are read twice, so an iterator is copied to a list.
      vocab_size: the number of ids without the four special tokens. A small text gives fewer ids.
    """
    backend = _bpe({}, [])
    if iter(texts) is texts:
        texts = list(texts)
    # The number of characters is limited, so that texts with many rare characters leave room for
    # merges in the vocabulary. GPT-1's alphabet has 238 symbols.
    symbols = _alphabet(texts, min(1000, max(1, vocab_size // 4)))
    ends = [symbol + END_OF_WORD for symbol in (*symbols, normalize.NEWLINE)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # The symbols are given as `special_tokens`, which fixes their ids. By default the trainer
        # numbers the symbols in the order of a randomly seeded hash map. Because the ids decide
        # between equally frequent merges, each process would then train another tokenizer.
        special_tokens=[UNKNOWN, *symbols, *ends],
        initial_alphabet=symbols,
        limit_alphabet=len(symbols),
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # A new backend is built with the vocabulary and the merges. In the trained backend, all symbols
    # would be special tokens.
    model = json.loads(backend.to_str())["model"]
    return _add_specials(_bpe(model["vocab"], [(left, right) for left, right in model["merges"]]))


def _alphabet(texts: Iterable[str], limit: int) -> list[str]:
    """Returns the most frequent characters of the normalised texts, sorted by code point.

    Args:
      texts: the texts.
      limit: the largest number of characters.
    """
    raw: Counter[str] = Counter()
    for chunk in texts:
        raw.update(unicodedata.normalize("NFC", chunk))
    normalized = normalize.normalizer().normalize_str
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for normal in "".join(normalized(character).split()):
            counts[normal] += count
    return sorted(sorted(counts, key=lambda normal: (-counts[normal], normal))[:limit])


def load_gpt1(vocab_file: str, merges_file: str, exact: bool = False) -> Tokenizer:
    """Loads GPT-1's own tokenizer from its two files.

    Args:
      vocab_file: the file `encoder_bpe_40000.json`, a JSON object of token: id.
      merges_file: the file `vocab_40000.bpe`, with one merge in each line.
      exact: whether `gpt1_words.py`, which needs ftfy and spaCy, divides the text into exactly the
        words of the authors' code. Otherwise `normalize.py` does so approximately.
    """
    try:
        vocabulary = json.loads(_read(vocab_file))
    except json.JSONDecodeError as error:
        raise UserError(f"{vocab_file}: not JSON ({error})") from error
    _check_vocabulary(vocabulary, vocab_file)
    merges = []
    for number, line in enumerate(_read(merges_file).split("\n"), 1):
        if line and not (number == 1 and line.startswith("#version")):
            merges.append(_merge(line.split(), vocabulary, f"{merges_file}: line {number}"))
    return _add_specials(_bpe(vocabulary, merges, exact), exact)


def from_huggingface(values: Any, source: str, exact: bool = False) -> Tokenizer:
    """Builds GPT-1's tokenizer from the contents of a Hugging Face `tokenizer.json`.

    Args:
      values: the parsed JSON. Only its vocabulary and merges are used.
      source: the name of the file, for error messages.
      exact: whether `gpt1_words.py` divides the text into words. Otherwise `normalize.py` does so.
    """
    try:
        vocabulary, lines = values["model"]["vocab"], values["model"]["merges"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{source}: has no BPE vocabulary and merges") from error
    _check_vocabulary(vocabulary, source)
    pairs = [line.split() if isinstance(line, str) else line for line in lines]
    merges = [_merge(pair, vocabulary, f"{source}: merge {i}") for i, pair in enumerate(pairs, 1)]
    return _add_specials(_bpe(vocabulary, merges, exact), exact)


def _merge(pair: Sequence[str], vocabulary: dict[str, int], source: str) -> tuple[str, str]:
    require(len(pair) == 2, f"{source}: a merge is two symbols, not {' '.join(pair)!r}")
    for symbol in (*pair, "".join(pair)):
        require(symbol in vocabulary, f"{source}: {symbol!r} is not in the vocabulary")
    return pair[0], pair[1]


def _check_vocabulary(vocabulary: Any, path: str) -> None:
    """Checks that a vocabulary has the ids 0, 1, 2, ..., so special tokens can get the next ids."""
    require(isinstance(vocabulary, dict), f"{path}: must be one JSON object of token: id")
    seen: set[int] = set()
    for token, index in vocabulary.items():
        require(
            type(index) is int and 0 <= index < len(vocabulary) and index not in seen,
            f"{path}: token {token!r} has the id {index!r}; the ids of {len(vocabulary)} tokens "
            f"are 0 to {len(vocabulary) - 1}, each once",
        )
        seen.add(index)
    require(UNKNOWN in vocabulary, f"{path}: it has no token {UNKNOWN}")
    for name in SPECIALS:
        require(name not in vocabulary, f"{path}: {name} must not be in it; it is added")


def train_characters(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer with one token for each character, sorted by code point.

    It is for teaching and for tiny models.
    """
    characters = sorted(set(itertools.chain.from_iterable(texts)))
    vocabulary = {name: i for i, name in enumerate([UNKNOWN, *characters])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _add_specials(backend)


def build(config: TokenizerConfig, texts: Iterable[str], fingerprint: str = "") -> Tokenizer:
    """Loads or trains the tokenizer that `config` describes.

    Args:
      config: the configuration of the tokenizer.
      texts: the training texts. They are read only if a tokenizer is trained.
      fingerprint: the fingerprint of the texts. With it a trained tokenizer is kept in the cache.
        An empty string means that it is not kept.
    """
    if config.file:
        return load(config.file)
    if config.kind == TokenizerKind.GPT1:
        require(
            config.vocab_file and config.merges_file,
            "`tokenizer.kind`=gpt1: give `tokenizer.vocab_file` and `tokenizer.merges_file`",
        )
        return load_gpt1(config.vocab_file, config.merges_file, config.words == Words.EXACT)

    def train() -> Tokenizer:
        if config.kind == TokenizerKind.CHARACTER:
            return train_characters(texts)
        return train_bpe(texts, config.vocab_size)

    def write(file: BinaryIO) -> None:
        file.write(train().to_json().encode())

    if not fingerprint:
        return train()
    name = fingerprints.of_values(
        "tokenizer", _VERSION, fingerprint, config.kind, config.vocab_size,
        _bpe({}, []).to_str(), tokenizers.__version__,
    )  # fmt: skip
    return cache.get_or_make(name, ".json", write, load, train)


def pair_texts(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Returns the texts of vocabulary file and merges file; None if the tokenizer is not a BPE.

    The files have the format of GPT-1's release.
    """
    pair = vocabulary_pair(tokenizer)
    if pair is None:
        return None
    merges = "\n".join(["#version: 0.2", *pair[1], ""])
    return json.dumps(pair[0], ensure_ascii=False), merges


def vocabulary_pair(tokenizer: Tokenizer) -> tuple[dict[str, int], list[str]] | None:
    """Returns (vocabulary, merges) without special tokens; None if the tokenizer is no BPE."""
    model = json.loads(tokenizer.to_json())["model"]
    if model["type"] != "BPE":
        return None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return model["vocab"], merges
