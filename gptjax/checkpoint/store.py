"""Checkpoints on disk or in a bucket: orbax writes them in the background, atomically.

    WORKDIR/checkpoints/STAGE/scores.json    the validation scores of all steps
    WORKDIR/checkpoints/STAGE/STEP/params    the parameters; with an average, the averaged ones
                                  /optimizer the optimizer's state, the step, and with an average
                                             the parameters that are not averaged
                                  /meta      configuration, tokenizer, task, checksums, scores

The arrays can be restored on a mesh that differs from the mesh on which they were saved. `meta` is
the metadata that the use of the parameters needs. It also holds a checksum of each array and a
checksum of `meta` itself, because orbax notices missing and truncated files but not flipped bits.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from gptjax.checkpoint.background import SaveMonitor
from gptjax.checkpoint.checksum import checksums, verify
from gptjax.checkpoint.meta import Meta, digest
from gptjax.cluster import processes
from gptjax.config.schema import CheckpointConfig, higher_is_better
from gptjax.errors import Preempted, TrainingDiverged, UserError, brief
from gptjax.io import files, remote
from gptjax.state import TrainState

FOLDER = "checkpoints"
_SCORES = "scores.json"


T = TypeVar("T")


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _reader() -> ocp.Checkpointer:
    """Returns an orbax reader that does not wait for other processes.

    So it can fail in one process while the other processes go on.
    """
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)


class CheckpointStore:
    """The checkpoints of one stage in one workdir."""

    def __init__(
        self,
        workdir: str,
        stage: str,
        policy: CheckpointConfig = CheckpointConfig(),  # noqa: B008 (never written to)
        metric: str = "loss",
        read_only: bool = False,
    ):
        """Opens WORKDIR/checkpoints/STAGE. If the folder is missing, it is made unless `read_only`.

        Args:
          workdir: the folder of the run.
          stage: a `config.schema.Stage`.
          policy: the numbers of newest checkpoints and of best checkpoints that are kept.
          metric: the name of the validation score that ranks the checkpoints.
          read_only: whether the store is only read. Opening it then makes and deletes no files.
        """
        self.directory = remote.absolute(workdir) / FOLDER / stage
        self._metric, self._policy = metric, policy
        self._saves, self._reader = SaveMonitor(), _reader()
        # orbax's own option `read_only` is not used, because it has no effect here and logs two
        # warnings whenever a checkpoint is loaded.
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            preservation_policy=self,
            async_options=self._saves.options(),
        )
        with self._disk_errors():
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._wait_for_equal_steps()
        self._scores = processes.broadcast(_SCORES, self._read_scores)

    def _disk_errors(self) -> AbstractContextManager[None]:
        return files.disk_errors(self.directory, "the last checkpoint is kept")

    def _wait_for_equal_steps(self) -> None:
        """Waits until all processes see the same steps.

        A network disk may show a new folder to some processes later than to others.
        """
        what = f"the checkpoints in {self.directory}"
        processes.wait_until_same(what, self.steps, self._manager.reload)

    def _read_scores(self) -> dict[str, dict[str, float]]:
        """Returns the scores that are stored: name of a step -> its validation scores.

        A step that `scores.json` lacks gets the scores of its own metadata, so that a lost file
        loses neither the best step nor the temperature of a step.
        """
        path = self.directory / _SCORES
        try:
            scores = files.read_json(path) if path.exists() else {}
        except UserError as error:
            logging.warning("%s; reading the scores that the checkpoints hold", error)
            scores = {}
        for step in self.steps():
            if str(step) not in scores and (found := self._own_scores(step)):
                scores[str(step)] = found
        return scores

    def _own_scores(self, step: int) -> dict[str, float]:
        """Returns the scores in the metadata of a step, {} if it has none or cannot be read.

        A damaged step is reported where it is restored.
        """
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        try:
            values = self._reader.restore(self.directory / str(step), args=args)["meta"]
            return dict(_verified(values).get("scores", {}))
        except Exception:  # orbax raises errors of many classes for damaged files
            return {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether it is kept. orbax calls this method."""
        del context
        kept = self._kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]

    def _kept(self, steps: list[int]) -> set[int]:
        """Returns the steps to keep: the newest steps, and the best steps that have scores."""
        kept = set(sorted(steps)[-self._policy.keep_newest :])
        ranked = self.best_first(step for step in steps if self.metrics(step))
        return kept.union(ranked[: self._policy.keep_best])

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the validation scores of a step, {} if it was saved without scores."""
        return dict(self._scores.get(str(step), {}))

    def metrics_until(self, step: int) -> dict[int, dict[str, float]]:
        """Returns the validation scores of all steps up to `step`, in the order of the steps.

        The checkpoints of these steps may be deleted. Their scores stay.
        """
        steps = sorted(int(name) for name in self._scores)
        return {each: self.metrics(each) for each in steps if each <= step}

    def set_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Stores the validation scores of a step."""
        self._scores[str(step)] = dict(metrics)
        if jax.process_index() == 0:
            files.write_json(self.directory / _SCORES, self._scores)

    def best_first(self, steps: Iterable[int] | None = None) -> list[int]:
        """Returns steps sorted by validation score, best first. Equal scores: newest first.

        Args:
          steps: the steps to sort. None means all steps that have a checkpoint.
        """

        def order(step: int) -> tuple[float, int]:
            return rank(self._metric, self.metrics(step).get(self._metric)), step

        return sorted(self.steps() if steps is None else steps, key=order, reverse=True)

    def save(
        self, step: int, state: TrainState, meta: Meta, metrics: dict[str, float] | None = None
    ) -> None:
        """Waits for the previous save, and starts a save in the background.

        Raises:
          UserError: this save or the previous save could not write to the disk.
        """
        # The scores are stored before the save, because orbax calls `should_preserve` during the
        # save, and `should_preserve` needs the scores.
        if metrics:
            self.set_metrics(step, metrics)
        own = {"checksums": checksums(state), "step": step, "scores": metrics or {}}
        values = {**meta.to_dict(), **own}
        values["digest"] = digest(values)
        arrays = _beside_params(state)
        with self._disk_errors():
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
        """Reads items of a checkpoint. If one process fails, all processes raise an error."""
        args = ocp.args.Composite(**items)
        path = self.directory / str(step)
        return processes.run_everywhere(
            f"reading {path}", lambda: self._reader.restore(path, args=args)
        )

    def meta(self, step: int) -> Meta:
        """Returns the metadata of a step.

        Raises:
          ValueError: the metadata does not have its saved checksum. For broken files orbax raises
            errors of other classes.
        """
        return self.meta_and_checksums(step)[0]

    def meta_and_checksums(self, step: int) -> tuple[Meta, dict[str, int]]:
        """Returns the metadata of a step, and a dictionary: path of an array -> its checksum.

        Raises:
          ValueError: the metadata does not have its saved checksum. For broken files orbax raises
            errors of other classes.
        """
        values = _verified(self._read(step, meta=ocp.args.JsonRestore())["meta"])
        sums = values.pop("checksums")
        values.pop("step")
        values.pop("scores", None)  # earlier versions wrote none
        return Meta.from_dict(values, str(self.directory / str(step))), sums

    def ledger(self, step: int) -> str:
        """Returns the running hash of the batches up to `step`, "" if it has no checkpoint."""
        return self.meta(step).ledger if step in self.steps() else ""

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns the training state of a step.

        Args:
          step: a step that has a checkpoint.
          like: a state of arrays or `jax.ShapeDtypeStruct`. The result gets its shardings.

        Raises:
          ValueError: an array or the metadata does not have its saved checksum. For broken files
            orbax raises errors of other classes.
        """
        arrays = _beside_params(like)
        restored = self._read(
            step,
            params=ocp.args.StandardRestore(_abstract(like.params)),
            optimizer=ocp.args.StandardRestore(_abstract(arrays)),
        )
        state = TrainState(params=restored["params"], **restored["optimizer"])
        verify(state, self.meta_and_checksums(step)[1])
        return state

    def restore_params(self, step: int, like: Any) -> Any:
        """Returns only the parameters of a step. They are a third of the bytes of a state.

        Args:
          step: a step that has a checkpoint.
          like: parameters as arrays or `jax.ShapeDtypeStruct`. The result gets their shardings.

        Raises:
          ValueError: an array or the metadata does not have its saved checksum. For broken files
            orbax raises errors of other classes.
        """
        params = self._read(step, params=ocp.args.StandardRestore(_abstract(like)))["params"]
        # As a part of a state, so that the paths are those of the saved checksums.
        part = TrainState(step=None, params=params, opt_state=None)  # type: ignore[arg-type]
        verify(part, self.meta_and_checksums(step)[1])
        return params

    def restore_best_params(self, like: Any) -> tuple[int, Any]:
        """Returns the best undamaged step and its parameters, which get the shardings of `like`."""
        return self._first_undamaged(
            self.best_first(), lambda step: (step, self.restore_params(step, like))
        )

    def restore_newest(
        self, like: TrainState, check: Callable[[Meta], None]
    ) -> tuple[TrainState, int] | None:
        """Returns the newest undamaged state and its step; None if there is no checkpoint.

        If a checkpoint is damaged, the next older checkpoint is read. The damaged checkpoint is
        logged and moved to WORKDIR/checkpoints/damaged.

        Args:
          like: a state of arrays or `jax.ShapeDtypeStruct`. The result gets its shardings.
          check: a function that raises `UserError` if a checkpoint belongs to another experiment.

        Raises:
          UserError: `check` raised it, or there are checkpoints but none can be read.
        """

        def read(step: int) -> tuple[TrainState, int]:
            check(self.meta(step))
            return self.restore(step, like), step

        steps = self.steps()
        return self._first_undamaged(steps[::-1], read) if steps else None

    def _first_undamaged(self, steps: list[int], read: Callable[[int], T]) -> T:
        """Calls `read` for the steps in order until a step can be read, and returns its result.

        Only then are the steps that failed moved to the folder of damaged checkpoints. If no step
        can be read, none is moved, because the likely cause is then not damage but lack of memory,
        a network disk, or the version of a library.

        Raises:
          UserError: no step can be read, or `read` raised it.
        """
        failed: list[tuple[int, Exception]] = []
        for step in steps:
            try:
                found = read(step)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # orbax raises errors of many classes for damaged files
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                failed.append((step, error))
                continue
            for bad, reason in failed:
                self._move_away(bad, reason)
            return found
        raise UserError(
            f"{self.directory}: no checkpoint can be read, step {failed[0][0]} for "
            f"{brief(failed[0][1])}; they are left there; mend that or choose another `workdir`"
        )

    def _move_away(self, step: int, error: Exception) -> None:
        logging.warning(
            "checkpoint %s is damaged (%s); trying another",
            self.directory / str(step),
            brief(error),
        )
        if jax.process_index() == 0:
            target = self.directory.parent / "damaged" / f"{self.directory.name}-{step}"
            if target.exists():
                target.rmtree()
            remote.move_folder(self.directory / str(step), target)
        processes.barrier(f"setting {self.directory / str(step)} aside")
        self._manager.reload()
        self._wait_for_equal_steps()

    def wait(self) -> None:
        """Waits until the save in progress has ended, and raises its error if it failed."""
        with self._disk_errors():
            self._saves.finish(self._manager)
            # orbax deletes obsolete checkpoints after a save. An earlier run may have been killed
            # before that, so obsolete checkpoints are deleted here too.
            for step in sorted(set(self.steps()) - self._kept(self.steps())):
                self._manager.delete(step)

    def close(self) -> None:
        """Waits for the save in progress and ends orbax's threads.

        After a failed save it does nothing.
        """
        if not self._saves.failed:
            with self._disk_errors():
                self._saves.finish(self._manager)
                self._manager.close()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Closes the store if all processes end together.

        `Preempted` and `TrainingDiverged` end all processes at the same step. After any other
        exception, a run of several processes does not close the store, because the other processes
        might not have failed and would not finish the save in progress together with this process.
        """
        ended_together = error is None or isinstance(error, (Preempted, TrainingDiverged))
        if ended_together or processes.count() == 1:
            self.close()


def _beside_params(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that are saved in the item "optimizer"."""
    parts = {"step": state.step, "opt_state": state.opt_state}
    if state.raw_params is not None:
        parts["raw_params"] = state.raw_params
    return parts


def _verified(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metadata without its own checksum. Raises `ValueError` if the checksum is wrong."""
    found = dict(values)
    if found.pop("digest", None) != digest(found):
        raise ValueError("its meta does not have the checksum it was saved with")
    return found


def rank(name: str, value: float | None) -> float:
    """Returns a number that is higher for a better value of the score `name`.

    The number is -inf if the value is None or NaN.
    """
    if value is None or math.isnan(value):
        return -math.inf
    return value if higher_is_better(name) else -value
