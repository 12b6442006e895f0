"""Checkpoints: orbax writes them (in the background, atomically, for any mesh), we check them.

    WORKDIR/checkpoints/STAGE/scores.json   the validation scores of each step
    WORKDIR/checkpoints/STAGE/STEP/         params, optimizer   the arrays
                                            meta   configuration, tokenizer, task, checksums

`meta` carries all that is needed to use the weights. Every array's checksum is stored and verified,
and one of `meta` itself: orbax notices files that are missing or cut short, but not flipped bytes.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from gptjax.checkpoint import background
from gptjax.checkpoint.checksum import checksums, verify
from gptjax.checkpoint.meta import Meta, digest
from gptjax.cluster import processes
from gptjax.config.schema import CheckpointConfig, higher_is_better
from gptjax.errors import Preempted, TrainingDiverged, UserError, brief
from gptjax.io import files, remote
from gptjax.state import TrainState

FOLDER = "checkpoints"
_DAMAGED = "damaged"
_SCORES = "scores.json"


T = TypeVar("T")


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpoints:
    """The checkpoints of one stage of one workdir."""

    def __init__(
        self,
        workdir: str,
        stage: str,
        policy: CheckpointConfig = CheckpointConfig(),  # noqa: B008 (never written to)
        metric: str = "loss",
        read_only: bool = False,
    ):
        """Opens (and where not read-only creates) WORKDIR/checkpoints/STAGE.

        Args:
          workdir: the run's folder.
          stage: a `config.schema.Stage`.
          policy: how many newest and best to keep.
          metric: name of the validation score that ranks them.
          read_only: for using a checkpoint.
        """
        self.directory = remote.absolute(workdir) / FOLDER / stage
        self._damaged = self.directory.parent / _DAMAGED
        self._metric, self._policy = metric, policy
        self._saves, self._reader = background.Watch(), background.reader()
        scores = self.directory / _SCORES
        self._scores = processes.from_main(_SCORES, lambda: _read_scores(scores))
        # Not orbax's `read_only`: it logs two warnings at every load, and changes nothing here.
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            preservation_policy=self,
            async_options=self._saves.options(),
        )
        with background.disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._agree_on_steps()

    def _agree_on_steps(self) -> None:
        """A network disk may show a folder late."""
        processes.settle(f"the checkpoints in {self.directory}", self.steps, self._manager.reload)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tells orbax which checkpoints stay."""
        del context
        kept = self._kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]

    def _kept(self, steps: list[int]) -> set[int]:
        """The newest of `steps`, and the best of those with scores."""
        kept = set(sorted(steps)[-self._policy.keep_newest :])
        ranked = self._best_first([step for step in steps if self.metrics(step)])
        return kept.union(ranked[: self._policy.keep_best])

    def steps(self) -> list[int]:
        """Returns the steps at hand, oldest first."""
        return sorted(self._manager.all_steps())

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the validation scores of a step; {} where it was saved without."""
        return dict(self._scores.get(str(step), {}))

    def set_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Stores the validation scores of a step."""
        self._scores[str(step)] = dict(metrics)
        if jax.process_index() == 0:
            files.write_json(self.directory / _SCORES, self._scores)

    def best_first(self) -> list[int]:
        """Returns the steps by validation score, best first, the newest of equals before."""
        return self._best_first(self.steps())

    def _best_first(self, steps: list[int]) -> list[int]:
        def order(step: int) -> tuple[float, int]:
            return rank(self._metric, self.metrics(step).get(self._metric)), step

        return sorted(steps, key=order, reverse=True)

    def save(
        self, step: int, state: TrainState, meta: Meta, metrics: dict[str, float] | None = None
    ) -> None:
        """Saves in the background; a failed earlier save surfaces here or in `wait`.

        The scores are stored first: orbax asks for them when it decides what stays.
        """
        if metrics:
            self.set_metrics(step, metrics)
        values = {**meta.to_dict(), "checksums": checksums(state), "step": step}
        values["digest"] = digest(values)
        arrays = {"step": state.step, "opt_state": state.opt_state}
        with background.disk_errors(self.directory):
            self._saves.finish(self._manager)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(arrays),
                    meta=ocp.args.JsonSave(values),
                ),
                force=True,
            )

    def _read(self, step: int, **items: Any) -> Any:
        """Reads items of a checkpoint; what one process cannot read fails in all of them."""
        args = ocp.args.Composite(**items)
        path = self.directory / str(step)
        return processes.attempt(f"reading {path}", lambda: self._reader.restore(path, args=args))

    def meta(self, step: int) -> tuple[Meta, dict[str, int]]:
        """Returns what lies beside the weights of a step, and the checksums of its arrays.

        Raises:
          ValueError: it is not what was saved. orbax's own errors on broken files.
        """
        values = dict(self._read(step, meta=ocp.args.JsonRestore())["meta"])
        if values.pop("digest", None) != digest(values):
            raise ValueError("its meta does not have the checksum it was saved with")
        sums = values.pop("checksums")
        values.pop("step")
        return Meta.from_dict(values, str(self.directory / str(step))), sums

    def ledger(self, step: int) -> str:
        """Returns the ledger of the checkpoint of a step, to go on with; "" where there is none."""
        return self.meta(step)[0].ledger if step in self.steps() else ""

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns the state of `step`, laid out like `like` (arrays or shapes with shardings).

        Raises:
          ValueError: an array's checksum is not the saved one. orbax's own errors on broken files.
        """
        arrays = {"step": like.step, "opt_state": like.opt_state}
        restored = self._read(
            step,
            params=ocp.args.StandardRestore(_abstract(like.params)),
            optimizer=ocp.args.StandardRestore(_abstract(arrays)),
        )
        state = TrainState(params=restored["params"], **restored["optimizer"])
        verify(checksums(state), self.meta(step)[1])
        return state

    def restore_params(self, step: int, like: Any) -> Any:
        """Returns the parameters alone (a third of the bytes), laid out like `like`."""
        params = self._read(step, params=ocp.args.StandardRestore(_abstract(like)))["params"]
        saved = self.meta(step)[1]
        prefix = jax.tree_util.keystr((jax.tree_util.GetAttrKey("params"),))
        verify({prefix + name: value for name, value in checksums(params).items()}, saved)
        return params

    def restore_best_params(self, like: Any) -> tuple[int, Any]:
        """Returns the best step that is not damaged, and its parameters."""
        return self._first_good(
            self.best_first(), lambda step: (step, self.restore_params(step, like))
        )

    def restore_newest(
        self, like: TrainState, check: Callable[[Meta], None]
    ) -> tuple[TrainState, int] | None:
        """Returns the newest undamaged state and its step; None where there is no checkpoint.

        A damaged one is named in the log and moved to WORKDIR/checkpoints/damaged, and the one
        before it is tried.

        Args:
          like: shapes and shardings of the state.
          check: raises `UserError` if a checkpoint belongs to another experiment.
        """

        def read(step: int) -> tuple[TrainState, int]:
            check(self.meta(step)[0])
            return self.restore(step, like), step

        steps = self.steps()
        return self._first_good(steps[::-1], read) if steps else None

    def _first_good(self, steps: list[int], read: Callable[[int], T]) -> T:
        """Returns `read(step)` of the first step that is whole, and sets those before it aside.

        Nothing is moved before another one is read: what fails for all of them (memory, a network
        disk, another version of a library) is no damage.
        """
        failed: list[tuple[int, Exception]] = []
        for step in steps:
            try:
                found = read(step)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # whatever broken files make orbax raise
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                failed.append((step, error))
                continue
            for bad, reason in failed:
                self._set_aside(bad, reason)
            return found
        raise UserError(
            f"{self.directory}: no checkpoint can be read, step {failed[0][0]} for "
            f"{brief(failed[0][1])}; they are left there; mend that or choose another `workdir`"
        )

    def _set_aside(self, step: int, error: Exception) -> None:
        logging.warning(
            "checkpoint %s is damaged (%s); trying another",
            self.directory / str(step),
            brief(error),
        )
        if jax.process_index() == 0:
            target = self._damaged / f"{self.directory.name}-{step}"
            if target.exists():
                target.rmtree()
            remote.move_folder(self.directory / str(step), target)
        processes.barrier(f"setting {self.directory / str(step)} aside")
        self._manager.reload()
        self._agree_on_steps()

    def wait(self) -> None:
        """Waits for the saves in the background, and raises what went wrong with them."""
        with background.disk_errors(self.directory):
            self._saves.finish(self._manager)
            # What a run that was killed between saving and deleting has left.
            for step in sorted(set(self.steps()) - self._kept(self.steps())):
                self._manager.delete(step)

    def close(self) -> None:
        """Waits, then releases the threads; after a failed save there is nothing to wait for."""
        if not self._saves.failed:
            with background.disk_errors(self.directory):
                self._saves.finish(self._manager)
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Closes, but where an error of this process alone ends it, whose saves no one joins."""
        ended_together = error is None or isinstance(error, (Preempted, TrainingDiverged))
        if ended_together or processes.count() == 1:
            self.close()


def _read_scores(path: epath.Path) -> dict[str, dict[str, float]]:
    """The stored scores; where they are broken, none: a resumed run validates its step again."""
    try:
        return files.read_json(path) if path.exists() else {}
    except UserError as error:
        logging.warning("%s; going on without the validation scores of earlier steps", error)
        return {}


def rank(name: str, value: float | None) -> float:
    """A number that is higher the better the score `value` is; -inf where there is none."""
    if value is None or math.isnan(value):
        return -math.inf
    return value if higher_is_better(name) else -value
