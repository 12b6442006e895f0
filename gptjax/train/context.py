"""The values that the stages of one run share."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, TypeAlias

from jax.sharding import Mesh

from gptjax.config.schema import Experiment, ModelConfig
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.evaluate.score import never_stop
from gptjax.train.log import MetricsLog
from gptjax.train.progress import Reporter, TerminalReporter

if TYPE_CHECKING:
    from datasets import Dataset

Tables: TypeAlias = Mapping[str, Mapping[str, "Dataset"]]
"""Name of a stage -> name of a split -> rows in memory. The split "train" is required. The splits
"validation" and "test" are optional."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a run that are not part of its experiment."""

    given: Collection[str] = ()
    """The names of the fields that the user set by flag, such as "model.width". If such a field
    contradicts the checkpoint in `init_from`, the run ends with a `UserError`."""
    tables: Tables = dataclasses.field(default_factory=dict)
    """The rows to train on. They replace the files or the data set of the experiment."""
    profile: int = 0
    """The number of steps of each stage that are traced with the profiler, below WORKDIR/profile.
    The first steps of a stage are not traced, because they compile. 0 means no trace."""
    reporter: Reporter = dataclasses.field(default_factory=TerminalReporter)
    """The receiver of messages and progress."""
    trial: bool = False
    """Whether the run keeps the best parameters in memory and writes no checkpoints. The
    fine-tuning runs of an ablation do so."""
    check_stop: Callable[[], None] = never_stop
    """A function that is called between two batches. It raises `StopRequested` if the run was asked
    to stop. In a run of several processes, all processes must call it equally often."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The values that all stages of a run are built from."""

    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    seed: int
    check_stop: Callable[[], None] = never_stop
    """A function that is called between two batches. It raises `StopRequested` if the run was asked
    to stop."""


@dataclasses.dataclass(frozen=True)
class RunContext:
    """One run: its experiment, its shared values, and the places of its results."""

    experiment: Experiment
    workdir: str
    setup: Setup
    log: MetricsLog
    options: Options
