"""The texts of `--help`: an overview of all modes, and the flags and fields of one mode.

A part of the experiment is a group of its fields, such as `model` or `pretrain.optimizer`.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from gptjax.cli import console
from gptjax.cli.flags import COMMON, FLAGS, MODES
from gptjax.config import experiments, schema

_WIDTHS = (60, 100)
"""The smallest and the largest width of a line. Between them the terminal decides."""
_COLUMN = 26
"""The width of the left column, which holds the names of flags and fields."""

_FIRST_FLAGS = {
    "workdir=DIR": MODES["train"].flags["workdir=DIR"],
    "checkpoint=DIR": MODES["predict"].flags["checkpoint=DIR"],
    "input=FILE": "The file or folder to read.",
    "output=FILE": "The file or folder to write.",
}
"""The flags that the overview explains, in addition to the flags that all modes have."""

RECIPE_FIELDS = frozenset({
    "model.activation", "model.segment_types", "model.tied", "model.one_matrix",
    "model.head_dropout_shared", "finetune.lm_mean", "finetune.cut", "finetune.head",
    "finetune.drop_last", "finetune.task_weight", "optimizer.algorithm",
})  # fmt: skip
"""Fields that the recipes in gptjax/config/recipes.py set, and that users rarely set."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the experiment, whose fields have one heading in the help."""

    title: str
    config: type
    """The configuration class whose fields are listed."""
    paths: tuple[str, ...]
    """Dotted paths of the part in the experiment. Several paths have the same fields."""


PARTS: dict[str, Part] = {
    "experiment": Part("The experiment", schema.Experiment, ("",)),
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
    """Returns the help without a mode: each mode with an example, and the most important flags."""
    program = console.program()
    first = [(f"--{flag}", text) for flag, text in COMMON.items()]
    for flag, text in _FIRST_FLAGS.items():
        modes = [name for name, mode in MODES.items() if flag.partition("=")[0] in mode.names]
        first.append((f"--{flag}", f"({', '.join(modes)}) {text}"))
    more = [
        (f"{program} MODE --help", "the flags of a mode and the fields of the experiment"),
        (f"{program} --helpfull", "all flags, with those of the absl library"),
        ("README.md, docs/", "in the repository: examples, results and how it works"),
    ]
    paragraphs = [
        _wrapped("Trains GPT-1 on text, fine-tunes it on labelled rows, and uses the result."),
        _wrapped(
            f"{program} [MODE] [--config=EXPERIMENT] [--config.FIELD=VALUE ...] [other flags]", 2
        ),
        _wrapped(
            "Without arguments it trains the experiment quickstart, on text that comes with "
            "Python, into the folder runs/quickstart."
        ),
        "Modes, with an example of each (train is the default):",
    ]
    for name, mode in MODES.items():
        example = _command(name, mode.example, 13)
        paragraphs.append(_rows([(name, mode.summary)], 11) + "\n" + example)
    paragraphs += ["The flags that matter first:", _rows(first), "More:", _rows(more, 30)]
    return "\n\n".join(paragraphs)


def of_mode(name: str, config: str) -> str:
    """Returns the help of a mode: its flags, then the fields of the experiment, part by part.

    Args:
      name: the name of the mode.
      config: a value of `--config`. The fields are shown with the values of this experiment.

    Raises:
      UserError: there is no such experiment.
    """
    mode = MODES[name]
    program = console.program()
    flags = (COMMON if mode.parts else {}) | mode.flags
    paragraphs = [
        _wrapped(f"{program} {name}: {mode.summary}"),
        _command(name, mode.example, 2),
        "Flags:",
        _rows((f"--{flag}", text + default_note(flag)) for flag, text in flags.items()),
    ]
    if name == "train":
        known = ((each, experiments.summary(each)) for each in experiments.names())
        paragraphs += ["Experiments that come with gptjax:", _rows(known, 18)]
    if mode.parts:
        paragraphs += _parts(mode.parts, config)
    return "\n\n".join([*paragraphs, f"{program} --help lists all modes."])


def _parts(keys: Sequence[str], config: str) -> Iterator[str]:
    """Yields paragraphs with the fields of the parts that have these keys in `PARTS`.

    The fields in `RECIPE_FIELDS` come last.
    """
    experiment = experiments.load(config)
    yield _wrapped(
        f"Fields of the experiment, with their values in {config}. A field is changed by "
        "--config.FIELD=VALUE."
    )
    last: list[tuple[str, str]] = []
    for key in keys:
        part = PARTS[key]
        fields = dict(fields_of(part, experiment))
        rare = {name: row for name, row in fields.items() if f"{key}.{name}" in RECIPE_FIELDS}
        last += [(f"{part.paths[-1]}.{row}", text) for row, text in rare.values()]
        yield _heading(part, experiment)
        yield _rows(row for name, row in fields.items() if name not in rare)
    if last:
        title = "Fields that only recipes set (as in --config=gpt1_task:rte,original): "
        yield _wrapped(title + "--config.FIELD")
        yield _rows(last)


def _heading(part: Part, experiment: schema.Experiment) -> str:
    paths = [f"--config.{path}.FIELD" if path else "--config.FIELD" for path in part.paths]
    lines = [f"{part.title}: {' and '.join(paths)}"]
    if not _docs(part.config):  # the docstring of the class explains the fields instead
        lines.append(inspect.getdoc(part.config) or "")
    lines += [
        f"(The experiment has no such part. --config.{path}=build adds one with these values.)"
        for path in part.paths
        if "." not in path and schema.value_at(experiment, path) is None
    ]
    return "\n".join(map(_wrapped, lines))


def fields_of(part: Part, experiment: schema.Experiment) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields the name of each field of a part, and its row, which is NAME=VALUE and a help text."""
    values = [schema.value_at(experiment, path) for path in part.paths]
    holders = [value for value in values if value is not None] or [part.config()]
    for field in dataclasses.fields(part.config):
        if not schema.part_class(field.type):  # a part inside a part has its own heading
            shown = dict.fromkeys(_shown(getattr(holder, field.name)) for holder in holders)
            row = f"{field.name}={' or '.join(shown)}", _docs(part.config).get(field.name, "")
            yield field.name, row


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _docs(config: type) -> dict[str, str]:
    """Returns field name -> docstring of the field, from the source of a configuration class."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    except OSError:  # the installation has no sources
        return {}
    assert isinstance(tree, ast.ClassDef)
    return {
        ast.unparse(field.target): inspect.cleandoc(ast.literal_eval(text.value)).replace("`", "")
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def default_note(flag: str) -> str:
    """Returns a note on the default of a flag.

    The note is an empty string if the default is empty, 0 or None, because the help text of the
    flag then explains the default.
    """
    name = flag.partition("=")[0]
    default = FLAGS[name].default if name in FLAGS else None
    return f" (default: {default})" if default and isinstance(default, str | int | float) else ""


def _lines(text: str, indent: int, margin: int = 0) -> list[str]:
    """Returns the lines of a text, indented, with the width of the terminal minus the margin."""
    width = min(max(shutil.get_terminal_size().columns, _WIDTHS[0]), _WIDTHS[1])
    space = " " * indent
    return textwrap.wrap(
        text, width - margin, initial_indent=space, subsequent_indent=space,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _wrapped(text: str, indent: int = 0) -> str:
    return "\n".join(_lines(text, indent))


def _rows(rows: Iterable[tuple[str, str]], column: int = _COLUMN) -> str:
    """Returns names and their texts in two columns. A long name has a line of its own."""
    found: list[str] = []
    for name, text in rows:
        lines = _lines(text, column + 2)
        if len(name) < column and lines:
            lines[0] = f"  {name:<{column}}{lines[0].strip()}"
        else:
            lines.insert(0, f"  {name}")
        found += lines
    return "\n".join(found)


def _command(mode: str, arguments: str, indent: int) -> str:
    """Returns an example as several lines that a shell reads as one command."""
    lines = _lines(f"{console.program()} {mode} {arguments}", indent, margin=6)
    return " \\\n    ".join(lines)
