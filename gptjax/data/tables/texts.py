"""Running text in memory: rows of strings, and the fingerprint of their contents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from gptjax.data import fingerprints

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_ONCE = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Running text. All rows, joined without a separator, are the corpus.

    Iterating yields the rows as strings, any number of times. The rows may be mapped from a file:
    only a few of them are in memory at a time.
    """

    rows: pa.ChunkedArray
    """Strings."""
    fingerprint: str
    """Names the rows: texts of equal fingerprints have equal rows. It is computed once, where the
    rows are read. Equal rows may have different fingerprints if they come from different places."""

    @classmethod
    def of(cls, rows: pa.ChunkedArray | Iterable[str]) -> Texts:
        """Returns the rows with the fingerprint of their contents, for which all are read once."""
        import pyarrow as pa

        if not isinstance(rows, pa.ChunkedArray):
            rows = pa.chunked_array([pa.array(rows, pa.string())])
        return cls(rows, fingerprints.of_texts(_strings(rows)))

    def __iter__(self) -> Iterator[str]:
        """Yields the rows in order."""
        return _strings(self.rows)


def _strings(rows: pa.ChunkedArray) -> Iterator[str]:
    for chunk in rows.chunks:
        for start in range(0, len(chunk), _ROWS_AT_ONCE):
            yield from chunk.slice(start, _ROWS_AT_ONCE).to_pylist()
