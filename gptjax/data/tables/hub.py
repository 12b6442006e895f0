"""Data sets of the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptjax.data.tables.files import import_datasets
from gptjax.errors import UserError, brief, nearest

if TYPE_CHECKING:
    from datasets import Dataset


def load_hub(name: str, split: str) -> Dataset:
    """Loads one split of a data set from the Hugging Face hub or a local folder of data files.

    Args:
      name: "owner/name", "owner/name:config" or a folder.
      split: a name such as "train", or a slice such as "train[:1000]".

    Raises:
      UserError: no such data set, no network, no such split (the message lists the existing ones),
        or a data set that needs its own code to load (that code is never run).
    """
    datasets = import_datasets()
    repository, _, config = name.partition(":")
    try:
        return datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # remote data sets and the network raise exceptions of many types
        try:
            offline = isinstance(error, ConnectionError)
            splits = [] if offline else datasets.get_dataset_split_names(repository, config or None)
        except Exception:
            splits = []
        if splits and split.partition("[")[0] not in splits:
            message = f"no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}"
        else:
            message = f"cannot load split {split!r} ({brief(error)})"
            message += "; check the name and the network, or give files instead"
        raise UserError(f"data set {name}: {message}") from error
