"""The same text read by other checkpoints, and another text read by the same model.

The letters of shapes are defined in `gptjax.batch`, and N = L + 1 is the number of states of the
residual stream.
"""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from gptjax.batch import TokenType
from gptjax.checkpoint.load import open_checkpoint
from gptjax.checkpoint.store import FOLDER, CheckpointStore
from gptjax.config.schema import Stage
from gptjax.errors import UserError, require
from gptjax.explain import outcome as outcome_lib
from gptjax.explain import words as words_lib
from gptjax.explain.outcome import Outcome
from gptjax.infer import inside, predictor
from gptjax.infer.predictor import GPT
from gptjax.infer.row import Row
from gptjax.io import remote

Models = Sequence["GPT | str | os.PathLike[str]"]
"""Models, or paths of checkpoints as in `gptjax.load`."""

# The largest number of checkpoints that are found without a name, and that can be named.
_MOST_FOUND, _MOST_NAMED = 12, 32
# The checkpoints of larger models are read only if they are named, because that takes long.
_MOST_PARAMETERS = 20_000_000
_NEXT = 3


def kept(gpt: GPT) -> list[str]:
    """Returns the checkpoints that the run of a model kept, in the order of training.

    They are those of all stages in its workdir. The list has at most twelve, evenly chosen, and
    always the model's own. It is empty if the model is not in a workdir or is alone there.
    """
    place = _step_folder(gpt.path)
    if place is None:
        return []
    workdir, found = place.parents[2], []
    for stage in Stage:
        folder = workdir / FOLDER / stage
        with contextlib.suppress(OSError):
            if folder.exists():
                steps = CheckpointStore(str(workdir), stage, read_only=True).steps()
                found += [str(folder / str(step)) for step in sorted(steps)]
    if str(place) not in found or len(found) < 2:
        return []
    return _evenly(found, found.index(str(place)))


def _step_folder(path: str) -> epath.Path | None:
    """Returns WORKDIR/checkpoints/STAGE/STEP as a path; None if `path` is something else."""
    if remote.is_remote(path) and not path.startswith("gs://"):
        return None
    place = remote.absolute(path)
    is_step = place.name.isdecimal() and place.parent.name in tuple(Stage)
    return place if is_step and place.parent.parent.name == FOLDER else None


def _evenly(paths: list[str], own: int) -> list[str]:
    """Returns at most `_MOST_FOUND` of the paths with the first, the last, and number `own`."""
    if len(paths) <= _MOST_FOUND:
        return paths
    places = {round(i) for i in np.linspace(0, len(paths) - 1, _MOST_FOUND - 1)} | {own}
    return [paths[i] for i in sorted(places)]


def checkpoints(
    gpt: GPT, row: Row, found: Mapping[str, np.ndarray], own: Outcome, others: Models | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the entries `checkpoints` and `left_out` of `docs/explain_json.md`.

    Args:
      gpt: the model of the page.
      row: the text.
      found: its activations `attention`, `embedding` and `blocks`, and `logits`.
      own: what the model makes of the row.
      others: the other models. None means the checkpoints that the run of the model kept, if it
        has at most 20 million parameters. Those of them that cannot be read are left out.

    Raises:
      UserError: a model that was named cannot be read, or reads other tokens.
    """
    wanted: Models = _found(gpt) if others is None else _checked(others)
    entries: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    seen: set[str] = set()
    for model in wanted:
        try:
            other = model if isinstance(model, GPT) else _opened(model, gpt)
            # One checkpoint can have several paths. Models in memory can share a path.
            name = str(id(other)) if isinstance(model, GPT) or other is gpt else other.path
            if name in seen:
                continue
            seen.add(name)
            if other is gpt:
                entries.append(_entry(gpt, gpt, row, found, own))
                continue
            _require_equal_tokens(gpt, other, row)
            entries.append(_read(gpt, other, row, found))
        except UserError as error:
            if others is not None:
                raise
            left_out.append({"name": str(model), "reason": str(error)})
    if entries and not any(entry["shown"] for entry in entries):
        entries.append(_entry(gpt, gpt, row, found, own))
    return (entries if len(entries) > 1 else []), left_out


def _found(gpt: GPT) -> list[str]:
    """Returns the checkpoints that are compared if the user names none."""
    count = sum(x.size for x in jax.tree.leaves(gpt.params))
    return kept(gpt) if count <= _MOST_PARAMETERS else []


def _checked(models: Models) -> Models:
    is_sequence = isinstance(models, Sequence) and not isinstance(models, str | bytes)
    require(is_sequence, f"`compare`: is a {type(models).__name__}; give a list of models or paths")
    for model in models:
        is_known = isinstance(model, GPT | str | os.PathLike)
        require(is_known, f"`compare`: has a {type(model).__name__}; give models or paths")
    require(
        len(models) <= _MOST_NAMED, f"`compare`: {len(models)} models; give at most {_MOST_NAMED}"
    )
    return models


def _opened(path: str | os.PathLike[str], gpt: GPT) -> GPT:
    """Returns the model at a path. It is `gpt` itself if the path leads to its checkpoint."""
    checkpoint = open_checkpoint(os.fspath(path), "compare")
    return gpt if checkpoint.path == gpt.path else predictor.from_checkpoint(checkpoint)


def _require_equal_tokens(gpt: GPT, other: GPT, row: Row) -> None:
    """Raises `UserError` unless `other` can read the tokens of the row, which `gpt` made."""
    require(
        other.tokenizer.hash == gpt.tokenizer.hash,
        f"`compare`: {other.path} has another tokenizer than {gpt.path}; its tokens are others",
    )
    longest = int(row.batch.positions.max()) + 1
    require(
        longest <= other.config.context_length,
        f"`compare`: {other.path} reads {other.config.context_length} tokens, and the text has "
        f"{longest}",
    )


def _read(gpt: GPT, other: GPT, row: Row, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if other.task != gpt.task:
        # Its task head reads other rows. What it has in common with the model is the decoder.
        other = dataclasses.replace(other, task=None)
    names = ("attention", "logits", "embedding", "blocks")
    theirs = inside.activations(other.opened, other.params, row.batch, names)
    result = outcome_lib.of(other, other.params, row.batch)
    return _entry(gpt, other, row, found, result, theirs)


def _entry(
    gpt: GPT,
    other: GPT,
    row: Row,
    found: Mapping[str, np.ndarray],
    result: Outcome,
    theirs: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    theirs = found if theirs is None else theirs
    place = _step_folder(other.path)
    same_task = gpt.task == other.task
    return {
        "path": other.path,
        "stage": place.parent.name if place else None,
        "step": int(place.name) if place else None,
        "shown": other is gpt,
        "losses": {
            "lm": result.lm,
            "task": result.task if same_task else None,
            # With the weights of the page's model, so that the totals can be compared.
            "total": _total(gpt, result) if same_task else None,
        },
        "answer": result.answer if same_task else None,
        "surprise": result.surprise,
        "next": _next(other, theirs),
        "heads": _attention_distance(found["attention"], theirs["attention"], _is_read(row)),
        "states": _similarity(found, theirs, _is_read(row)),
    }


def _total(gpt: GPT, result: Outcome) -> float | None:
    is_known = result.task is not None or gpt.task is None
    return outcome_lib.objective(gpt).total(result.task, result.lm) if is_known else None


def _is_read(row: Row) -> np.ndarray:
    """Returns which tokens are not padding, bool [T]."""
    return np.asarray(row.batch.token_types[0] != TokenType.PADDING)


def _next(gpt: GPT, found: Mapping[str, np.ndarray]) -> list[list[dict[str, Any]]]:
    """Returns the most likely next tokens after each token."""
    logits_TV = found["logits"]
    best_TK = outcome_lib.largest(logits_TV, _NEXT)
    total_T = np.asarray(inside.lm_normaliser(gpt.opened, gpt.params, states(found)[-1:]))[0]
    return [
        [
            {"id": int(i), "text": words_lib.readable(gpt.tokenizer.token(int(i))),
             "p": round(float(np.exp(logits[i] - total)), 6)}
            for i in best
        ]
        for logits, total, best in zip(logits_TV, total_T, best_TK, strict=True)
    ]  # fmt: skip


def _attention_distance(
    a_LHTS: np.ndarray, b_LHTS: np.ndarray, is_read_T: np.ndarray
) -> list[list[float]] | None:
    """Returns for each head the total variation between two attentions, meaned over the queries.

    It is 0 for equal weights, and 1 if the two look at entirely different tokens. It is None if the
    models have different heads. Padding is no query.
    """
    if a_LHTS.shape != b_LHTS.shape:
        return None
    means = []
    for a_HTS, b_HTS in zip(a_LHTS, b_LHTS, strict=True):  # one layer at a time, for the memory
        distance_HT = np.abs(a_HTS - b_HTS).sum(axis=-1, dtype=np.float64) / 2
        means.append(distance_HT[:, is_read_T].mean(axis=-1).tolist())
    return means


def states(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the embedding and the output of each block, [N, T, D]."""
    return np.concatenate([found["embedding"][None], found["blocks"]])


def _similarity(
    found: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], is_read_T: np.ndarray
) -> list[float] | None:
    """Returns the mean cosine of each state of the residual stream with that of another model.

    It is None if the models have other sizes. The states of padding do not count.
    """
    a_NTD, b_NTD = states(found), states(theirs)
    if a_NTD.shape != b_NTD.shape:
        return None
    means: list[float] = _cosine(a_NTD, b_NTD)[:, is_read_T].mean(axis=-1).tolist()
    return means


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(norms, 1e-12)


def match(ids: Sequence[int], other_ids: Sequence[int]) -> list[int | None]:
    """Returns for each token of the other text the equal token of the text, or None.

    The tokens are matched in order, and as many as possible: it is a longest common subsequence.

    >>> match([5, 7, 9], [5, 8, 9])
    [0, None, 2]
    """
    # longest[i][j] is that of ids[i:] and other_ids[j:].
    longest = [[0] * (len(other_ids) + 1)]
    for first in reversed(ids):
        row, below = [0], longest[-1]
        for j in range(len(other_ids) - 1, -1, -1):
            equal = first == other_ids[j]
            row.append(below[j + 1] + 1 if equal else max(below[j], row[-1]))
        longest.append(row[::-1])
    longest.reverse()
    found: list[int | None] = [None] * len(other_ids)
    i = j = 0
    while i < len(ids) and j < len(other_ids):
        if ids[i] == other_ids[j]:
            found[j] = i
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return found


def _match_rows(row: Row, other: Row) -> list[int | None]:
    """Matches each sequence of a row with the same sequence of another row, without padding."""
    found: list[int | None] = [None] * other.length
    for (start, stop), (other_start, other_stop) in zip(
        row.sequences, other.sequences, strict=False
    ):
        own, theirs = (
            np.arange(a, b)[_is_read(each)[a:b]]
            for each, a, b in ((row, start, stop), (other, other_start, other_stop))
        )
        pairs = match(row.batch.tokens[0, own].tolist(), other.batch.tokens[0, theirs].tolist())
        for place, partner in zip(theirs, pairs, strict=True):
            found[place] = None if partner is None else int(own[partner])
    return found


def text(gpt: GPT, row: Row, found: Mapping[str, np.ndarray], other: Row) -> dict[str, Any]:
    """Returns the numbers of another text, and how its states differ from those of the text.

    Args:
      gpt: the model.
      row: the text.
      found: its activations `embedding` and `blocks`.
      other: the other text.

    Returns:
      `columns`, `cut`, `answer`, `losses`, `surprise`, `match`, `distance` and `task` of the entry
      `other` in `docs/explain_json.md`.
    """
    theirs = inside.activations(gpt.opened, gpt.params, other.batch, ["embedding", "blocks"])
    result = outcome_lib.of(gpt, gpt.params, other.batch)
    matched = _match_rows(row, other)
    a_NTD, b_NTD = states(found), states(theirs)
    pairs = [(i, j) for j, i in enumerate(matched) if i is not None]
    distance_NT: list[list[float | None]] = [[None] * other.length for _ in a_NTD]
    if pairs:
        i, j = map(list, zip(*pairs, strict=True))
        distances = 1 - _cosine(a_NTD[:, i], b_NTD[:, j])
        for n, token in np.ndindex(*distances.shape):
            distance_NT[n][j[token]] = max(0.0, float(distances[n, token]))
    task = None
    if gpt.task is not None:
        logits_NO = np.asarray(inside.task_lens(gpt.opened, gpt.params, b_NTD, other.batch))
        task = [outcome_lib.answer(gpt, logits_O) for logits_O in logits_NO]
    return {
        "columns": [{"name": k, "text": v} for k, v in other.texts.items()],
        "cut": other.cut,
        "answer": result.answer,
        "losses": {"lm": result.lm, "task": result.task, "total": result.total},
        "surprise": result.surprise,
        "match": matched,
        "distance": distance_NT,
        "task": task,
    }
