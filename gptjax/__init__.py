"""GPT-1 in JAX and Flax: pretrain, fine-tune with the joint loss, evaluate, predict, generate.

>>> gpt = gptjax.finetune("train.csv", text="review", label="stars")  # doctest: +SKIP
>>> gpt.predict({"text": ["A good film."]}).labels                    # doctest: +SKIP
['5']

`gptjax.finetune` takes a file, a mapping of columns, a pandas DataFrame, a pyarrow Table or a
`datasets.Dataset`, and returns a `GPT`. `gptjax.pretrain` trains on plain text, and `gptjax.load`
reads a model from disk. The command `python launch.py` does the same and more, and
`python launch.py --help` lists its modes.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.api import finetune, pretrain
    from gptjax.explain.model import GPT, load
    from gptjax.infer.inside import Changes

__all__ = ["GPT", "Changes", "__version__", "finetune", "load", "pretrain"]
__version__ = "0.1.0"

# Public name -> its module. A module is imported when a name is used for the first time, because
# the modules import JAX, which takes seconds.
_MODULES = {
    "GPT": "gptjax.explain.model",
    "Changes": "gptjax.infer.inside",
    "load": "gptjax.explain.model",
    "finetune": "gptjax.api",
    "pretrain": "gptjax.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
