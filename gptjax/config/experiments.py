"""Finds experiment files by name or path, and reads them.

Some experiments come with gptjax. The repository has their files in the folder `experiments`, and
an installed gptjax has the same folder inside the package.
"""

import ast
import importlib.machinery
import os
import pathlib
import sys
import traceback
import types

import gptjax
from gptjax.config.schema import Experiment
from gptjax.errors import UserError, brief, nearest, require

QUICKSTART = "quickstart"
"""The experiment that the command line runs if the user names no experiment."""

_MODULE = "gptjax_experiment"


def folder() -> pathlib.Path:
    """Returns the folder of the experiments that come with gptjax."""
    package = pathlib.Path(gptjax.__file__).resolve().parent
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"


def names() -> list[str]:
    """Returns the names of the experiments that come with gptjax, sorted."""
    return sorted(path.stem for path in folder().glob("*.py"))


def summary(name: str) -> str:
    """Returns the first line of the docstring of an experiment that comes with gptjax."""
    source = (folder() / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def find(config: str) -> pathlib.Path:
    """Returns the file of an experiment.

    Args:
      config: the path of a file, or a name from `names()`. A colon and an argument can follow.

    Raises:
      UserError: there is no such file and no such name.
    """
    name = config.partition(":")[0]
    if os.path.isfile(name):
        return pathlib.Path(name)
    known = names()
    if name not in known:
        near = nearest(pathlib.PurePath(name).stem, known)
        hint = near or f"; the experiments are {', '.join(known)}"
        raise UserError(f"`config`={config}: no such file or experiment{hint}")
    return folder() / f"{name}.py"


def load(config: str) -> Experiment:
    """Reads an experiment.

    Args:
      config: the path of a file, or a name from `names()`. The text after a colon is passed to the
        function `get_config` of the file as its argument.

    Raises:
      UserError: there is no such file, or the file does not define an experiment.
    """
    path = find(config)
    module = types.ModuleType(_MODULE)
    module.__file__ = str(path)
    # The file may define dataclasses, and `dataclasses` looks up their module in `sys.modules`.
    sys.modules[_MODULE] = module
    _, colon, argument = config.partition(":")
    try:
        importlib.machinery.SourceFileLoader(_MODULE, str(path)).exec_module(module)
        experiment = module.get_config(*([argument] if colon else []))
    except UserError as error:
        raise UserError(f"`config`={config}: {error}") from error
    except Exception as error:  # a mistake in the file can raise any exception
        raise UserError(f"`config`={config}: {_where(error, path)}{brief(error)}") from error
    require(
        isinstance(experiment, Experiment),
        f"`config`={config}: get_config() of {path} must return a gptjax.config.Experiment, not "
        f"{type(experiment).__name__}",
    )
    return experiment


def _where(error: Exception, path: pathlib.Path) -> str:
    """Returns the path and the line of the experiment file that an error comes from."""
    trace = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in trace if frame.f_code.co_filename == str(path)]
    return f"{path}, line {lines[-1]}: " if lines else f"{path}: "
