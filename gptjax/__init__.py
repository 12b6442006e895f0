"""GPT-1 in JAX and Flax: pretrain, fine-tune with the joint loss, evaluate, predict, generate.

>>> gpt = gptjax.load("runs/quickstart")     # doctest: +SKIP
>>> gpt.generate("The ", max_new_tokens=50)  # doctest: +SKIP
"""

import os
from typing import TYPE_CHECKING, Any

from gptjax.version import __version__

if TYPE_CHECKING:
    from gptjax.api import LoadedGPT

__all__ = ["__version__", "load"]


def load(path: str | os.PathLike[str], **kwargs: Any) -> "LoadedGPT":
    """Loads a checkpoint (see `gptjax.api.load`); JAX is imported only now."""
    from gptjax import api

    return api.load(path, **kwargs)
