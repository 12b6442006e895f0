"""The modes `import` (a model in another format -> a checkpoint) and `export` (the reverse)."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import state
from gptjax.checkpoint.load import open_checkpoint
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import CheckpointStore
from gptjax.config import schema, validation
from gptjax.config.schema import Experiment, FinetuneConfig, Stage, WeightFormat, Words
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import UserError, brief, require
from gptjax.interop import arrays, huggingface, openai
from gptjax.interop.arrays import Weights
from gptjax.io import files, remote
from gptjax.mesh import Params, make_mesh
from gptjax.model import gpt

FORMATS: dict[str, Any] = {WeightFormat.OPENAI: openai, WeightFormat.HUGGINGFACE: huggingface}
"""Name of a format -> the module with the functions `read` and `write` of this format."""


@contextmanager
def _new_folder(path: str) -> Iterator[pathlib.Path]:
    """Yields a temporary folder, which is renamed to `path` if the `with` block raises no error.

    Raises:
      UserError: `path` exists and is not an empty folder, or it is not on this machine.
    """
    require(path, "`output`: give the folder to write")
    require(not remote.is_remote(path), f"`output`={path}: must be a folder of this machine")
    target = pathlib.Path(os.path.abspath(path))
    taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    require(not taken, f"`output`={path}: is there already and not empty; choose another folder")
    with files.disk_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        place = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield place
            _open_to_readers(place)
            place.replace(target)  # the target may be an empty folder
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise


def _open_to_readers(folder: pathlib.Path) -> None:
    """Gives a folder and its files the usual permissions. Temporary files have stricter ones."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def import_weights(input: str, output: str, format: str, words: str = Words.EXACT) -> list[str]:
    """Writes weights in another format as a workdir, which all other modes can read.

    Args:
      input: the folder with the weights.
      output: the workdir, which must not exist yet.
      format: one of `FORMATS`.
      words: as in `TokenizerConfig.words`. What `export_weights` wrote has its own tokenizer, for
        which this does not matter.

    Returns:
      Lines to print for the user.

    Raises:
      UserError: a folder is wrong, or the model cannot be read.
    """
    require(words in tuple(Words), f"`tokenizer.words`={words}: must be {' or '.join(Words)}")
    require(input, "`input`: give the folder with the weights")
    require(os.path.isdir(input), f"`input`={input}: no such folder")
    with _new_folder(output) as place:
        found = read(pathlib.Path(input), format, words, f"`input`={input}")
        _save(found, place, f"`input`={input}")
    what = f" and the head of a {found.task.kind} task" if found.task else ""
    count = sum(array.size for array in found.arrays.values())
    lines = [f"{count:,} parameters{what} -> {output}"]
    if found.tokenizer.exact:
        lines.append("text is split into words as GPT-1's authors did, with ftfy and spaCy")
    return lines


def read(folder: pathlib.Path, format: str, words: str, where: str) -> Weights:
    """Reads a folder with weights in another format.

    Args:
      folder: the folder.
      format: one of `FORMATS`.
      words: as in `TokenizerConfig.words`.
      where: the name of the folder in error messages.

    Raises:
      UserError: the model cannot be read.
    """
    try:
        found = FORMATS[format].read(folder, words == Words.EXACT)
        validation.validate_model(found.model)
        return found
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # There are too many possible errors in files of other programs to check each of them.
        raise UserError(f"{where}: cannot be read as {format} ({brief(error)})") from error


def parameters_of(found: Weights, where: str) -> Params:
    """Returns the parameter tree of a model, with NumPy arrays.

    Args:
      found: the model.
      where: the name of the model in error messages.

    Raises:
      UserError: an array is missing, extra or of another shape.
    """
    model = gpt.make_model(found.model, found.task)
    like = jax.eval_shape(lambda key: gpt.init_params(model, key), jax.random.key(0))
    try:
        return state.merge_params(arrays.unflatten(found.arrays), like)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def meta_of(found: Weights) -> Meta:
    """Returns the metadata of a checkpoint with the model."""
    stage = Stage.FINETUNE if found.task else Stage.PRETRAIN
    experiment = Experiment(name="imported", model=found.model, pretrain=schema.PretrainConfig())
    if task := found.task:
        experiment.finetune = FinetuneConfig(
            task=task.kind, text=task.text, text_pair=task.text_pair,
            choices=",".join(task.choices), label=task.label,
        )  # fmt: skip
    return Meta(
        stage, found.model, found.tokenizer.to_json(), found.tokenizer.hash, found.task, "loss",
        schema.to_dict(experiment), data_fingerprint="",
    )  # fmt: skip


def _save(found: Weights, workdir: pathlib.Path, where: str) -> None:
    """Writes a model as a checkpoint in a workdir.

    Args:
      found: the model.
      workdir: the folder to write to.
      where: the name of the model in error messages.
    """
    params, meta = parameters_of(found, where), meta_of(found)
    start = state.TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, params), {})
    with closing(CheckpointStore(str(workdir), meta.stage)) as checkpoints:
        # The temperature is a score of the validation, as in a checkpoint of a training.
        checkpoints.save(0, start, meta, {"temperature": found.temperature} if found.task else None)


def export_weights(input: str, output: str, format: str) -> list[str]:
    """Writes a checkpoint in another format.

    Args:
      input_path: a workdir, or the folder of a stage or step in a workdir.
      output_path: the folder to write. It must not exist, or it must be an empty folder.
      form: the name of a format in `FORMATS`.

    Returns:
      Lines to print for the user.

    Raises:
      UserError: a folder is wrong, or the format cannot store a part of the model.
    """
    require(input, "`input`: give the `workdir` of a finished training")
    checkpoint = open_checkpoint(input, "input")
    params = checkpoint.load_params(make_mesh(schema.MeshConfig()))
    meta = checkpoint.meta
    tokenizer = tokenizer_lib.from_json(meta.tokenizer_json, checkpoint.path)
    flat = arrays.flatten(params)
    found = Weights(meta.model, flat, tokenizer, meta.task, checkpoint.temperature)
    with _new_folder(output) as place:
        note = FORMATS[format].write(found, place)
    lines = [f"{checkpoint.path} -> {output} ({note})"]
    if meta.task and meta.task.windows:
        lines.append(
            "only gptjax reads a long text in windows: give the other program texts of at most "
            f"{meta.model.context_length - 2} tokens"
        )
    if meta.task and meta.task.mean:
        lines.append(
            "only gptjax has a task head that reads the mean state: the other program reads the "
            "language model alone"
        )
    if tokenizer.exact:
        lines.append(
            "its tokenizer there splits text into words in another way: some token ids will differ"
        )
    return lines
