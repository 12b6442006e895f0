"""Messages of the library as a person at the command line reads them."""

import re
from collections.abc import Iterable


def with_flags(message: str, flags: Iterable[str], fields: Iterable[str]) -> str:
    """Returns a message with the arguments and fields in backquotes turned into flags.

    The library speaks of Python arguments (`top_p`) and of fields of the configuration
    (`pretrain.window`). Whoever runs a command knows them as flags. A name that is neither stays.

    Args:
      message: from the library.
      flags: names of the flags of the mode; they win where a field has the same name.
      fields: dotted names of the fields of an experiment.

    >>> with_flags("`top_p`=2: must be at most 1", ["top_p"], [])
    '--top_p=2: must be at most 1'
    >>> with_flags("`model.width`=0: must be greater than 0", [], ["model.width"])
    '--config.model.width=0: must be greater than 0'
    """
    flags, fields = set(flags), set(fields)

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        # An entry of a dictionary has the name that the experiment gives it.
        general = re.sub(r"^(ablation\.tasks|probes)\.[\w-]+", r"\1.NAME", name)
        if name in flags:
            return f"--{name}"
        return f"--config.{name}" if name in fields or general in fields else match[0]

    return re.sub(r"`([\w.-]+)`", flag, message)
