"""The values of an experiment that its training data chooses (`Experiment.choose`).

The rules below come from measurements, which `docs/your_data.md` lists. A rule sees the kind of the
task, the number of training rows and their lengths in tokens, and whether the model is pretrained.
It sees no label, and no validation or test row.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from gptjax.config import schema, validation
from gptjax.config.schema import Experiment, FinetuneConfig, ModelConfig, TaskKind
from gptjax.data import splits, tasks
from gptjax.data.tables.labelled import LabelledTable
from gptjax.data.tokens.tokenizer import Tokenizer

# The shortest and the longest context that is chosen, and the context for windows, in tokens.
_SHORTEST, _LONGEST, _WINDOW = 64, 512, 128
# Texts are read in windows if at least this fraction of the rows is longer than the context.
_MANY_LONG = 0.1
# A context is long enough if at most this fraction of the rows is longer.
_FEW_LONG = 0.01
# The values of the paper, for pretrained models.
_PAPER_DROPOUT, _PAPER_LM_WEIGHT, _PAPER_BATCH_SIZE = 0.1, 0.5, 32
# With random weights and fewer texts to classify than this, small batches are better. Perhaps the
# noise of their gradients keeps the model from memorising the texts.
_FEW_ROWS, _SMALL_BATCH_SIZE = 20_000, 8
# The steps that a small data set gets, and the rows that are read of a large one in all epochs.
_MIN_STEPS, _ROWS_READ = 400, 60_000
# Models narrower than 64 would get a higher rate than this, but no such model was measured.
_HIGHEST_RATE = 3e-3


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about a run on which the rules are based."""

    kind: TaskKind
    rows: int
    """The number of training rows."""
    lengths: np.ndarray
    """int [rows]: the number of tokens of the longest sequence of each row, from
    `tasks.sequence_lengths`."""
    width: int
    """The width of the model."""
    pretrained: bool
    """Whether the experiment has pretrained weights (`init_from`). The same experiment without them
    (`transfer` none), as a comparison, keeps the values for pretrained weights."""
    context_length: int = 0
    """The context, if the user or the checkpoint in `init_from` has set it. 0 means that it is to
    be chosen."""
    flattened: bool = False
    """Whether the user chose a task head that reads one padded sequence."""

    @property
    def in_windows(self) -> bool:
        """Whether long texts are read in windows."""
        if self.kind != TaskKind.CLASSIFICATION or self.flattened:
            return False
        return tasks.share_longer(self.lengths, self.context_length or _WINDOW) >= _MANY_LONG

    def describe(self) -> str:
        """Returns the facts for the user."""
        weights = "pretrained" if self.pretrained else "random"
        longest = int(self.lengths.max(initial=0))
        return f"{self.rows:,} rows of at most {longest:,} tokens and {weights} weights"


Rule = Callable[[Facts, FinetuneConfig], Any]
"""A function that chooses the value of a field. Its second argument has the values that the user
set and those that were chosen before, in the order of `RULES`."""


def _context_length(facts: Facts, _: FinetuneConfig) -> int:
    """Returns the shortest context that nearly all rows fit into."""
    if facts.in_windows:
        return _WINDOW
    context = _SHORTEST
    while context < _LONGEST and tasks.share_longer(facts.lengths, context) > _FEW_LONG:
        context *= 2
    return context


def _long(facts: Facts, _: FinetuneConfig) -> str:
    return schema.Long.WINDOWS.value if facts.in_windows else schema.Long.CUT.value


def _head(facts: Facts, config: FinetuneConfig) -> str:
    """Returns the input of the task head. With windows, the mean was a little better."""
    windows = config.long == schema.Long.WINDOWS
    mean = windows and not facts.pretrained
    return schema.Head.MEAN.value if mean else schema.Head.EXTRACT.value


def _dropout(usual: float) -> Rule:
    """Returns a rule for a dropout probability.

    Args:
      usual: the probability for random weights. Such a model memorises a few thousand rows, except
        with much dropout. In a multiple choice much dropout hides what tells the answers apart.
    """

    def rule(facts: Facts, _: FinetuneConfig) -> float:
        little = facts.pretrained or facts.kind == TaskKind.MULTIPLE_CHOICE
        return _PAPER_DROPOUT if little else usual

    return rule


def _lm_weight(facts: Facts, _: FinetuneConfig) -> float:
    """Returns lambda: that of the paper, or 0 for random weights.

    From random weights the LM loss takes two thirds of the time, and it made no score clearly
    better.
    """
    return _PAPER_LM_WEIGHT if facts.pretrained else 0.0


def _batch_size(facts: Facts, _: FinetuneConfig) -> int:
    few = facts.rows < _FEW_ROWS and facts.kind == TaskKind.CLASSIFICATION
    return _SMALL_BATCH_SIZE if few and not facts.pretrained else _PAPER_BATCH_SIZE


def _epochs(facts: Facts, config: FinetuneConfig) -> float:
    """Returns the number of epochs.

    A small data set gets more, so that there are about 400 steps. A large data set gets fewer, so
    that about 60,000 rows are read, but each row at least once.
    """
    usual, most = (3.0, 6.0) if facts.pretrained else (6.0, 30.0)
    enough = _MIN_STEPS * config.batch_size / facts.rows
    affordable = _ROWS_READ / facts.rows
    return float(max(1, round(min(max(usual, enough), most, affordable))))


def _learning_rate(facts: Facts, config: FinetuneConfig) -> float:
    """Returns a learning rate for the width of the model and the batch size.

    For a batch size of 32, two rates are known: 1e-3 for width 128, which was measured, and the
    paper's 6.25e-5 for width 768. The line between them (on logarithmic axes) gives the rates of
    other widths. For Adam, the rate grows with the square root of the batch size (Malladi et al.
    2022).
    """
    slope = math.log(1e-3 / 6.25e-5) / math.log(768 / 128)
    rate = min(_HIGHEST_RATE, 1e-3 * (128 / facts.width) ** slope)
    return float(f"{rate * math.sqrt(config.batch_size / _PAPER_BATCH_SIZE):.3g}")


RULES: dict[str, Rule] = {
    "model.context_length": _context_length,
    "model.embedding_dropout": _dropout(0.6),
    "model.residual_dropout": _dropout(0.3),
    "model.head_dropout": _dropout(0.4),
    "finetune.long": _long,
    "finetune.head": _head,
    "finetune.lm_weight": _lm_weight,
    "finetune.batch_size": _batch_size,
    "finetune.epochs": _epochs,
    "finetune.optimizer.learning_rate": _learning_rate,
}
"""Name of a field -> the function that chooses its value."""


def choose(
    experiment: Experiment,
    model: ModelConfig,
    tokenizer: Tokenizer,
    data: dict[str, LabelledTable],
    in_memory: Collection[str] = (),
) -> tuple[Experiment, ModelConfig, tuple[str, ...]]:
    """Returns the experiment with the chosen values, the model, and lines for the user.

    Args:
      experiment: the configuration, from `validation.validate`.
      model: the model of the experiment, with all sizes. If the experiment has an `init_from`, the
        sizes are those of this checkpoint, and no rule changes them.
      tokenizer: the tokenizer.
      data: name of a split -> rows of the fine-tuning.
      in_memory: the stages whose data are tables in memory.

    Raises:
      UserError: a chosen value contradicts a value that the user set.
    """
    config = experiment.finetune
    assert config is not None
    names = schema.split_names(experiment.choose)
    # The checkpoint in `init_from` has set the sizes.
    inherited = {f"model.{name}" for name in schema.INHERITED_SIZES if experiment.init_from}
    unused = {"finetune.epochs"} if config.steps else set()
    chosen_by_data = set(names) - inherited - unused
    lengths = tasks.sequence_lengths(splits.task_spec(config), data["train"], tokenizer)
    facts = Facts(
        TaskKind(config.task),
        len(lengths),
        lengths,
        width=model.width,
        pretrained=bool(experiment.init_from),
        context_length=0 if "model.context_length" in chosen_by_data else model.context_length,
        flattened=config.head == schema.Head.FLATTEN and "finetune.head" not in chosen_by_data,
    )
    chosen: dict[str, Any] = {}
    for name, rule in RULES.items():
        if name not in chosen_by_data:
            continue
        assert experiment.finetune is not None
        chosen[name] = value = rule(facts, experiment.finetune)
        experiment = schema.with_value(experiment, name, value)
        part, _, field = name.partition(".")
        if part == "model":
            model = dataclasses.replace(model, **{field: value})
    experiment = dataclasses.replace(experiment, choose="")
    experiment = validation.validate(experiment, in_memory)
    values = ", ".join(f"{name}={value}" for name, value in chosen.items())
    head = f"finetune: chosen for {facts.describe()} (a flag sets another value):"
    lines = textwrap.wrap(values, 96, initial_indent="  ", subsequent_indent="  ")
    return experiment, model, (head, *lines)


def keep_earlier(
    experiment: Experiment, earlier: Experiment, in_memory: Collection[str] = ()
) -> Experiment:
    """Returns the experiment of a run that is continued, with the values that it chose before.

    Args:
      experiment: the configuration, from `validation.validate`.
      earlier: the configuration with which the run began. Of another experiment, which lacks a
        field, nothing is taken.
      in_memory: the stages whose data are tables in memory.
    """
    for name in schema.split_names(experiment.choose):
        if (value := schema.value_at(earlier, name)) is not None:
            experiment = schema.with_value(experiment, name, value)
    return validation.validate(dataclasses.replace(experiment, choose=""), in_memory)
