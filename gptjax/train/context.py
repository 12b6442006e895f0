"""Values that the stages of one run share."""

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from gptjax.config.schema import Experiment, ModelConfig
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.evaluate.score import never_stop
from gptjax.train.log import MetricsLog
from gptjax.train.progress import Reporter


@dataclasses.dataclass(frozen=True)
class Setup:
    """The inputs that all stages of a run are built from."""

    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    seed: int
    check_stop: Callable[[], None] = never_stop
    """Is called between two batches, and raises `StopRequested` where the run was asked to stop.

    In a run of several processes, all of them have to call it equally often."""


@dataclasses.dataclass(frozen=True)
class RunContext:
    """One run: its experiment and where its results go."""

    experiment: Experiment
    workdir: str
    setup: Setup
    log: MetricsLog
    reporter: Reporter
    is_main: bool
    """Whether this is process 0, the one that writes files."""
    trial: bool = False
    """Whether the best parameters are kept in memory, and no checkpoints are written."""
    profile: int = 0
    """Number of steps of each stage to write a profiler trace of; 0 means none."""
