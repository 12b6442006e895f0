"""GPT-1 in JAX and Flax: pretrain, fine-tune with the joint loss, evaluate, predict, generate.

>>> gpt = gptjax.load("runs/quickstart")     # doctest: +SKIP
>>> gpt.generate("The ", max_new_tokens=50)  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.infer.predictor import GPT, load

__all__ = ["GPT", "__version__", "load"]
__version__ = "0.1.0"

# The modules of the public names. They are imported at the first use of a name, because they import
# JAX, which takes seconds.
_MODULES = {
    "GPT": "gptjax.infer.predictor",
    "load": "gptjax.infer.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
