"""Data sets of the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptjax.data.tables.files import import_datasets
from gptjax.errors import UserError, brief, nearest

if TYPE_CHECKING:
    from datasets import Dataset


def load_hub(spec: str, split: str) -> Dataset:
    """Loads one split of a data set from the Hugging Face hub, or of a local folder of data files.

    Args:
      spec: "owner/name", "owner/name:config" or a folder.
      split: such as "train"; slices such as "train[:1000]" work too.

    Raises:
      UserError: not found, offline, an unknown split (names those that exist), or a data set that
        needs its own code to load (never run here).
    """
    datasets = import_datasets()
    name, _, config = spec.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # whatever a remote data set or the network does wrong
        try:
            offline = isinstance(error, ConnectionError)
            splits = [] if offline else datasets.get_dataset_split_names(name, config or None)
        except Exception:
            splits = []
        if splits and split.partition("[")[0] not in splits:
            message = f"no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}"
        else:
            message = f"cannot load split {split!r} ({brief(error)})"
            message += "; check the name and the network, or give files instead"
        raise UserError(f"data set {spec}: {message}") from error
