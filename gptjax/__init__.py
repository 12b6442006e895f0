"""GPT-1 in JAX and Flax: pretrain, fine-tune with the joint loss, evaluate, predict, generate.

>>> gpt = gptjax.load("runs/quickstart")     # doctest: +SKIP
>>> gpt.generate("The ", max_new_tokens=50)  # doctest: +SKIP
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.infer.predictor import LoadedGPT

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def load(path: str | os.PathLike[str], **kwargs: Any) -> "LoadedGPT":
    """Loads a checkpoint (see `gptjax.infer.predictor.load`); JAX is imported only now."""
    from gptjax.infer import predictor

    return predictor.load(path, **kwargs)
