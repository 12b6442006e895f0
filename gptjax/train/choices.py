"""The values of an experiment that its training data chooses (`Experiment.choose`).

The rules below come from measurements, which `experiments/finetune_file.py` lists. A rule sees the
kind of the task, the number of training rows and their lengths in tokens, and whether the model is
pretrained. It does not see the labels of the validation or test rows.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from gptjax.config import schema, validation
from gptjax.config.schema import Experiment, ModelConfig, TaskKind
from gptjax.data import splits, tasks
from gptjax.data.tables.labelled import LabelledTable
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.io import files, remote

# The contexts that are chosen for a model with random weights, in tokens.
_SHORTEST, _LONGEST = 64, 512
_WINDOW = 128
# Texts are read in windows if at least this fraction of the rows is longer than the context.
_MANY_LONG = 0.1
# A context is long enough if at most this fraction of the rows is longer.
_FEW_LONG = 0.01


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about a run on which the rules are based."""

    kind: TaskKind
    rows: int
    """The number of training rows."""
    lengths: np.ndarray
    """int [rows]: the number of tokens of the longest sequence of each row, from
    `tasks.sequence_lengths`."""
    model: ModelConfig
    """The model, with the sizes of the checkpoint in `init_from`."""
    pretrained: bool
    """Whether the run starts from pretrained weights."""
    flattened: bool = False
    """Whether the user chose a task head that reads one padded sequence."""

    @property
    def in_windows(self) -> bool:
        """Whether long texts are read in windows."""
        if self.kind != TaskKind.CLASSIFICATION or self.flattened:
            return False
        context = self.model.context_length if self.pretrained else _WINDOW
        return tasks.share_longer(self.lengths, context) >= _MANY_LONG

    def describe(self) -> str:
        """Returns the facts for the user."""
        weights = "pretrained" if self.pretrained else "random"
        longest = int(self.lengths.max(initial=0))
        return f"{self.rows:,} rows of at most {longest:,} tokens and {weights} weights"


def _context_length(facts: Facts) -> int:
    """Returns the shortest context that nearly all rows fit into."""
    if facts.in_windows:
        return _WINDOW
    context = _SHORTEST
    while context < _LONGEST and tasks.share_longer(facts.lengths, context) > _FEW_LONG:
        context *= 2
    return context


def _long(facts: Facts) -> str:
    return schema.Long.WINDOWS.value if facts.in_windows else schema.Long.CUT.value


RULES: dict[str, Callable[[Facts], Any]] = {
    "model.context_length": _context_length,
    "finetune.long": _long,
}
"""Name of a field -> the function that chooses its value."""


def choose(
    experiment: Experiment,
    model: ModelConfig,
    tokenizer: Tokenizer,
    data: dict[str, LabelledTable],
) -> tuple[Experiment, ModelConfig, tuple[str, ...]]:
    """Returns the experiment with the chosen values, the model, and lines for the user.

    Args:
      experiment: the configuration, from `validation.validate`.
      model: the model of the experiment, with all sizes. If the experiment has an `init_from`, the
        sizes are those of this checkpoint, and no rule changes them.
      tokenizer: the tokenizer.
      data: name of a split -> rows of the fine-tuning.

    Raises:
      UserError: a chosen value contradicts a value that the user set.
    """
    config = experiment.finetune
    names = schema.split_names(experiment.choose)
    if not names or config is None:
        return experiment, model, ()
    lengths = tasks.sequence_lengths(splits.task_spec(config), data["train"], tokenizer)
    facts = Facts(
        TaskKind(config.task),
        len(lengths),
        lengths,
        model,
        bool(experiment.init_from) and config.transfer != "none",
        config.head == schema.Head.FLATTEN and "finetune.head" not in names,
    )
    chosen = {}
    for name in names:
        part, _, field = name.partition(".")
        if experiment.init_from and part == "model" and field in schema.INHERITED_SIZES:
            continue
        chosen[name] = RULES[name](facts)
    for name, value in chosen.items():
        experiment = schema.with_value(experiment, name, value)
        part, _, field = name.partition(".")
        if part == "model":
            model = dataclasses.replace(model, **{field: value})
    experiment = validation.validate(dataclasses.replace(experiment, choose=""))
    values = ", ".join(f"{name}={value}" for name, value in chosen.items())
    line = f"finetune: chosen for {facts.describe()}: {values} (a flag sets another value)"
    return experiment, model, (line,)


def keep_earlier(experiment: Experiment, workdir: str, product: str) -> Experiment:
    """Returns the experiment with the values that an earlier run in the workdir chose.

    Without an earlier run the experiment is not changed.

    Args:
      experiment: the configuration, from `validation.validate`.
      workdir: the folder of the run.
      product: the name of the results in the workdir. If they are missing, there was no run.
    """
    path = os.path.join(workdir, "config.json")
    names = schema.split_names(experiment.choose)
    if not (names and remote.exists(path) and remote.exists(os.path.join(workdir, product))):
        return experiment
    old = schema.from_dict(Experiment, files.read_json(path), path)
    for name in names:
        if (value := schema.value_at(old, name)) is not None:
            experiment = schema.with_value(experiment, name, value)
    return validation.validate(dataclasses.replace(experiment, choose=""))
