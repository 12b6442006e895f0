"""Opens a checkpoint at a path that the user gives, and reads its parameters."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax import state
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import FOLDER, CheckpointStore
from gptjax.config.schema import Stage
from gptjax.errors import UserError, brief, require
from gptjax.io import remote
from gptjax.model import gpt


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose metadata has been read. Its arrays have not been read yet."""

    store: CheckpointStore
    step: int
    meta: Meta

    @property
    def path(self) -> str:
        """The folder of the checkpoint."""
        return str(self.store.directory / str(self.step))

    @property
    def temperature(self) -> float:
        """The temperature of `gptjax.evaluate.calibration`.

        It is a score of the validation that was made with these weights. It is 1.0 if the
        validation had none: in a language model, in a regression, and in checkpoints of earlier
        versions.
        """
        return float(self.store.metrics(self.step).get("temperature", 1.0))

    def load_params(self, mesh: Mesh) -> mesh_lib.Params:
        """Reads the parameters and shards them over the devices of a mesh.

        Raises:
          UserError: the checkpoint is damaged.
        """
        model = gpt.make_model(self.meta.model, self.meta.task)
        like = state.abstract(lambda key: gpt.init_params(model, key), mesh, jax.random.key(0))
        with _damage_named(self.path):
            return self.store.restore_params(self.step, like)


def find(path: str, argument: str = "path") -> tuple[str, str, int | None]:
    """Finds the checkpoints at a path.

    Args:
      path: WORKDIR, WORKDIR/checkpoints/STAGE, or WORKDIR/checkpoints/STAGE/STEP. WORKDIR alone
        means its fine-tuning, or its pretraining if it has no checkpoint of a fine-tuning.
      argument: the name of the path in error messages.

    Returns:
      The workdir, the stage and the step. The step is None if the path does not name a step.

    Raises:
      UserError: the path has no checkpoint.
    """
    remote.require_reachable(path, argument)
    place = remote.absolute(path)
    if place.name.isdigit() and place.parent.name in tuple(Stage) and place.exists():
        return str(place.parents[2]), place.parent.name, int(place.name)
    if place.name in tuple(Stage) and place.parent.name == FOLDER:
        workdir, stages = place.parents[1], [place.name]
    else:
        workdir, stages = place, [Stage.FINETUNE, Stage.PRETRAIN]
    for stage in stages:
        folder = workdir / FOLDER / stage
        if folder.exists() and any(child.name.isdigit() for child in folder.iterdir()):
            return str(workdir), stage, None
    raise UserError(
        f"`{argument}`={path}: no checkpoint there; give the `workdir` of a finished training"
    )


def open_checkpoint(path: str, argument: str = "path") -> Checkpoint:
    """Reads the metadata of the checkpoint at a path.

    Args:
      path: WORKDIR, WORKDIR/checkpoints/STAGE, or WORKDIR/checkpoints/STAGE/STEP, see `find`. A
        path without a step means the step with the best validation score.
      argument: the name of the path in error messages.

    Raises:
      UserError: the path has no checkpoint, or the checkpoint is damaged.
    """
    workdir, stage, step = find(path, argument)
    newest = CheckpointStore(workdir, stage, read_only=True)
    # `find` looks only for folders of steps, and the folder of a step exists already while a save
    # to a bucket is in progress. So there may still be no finished checkpoint.
    require(step or newest.steps(), f"`{argument}`={path}: no finished checkpoint there yet")
    if step is not None:
        return _open(newest, step)
    # The metadata of every step names the validation score that ranks the steps.
    metric = _open(newest, newest.steps()[-1]).meta.metric
    store = CheckpointStore(workdir, stage, metric=metric, read_only=True)
    return _open(store, store.best_first()[0])


def _open(store: CheckpointStore, step: int) -> Checkpoint:
    with _damage_named(str(store.directory / str(step))):
        return Checkpoint(store, step, store.meta(step))


@contextlib.contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """Turns an error of its block, which reads a checkpoint, into a `UserError` with the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # orbax raises errors of many classes for damaged files
        raise UserError(f"{path}: is damaged ({brief(error)}); give another step") from error
