"""Messages of the library, reworded for a person at the command line."""

import os
import re
import sys

from gptjax.cli.flags import MODES, general_field
from gptjax.config import schema


def program() -> str:
    """Returns the command that started this program, without its arguments.

    The command is `gptjax`, `python -m gptjax`, or `python` with the path of `launch.py`.
    """
    name = os.path.basename(sys.argv[0])
    if name == "__main__.py":
        return "python -m gptjax"
    return f"python {sys.argv[0]}" if name.endswith(".py") else name


def with_flags(message: str, mode: str) -> str:
    """Returns a message of the library with the names in backquotes turned into flags.

    The library names Python arguments (`top_p`) and fields of the configuration
    (`pretrain.window`). A name can be an argument and a field: `seed` is a flag of the mode
    `generate`, and a field of the experiment that `train` reads. Therefore a name is first looked
    up among the flags of the mode, then among the fields, then among the flags of other modes. A
    name that is not found is not changed.

    Args:
      message: a message of the library.
      mode: the mode that runs.

    >>> with_flags("`top_p`=2: must be at most 1", "generate")
    '--top_p=2: must be at most 1'
    >>> with_flags("`model.width`=0: must be greater than 0", "train")
    '--config.model.width=0: must be greater than 0'
    >>> with_flags("`seed`=-1: too small", "generate"), with_flags("`seed`=-1: too small", "train")
    ('--seed=-1: too small', '--config.seed=-1: too small')
    """
    own = MODES[mode].names | {"mode", "config"}
    others = frozenset[str]().union(*(each.names for each in MODES.values()))
    fields = set(schema.field_names(schema.Experiment))

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        if name in own:
            return f"--{name}"
        if general_field(name) in fields:
            return f"--config.{name}"
        return f"--{name}" if name in others else match[0]

    return re.sub(r"`([\w.-]+)`", flag, message)
