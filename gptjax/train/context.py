"""Values that the stages of one run share."""

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
"""Stage -> split -> rows in memory. The splits are "train" and, if there are such, "validation" and
"test"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a run besides its experiment."""

    given: Collection[str] = ()
    """Fields ("model.width") that the user set by flag. They may not be overruled silently."""
    tables: Tables = dataclasses.field(default_factory=dict)
    """Rows to train on, instead of files or a data set in the experiment."""
    profile: int = 0
    """Number of steps of each stage to write a profiler trace of, below WORKDIR/profile. The first
    steps of a stage, which compile, are left out. 0 means no trace."""
    reporter: Reporter = dataclasses.field(default_factory=TerminalReporter)
    """Receives messages and progress."""
    trial: bool = False
    """Whether the best parameters are kept in memory, and no checkpoints are written."""
    check_stop: Callable[[], None] = never_stop
    """Is called between two batches, and raises `StopRequested` where the run was asked to stop.

    In a run of several processes, all of them have to call it equally often."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The inputs that all stages of a run are built from."""

    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    seed: int
    check_stop: Callable[[], None] = never_stop
    """As in `Options`."""


@dataclasses.dataclass(frozen=True)
class RunContext:
    """One run: its experiment and where its results go."""

    experiment: Experiment
    workdir: str
    setup: Setup
    log: MetricsLog
    options: Options
