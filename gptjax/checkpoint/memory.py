"""Checkpoints in memory. Each of the many short fine-tuning runs of an ablation uses them."""

from collections.abc import Callable
from typing import Any

import jax

from gptjax.checkpoint import store
from gptjax.checkpoint.meta import Meta
from gptjax.io import remote
from gptjax.mesh import Params
from gptjax.state import TrainState


class MemoryStore:
    """Keeps the best parameters of one stage in the host's memory.

    It has the methods of `CheckpointStore` that the training loop calls. A training cannot be
    continued from it.
    """

    def __init__(self, workdir: str, metric: str):
        """Starts without scores and parameters.

        Args:
          workdir: the folder of the run, which is only used in messages.
          metric: the name of the validation score that ranks the steps.
        """
        self.directory = str(remote.absolute(workdir))
        self._metric = metric
        self._scores: dict[int, dict[str, float]] = {}
        self._best: tuple[float, int, Params] | None = None

    def steps(self) -> list[int]:
        """Returns the steps that have scores."""
        return sorted(self._scores)

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the validation scores of a step."""
        return self._scores[step]

    def metrics_until(self, step: int) -> dict[int, dict[str, float]]:
        """Returns the validation scores of all steps up to `step`, in the order of the steps."""
        return {each: self._scores[each] for each in self.steps() if each <= step}

    def set_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Stores the validation scores of a step."""
        self._scores[step] = dict(metrics)

    def ledger(self, step: int) -> str:
        """Returns "". The training always starts at step 0, so no batches came before it."""
        del step
        return ""

    def save(
        self, step: int, state: TrainState, meta: Meta, metrics: dict[str, float] | None = None
    ) -> None:
        """Stores the scores, and copies the parameters if no earlier step has a better score.

        Without scores it does nothing.
        """
        del meta
        if not metrics:
            return
        self.set_metrics(step, metrics)
        rank = store.rank(self._metric, metrics.get(self._metric))
        if self._best is None or rank >= self._best[0]:
            self._best = rank, step, jax.device_get(state.params)

    def restore_newest(self, like: TrainState, check: Callable[[Meta], None]) -> None:
        """Returns None, because there is no state to continue from."""

    def restore_best_params(self, like: Any) -> tuple[int, Any]:
        """Returns the best step and its parameters, which get the shardings of `like`."""
        assert self._best is not None, "training ends with a validation"
        _, step, params = self._best
        return step, jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), params, like)

    def wait(self) -> None:
        """Does nothing, because `save` does not work in the background."""

    def __enter__(self) -> "MemoryStore":
        return self

    def __exit__(self, *_: Any) -> None:
        """Does nothing."""


Store = store.CheckpointStore | MemoryStore
"""The stores that the training loop can save to."""
