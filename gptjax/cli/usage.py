"""The texts of `--help`: an overview of all modes, and one mode with its flags and fields."""

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.cli import console
from gptjax.cli.flags import COMMON, FLAGS, MODES
from gptjax.config import experiments, schema
from gptjax.config.schema import Experiment

_WIDTHS = (60, 100)
"""Narrower and wider terminals get lines of these widths."""
_COLUMN = 26
"""Width of the left column, with the names of flags and fields."""

_FIRST_FLAGS = {
    "workdir=DIR": MODES["train"].flags["workdir=DIR"],
    "checkpoint=DIR": MODES["predict"].flags["checkpoint=DIR"],
    "input=FILE": "The file or folder to read.",
    "output=FILE": "The file or folder to write.",
}
"""The flags that the overview explains, besides those of all modes."""

RECIPE_FIELDS = frozenset({
    "model.activation", "model.segment_types", "model.tied", "model.one_matrix",
    "model.head_dropout_shared", "finetune.lm_mean", "finetune.cut", "finetune.head",
    "finetune.drop_last", "finetune.task_weight", "optimizer.algorithm",
})  # fmt: skip
"""Fields that the recipes set (gptjax/config/recipes.py) and hardly anyone else."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of fields of the experiment under one heading."""

    title: str
    config: type
    """The configuration class whose fields are listed."""
    paths: tuple[str, ...] = ()
    """Where the experiment has it; several paths have the same fields."""
    only: tuple[str, ...] = ()
    """The fields to list; empty: all of them."""


PARTS: dict[str, Part] = {
    "experiment": Part("The experiment", Experiment, ("",), ("name", "seed", "init_from")),
    "finetune": Part("Fine-tuning", schema.FinetuneConfig, ("finetune",)),
    "pretrain": Part("Pretraining", schema.PretrainConfig, ("pretrain",)),
    "tokenizer": Part("Tokenizer", schema.TokenizerConfig, ("tokenizer",)),
    "model": Part("Model", schema.ModelConfig, ("model",)),
    "optimizer": Part(
        "Optimizer", schema.OptimizerConfig, ("pretrain.optimizer", "finetune.optimizer")
    ),
    "mesh": Part("Devices", schema.MeshConfig, ("mesh",)),
    "checkpoint": Part("Checkpoints", schema.CheckpointConfig, ("checkpoint",)),
    "probes": Part("Zero-shot probes", schema.ProbeConfig, ("probes.NAME",)),
    "ablation": Part("Ablation", schema.AblationConfig, ("ablation",)),
}


def overview() -> str:
    """Returns the help without a mode: the modes with an example, and the first flags."""
    program = console.program()
    lines = [
        *_paragraph("Trains GPT-1 on text, fine-tunes it on labelled rows, and uses the result."),
        "",
        *_paragraph(
            f"{program} [MODE] [--config=EXPERIMENT] [--config.FIELD=VALUE ...] [other flags]", 2
        ),
        "",
        *_paragraph(
            "Without arguments it trains the experiment quickstart, on text that comes with "
            "Python, into the folder runs/quickstart."
        ),
        "",
        "Modes, with an example of each (train is the default):",
    ]
    for name, mode in MODES.items():
        lines += ["", *_row(name, mode.summary, 11), *_command(name, mode.example, 13)]
    lines += ["", "The flags that matter first:", ""]
    for flag, text in COMMON.items():
        lines += _row(f"--{flag}", text)
    for flag, text in _FIRST_FLAGS.items():
        modes = [name for name, mode in MODES.items() if flag.partition("=")[0] in mode.names]
        lines += _row(f"--{flag}", f"({', '.join(modes)}) {text}")
    lines += [
        "",
        "More:",
        "",
        *_row(f"{program} MODE --help", "the flags of a mode and the fields of the experiment", 30),
        *_row(f"{program} --helpfull", "all flags, with those of the absl library", 30),
        *_row("README.md, docs/", "in the repository: examples, results and how it works", 30),
    ]
    return "\n".join(lines) + "\n"


def of_mode(name: str, config: str) -> str:
    """Returns the help of a mode: its flags, then the fields of the experiment, by parts.

    Args:
      name: of the mode.
      config: a value of `--config`; the fields are shown with the values of this experiment.

    Raises:
      UserError: there is no such experiment.
    """
    mode = MODES[name]
    program = console.program()
    lines = [
        *_paragraph(f"{program} {name}: {mode.summary}"),
        "",
        *_command(name, mode.example, 2),
        "",
        "Flags:",
        "",
    ]
    for flag, text in ((COMMON if mode.parts else {}) | mode.flags).items():
        lines += _row(f"--{flag}", text + _default(flag.partition("=")[0]))
    if name == "train":
        lines += ["", "Experiments that come with gptjax:", ""]
        for each in experiments.names():
            lines += _row(each, experiments.summary(each), 18)
    if mode.parts:
        lines += _parts(mode.parts, config)
    lines += ["", f"{program} --help lists all modes."]
    return "\n".join(lines) + "\n"


def _parts(keys: Sequence[str], config: str) -> list[str]:
    """Returns the fields of the parts with these keys; those that recipes set come last."""
    experiment = experiments.load(config)
    lines = ["", *_paragraph(
        f"Fields of the experiment, with their values in {config}. A field is changed by "
        "--config.FIELD=VALUE."
    )]  # fmt: skip
    last: list[str] = []
    for key in keys:
        part = PARTS[key]
        lines += ["", *_heading(part, experiment), ""]
        for field, values, text in _fields(part, experiment):
            if f"{key}.{field}" in RECIPE_FIELDS:
                last += _row(f"{part.paths[-1]}.{field}={values}", text)
            else:
                lines += _row(f"{field}={values}", text)
    if last:
        title = "Fields that only recipes set (as in --config=gpt1_task:rte,original): "
        lines += ["", *_paragraph(title + "--config.FIELD"), "", *last]
    return lines


def _heading(part: Part, experiment: Experiment) -> Iterator[str]:
    paths = [f"--config.{path}.FIELD" if path else "--config.FIELD" for path in part.paths]
    yield from _paragraph(f"{part.title}: {' and '.join(paths)}")
    if not _docs(part.config):  # then the docstring of the class explains its fields
        yield from _paragraph(inspect.getdoc(part.config) or "")
    for path in part.paths:
        if _value(experiment, path) is None and "." not in path:
            yield from _paragraph(
                f"(The experiment has no such part. --config.{path}=build adds one with these "
                "values.)"
            )


def _value(config: Any, path: str) -> Any:
    """Returns what a configuration has at a dotted path; None: it does not have it."""
    for name in path.split(".") if path else ():
        config = getattr(config, name, None)
    return config


def _fields(part: Part, experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """Yields name, values and help of the fields of a part that have a value of their own."""
    holders = [_value(experiment, path) for path in part.paths]
    holders = [holder for holder in holders if holder is not None] or [part.config()]
    for field in dataclasses.fields(part.config):
        values = [getattr(holder, field.name) for holder in holders]
        if field.name not in (part.only or (field.name,)) or _has_fields(values[0]):
            continue
        shown = dict.fromkeys(_shown(value) for value in values)
        yield field.name, " or ".join(shown), _docs(part.config).get(field.name, "")


def _has_fields(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, dict)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _docs(config: type) -> dict[str, str]:
    """Returns field name -> its docstring, from the source of a configuration class."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    except OSError:  # the installation has no sources
        return {}
    assert isinstance(tree, ast.ClassDef)
    found, name = {}, ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = inspect.cleandoc(str(node.value.value)).replace("`", "")
            name = ""
        else:
            name = ""
    return found


def _default(flag: str) -> str:
    """Returns a note on the default of a flag, or "" for defaults that its help text explains."""
    default = FLAGS[flag].default if flag in FLAGS else None
    return f" (default: {default})" if default and isinstance(default, str | int | float) else ""


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, _WIDTHS[0]), _WIDTHS[1])


def _paragraph(text: str, indent: int = 0) -> list[str]:
    space = " " * indent
    return textwrap.wrap(
        " ".join(text.split()), _width(), initial_indent=space, subsequent_indent=space,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _row(name: str, text: str, column: int = _COLUMN) -> list[str]:
    """Returns a name and its text in two columns; a long name has a line of its own."""
    lines = _paragraph(text, column + 2)
    if len(name) < column and lines:
        return [f"  {name:<{column}}{lines[0].strip()}", *lines[1:]]
    return [f"  {name}", *lines]


def _command(mode: str, arguments: str, indent: int) -> list[str]:
    """Returns an example as lines that a shell takes as one command."""
    pieces = textwrap.wrap(
        f"{console.program()} {mode} {arguments}", _width() - indent - 6,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    lines = [" " * (indent + 4 * (i > 0)) + piece for i, piece in enumerate(pieces)]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
