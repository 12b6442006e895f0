"""A checkpoint by the path that a user gives: found, opened, its parameters read."""

import dataclasses

import jax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax import state
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import FOLDER, Checkpoints
from gptjax.config.schema import Stage
from gptjax.errors import UserError, brief, require
from gptjax.io import remote
from gptjax.model import gpt


def find(path: str, argument: str = "path") -> tuple[str, str, int | None]:
    """Returns (workdir, stage, step or None) that a path means.

    PATH is a workdir (its last stage), WORKDIR/checkpoints/STAGE, or one STEP below that.

    Raises:
      UserError: there is no checkpoint.
    """
    remote.check_address(path, argument)
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


def open_for_use(path: str, argument: str = "path") -> tuple[Checkpoints, int, Meta]:
    """Opens what a path means: the stage's checkpoints, the step, and its `Meta`.

    A workdir or stage means the step with the best validation score.
    """
    workdir, stage, step = find(path, argument)
    newest = Checkpoints(workdir, stage, read_only=True)
    # In a bucket a save that is under way has the name of its step already.
    require(step or newest.steps(), f"`{argument}`={path}: no finished checkpoint there yet")
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
    except Exception as error:  # orbax raises errors of many classes for damaged files
        raise UserError(
            f"{checkpoints.directory / str(step)}: is damaged ({brief(error)}); give another step"
        ) from error


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The parameters of one checkpoint."""

    params: mesh_lib.Params
    meta: Meta
    path: str
    """The folder of the checkpoint."""


def load_params(path: str, mesh: Mesh, argument: str = "path") -> Loaded:
    """Reads the parameters of a checkpoint.

    Args:
      path: a workdir (the best step of its last stage), a stage, or a step.
      mesh: the devices that the parameters are laid out on.
      argument: name of the path in error messages.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    checkpoints, step, meta = open_for_use(path, argument)
    model = gpt.make_model(meta.model, meta.task)
    like = state.abstract(lambda key: gpt.init_params(model, key), mesh, jax.random.key(0))
    where = str(checkpoints.directory / str(step))
    try:
        return Loaded(checkpoints.restore_params(step, like), meta, where)
    except UserError:
        raise
    except Exception as error:  # orbax raises errors of many classes for damaged files
        raise UserError(f"{where}: is damaged ({brief(error)}); give another step") from error
