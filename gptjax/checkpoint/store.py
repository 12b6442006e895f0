"""Checkpoints: orbax writes them (in the background, atomically, for any mesh), we check them.

    WORKDIR/checkpoints/STAGE/scores.json   the validation scores of each step
    WORKDIR/checkpoints/STAGE/STEP/         params, optimizer   the arrays
                                            meta   configuration, tokenizer, task, checksums

`meta` carries all that is needed to use the weights. Every array's checksum is stored and verified,
and one of `meta` itself: orbax notices files that are missing or cut short, but not flipped bytes.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from gptjax.checkpoint import background as saving
from gptjax.cluster import processes as distributed
from gptjax.config import schema as config_lib
from gptjax.config.schema import CheckpointConfig, ModelConfig
from gptjax.data.tasks import TaskSpec
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import Preempted, TrainingDiverged, UserError, brief, require
from gptjax.evaluate import metrics as metrics_lib
from gptjax.io import remote as storage
from gptjax.state import TrainState
from gptjax.train import ledger
from gptjax.train import log as telemetry

_FOLDER = "checkpoints"
_DAMAGED = "damaged"
_SCORES = "scores.json"


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Meta:
    """What belongs to the weights besides the arrays."""

    stage: str
    model: ModelConfig
    tokenizer_json: str
    tokenizer_hash: str
    task: TaskSpec | None
    metric: str
    """The validation score that ranks the checkpoints of the stage."""
    experiment: dict[str, Any]
    """The whole configuration as plain values."""
    data_fingerprint: str
    """Hash of the training data."""
    ledger: str = ""
    """Of the batches that the weights were trained on, from `gptjax.train.ledger`."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-ready values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], where: str) -> "Meta":
        """Reads `to_dict`'s values; `where` names the checkpoint in errors."""
        task = values["task"] and TaskSpec.from_dict(values["task"])
        model = config_lib.from_dict(ModelConfig, values["model"], where)
        meta = Meta(**{**values, "task": task, "model": model})
        tokenizer = tokenizer_lib.from_json(meta.tokenizer_json, where)
        require(
            tokenizer.hash == meta.tokenizer_hash,
            f"{where}: the tokenizer inside is not the one that the weights were trained with "
            f"(hash {tokenizer.hash[:12]}, not {meta.tokenizer_hash[:12]})",
        )
        return meta


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(ledger.checksum, tree)


def checksums(tree: Any) -> dict[str, int]:
    """Returns array path -> 32-bit checksum; integer sums, so the same on every mesh."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))
    return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


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
          stage: one of `telemetry.STAGES`.
          policy: how many newest and best to keep.
          metric: name of the validation score that ranks them.
          read_only: for using a checkpoint.
        """
        self.directory = storage.absolute(workdir) / _FOLDER / stage
        self._damaged = self.directory.parent / _DAMAGED
        self._metric, self._policy = metric, policy
        self._saves, self._reader = saving.Watch(), saving.reader()
        scores = self.directory / _SCORES
        self._scores = distributed.from_main(_SCORES, lambda: _read_scores(scores))
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            preservation_policy=self,
            async_options=self._saves.options(),
        )
        with saving.disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._agree_on_steps()

    def _agree_on_steps(self) -> None:
        """A network disk may show a folder late."""
        distributed.settle(f"the checkpoints in {self.directory}", self.steps, self._manager.reload)

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
            telemetry.write_json(self.directory / _SCORES, self._scores)

    def best_first(self) -> list[int]:
        """Returns the steps by validation score, best first, the newest of equals before."""
        return self._best_first(self.steps())

    def _best_first(self, steps: list[int]) -> list[int]:
        def rank(step: int) -> tuple[float, int]:
            return metrics_lib.rank(self._metric, self.metrics(step).get(self._metric)), step

        return sorted(steps, key=rank, reverse=True)

    def save(
        self, step: int, state: TrainState, meta: Meta, metrics: dict[str, float] | None = None
    ) -> None:
        """Saves in the background; a failed earlier save surfaces here or in `wait`.

        The scores are stored first: orbax asks for them when it decides what stays.
        """
        if metrics:
            self.set_metrics(step, metrics)
        values = {**meta.to_dict(), "checksums": checksums(state), "step": step}
        values["digest"] = _digest(values)
        arrays = {"step": state.step, "opt_state": state.opt_state}
        with saving.disk_errors(self.directory):
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
        return distributed.attempt(f"reading {path}", lambda: self._reader.restore(path, args=args))

    def meta(self, step: int) -> tuple[Meta, dict[str, int]]:
        """Returns what lies beside the weights of a step, and the checksums of its arrays.

        Raises:
          ValueError: it is not what was saved. orbax's own errors on broken files.
        """
        values = dict(self._read(step, meta=ocp.args.JsonRestore())["meta"])
        if values.pop("digest", None) != _digest(values):
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
        _verify(checksums(state), self.meta(step)[1])
        return state

    def restore_params(self, step: int, like: Any) -> Any:
        """Returns the parameters alone (a third of the bytes), laid out like `like`."""
        params = self._read(step, params=ocp.args.StandardRestore(_abstract(like)))["params"]
        saved = self.meta(step)[1]
        prefix = jax.tree_util.keystr((jax.tree_util.GetAttrKey("params"),))
        _verify({prefix + name: value for name, value in checksums(params).items()}, saved)
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
            f"{brief(failed[0][1])}; they are left there; mend that or choose another --workdir"
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
            storage.move_folder(self.directory / str(step), target)
        distributed.barrier(f"setting {self.directory / str(step)} aside")
        self._manager.reload()
        self._agree_on_steps()

    def wait(self) -> None:
        """Waits for the saves in the background, and raises what went wrong with them."""
        with saving.disk_errors(self.directory):
            self._saves.finish(self._manager)
            # What a run that was killed between saving and deleting has left.
            for step in sorted(set(self.steps()) - self._kept(self.steps())):
                self._manager.delete(step)

    def close(self) -> None:
        """Waits, then releases the threads; after a failed save there is nothing to wait for."""
        if not self._saves.failed:
            with saving.disk_errors(self.directory):
                self._saves.finish(self._manager)
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Closes, but where an error of this process alone ends it, whose saves no one joins."""
        ended_together = error is None or isinstance(error, (Preempted, TrainingDiverged))
        if ended_together or distributed.count() == 1:
            self.close()


def _read_scores(path: epath.Path) -> dict[str, dict[str, float]]:
    """The stored scores; where they are broken, none: a resumed run validates its step again."""
    try:
        return telemetry.read_json(path) if path.exists() else {}
    except UserError as error:
        logging.warning("%s; going on without the validation scores of earlier steps", error)
        return {}


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _verify(found: dict[str, int], saved: dict[str, int]) -> None:
    for name, value in found.items():
        if saved.get(name) != value:
            raise ValueError(f"array {name} does not have the checksum it was saved with")


def find(path: str, flag: str = "--checkpoint") -> tuple[str, str, int | None]:
    """Returns (workdir, stage, step or None) that `--checkpoint=PATH` (or another flag) means.

    PATH is a workdir (its last stage), WORKDIR/checkpoints/STAGE, or one STEP below that.

    Raises:
      UserError: there is no checkpoint.
    """
    storage.check_address(path, flag)
    place = storage.absolute(path)
    if place.name.isdigit() and place.parent.name in telemetry.STAGES and place.exists():
        return str(place.parents[2]), place.parent.name, int(place.name)
    if place.name in telemetry.STAGES and place.parent.name == _FOLDER:
        workdir, stages = place.parents[1], [place.name]
    else:
        workdir, stages = place, ["finetune", "pretrain"]
    for stage in stages:
        folder = workdir / _FOLDER / stage
        if folder.exists() and any(child.name.isdigit() for child in folder.iterdir()):
            return str(workdir), stage, None
    raise UserError(
        f"{flag}={path}: no checkpoint there; give the --workdir of a finished training"
    )


def open_for_use(path: str, flag: str = "--checkpoint") -> tuple[Checkpoints, int, Meta]:
    """Opens what `--checkpoint=PATH` means: the stage's checkpoints, the step, and its `Meta`.

    A workdir or stage means the step with the best validation score.
    """
    workdir, stage, step = find(path, flag)
    newest = Checkpoints(workdir, stage, read_only=True)
    # In a bucket a save that is under way has the name of its step already.
    require(step or newest.steps(), f"{flag}={path}: no finished checkpoint there yet")
    meta = _meta_for_use(newest, newest.steps()[-1] if step is None else step)
    if step is not None:
        return newest, step, meta
    checkpoints = Checkpoints(workdir, stage, metric=meta.metric, read_only=True)
    step = checkpoints.best_first()[0]
    return checkpoints, step, _meta_for_use(checkpoints, step)


def _meta_for_use(checkpoints: Checkpoints, step: int) -> Meta:
    try:
        return checkpoints.meta(step)[0]
    except UserError:
        raise
    except Exception as error:  # whatever broken files make orbax raise
        raise UserError(
            f"{checkpoints.directory / str(step)}: is damaged ({brief(error)}); give another step"
        ) from error
