"""Zero-shot probes: what a language model knows of a task that nobody has taught it.

The four of Radford et al. 2018, section 5, "Zero-shot Behaviors":

acceptability    (CoLA) the mean log-probability of a sentence's tokens, and a threshold. The
                 threshold of each half of the rows is the one that is best on the other half.
next_word        (SST-2) "very" is appended to the text; the label is that of the word, "negative"
                 or "positive", that is then more likely.
multiple_choice  (RACE) the answer whose tokens have the highest mean log-probability after the
                 context.
substitution     (Winograd schemas) the candidate after which the rest of the text has the highest
                 mean log-probability.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.config.schema import (
    FinetuneConfig,
    ProbeConfig,
    ProbeKind,
    TaskKind,
    TaskSpec,
    split_names,
)
from gptjax.data import loader, splits, tasks
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.errors import require
from gptjax.evaluate import metrics
from gptjax.evaluate.score import never
from gptjax.mesh import Params
from gptjax.model import gpt, losses
from gptjax.model.gpt import GPT

# Logits held at a time, in elements (64 MiB of float32).
_LOGITS = 2**24
# Lengths are rounded up to a multiple of this: few shapes are compiled.
_STEP = 32

# (params, batch) -> float32 [B], [B]: summed log-probability and number of the tokens scored.
SpanStep = Callable[[Params, Any], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A probe's rows, tokenised."""

    name: str
    kind: str
    num_candidates: int
    tokens: list[np.ndarray]
    """int32 [length]: candidate c of row i at i * num_candidates + c."""
    first: np.ndarray
    """int32 [n * C]: the first token that is scored, and all after it are."""
    labels: np.ndarray
    """int32 [n]"""

    @property
    def metric(self) -> str:
        """What the answers are scored by."""
        return "matthews" if self.kind == ProbeKind.ACCEPTABILITY else "accuracy"


def _table(config: ProbeConfig, needed: tuple[str, ...]) -> LabelledTable:
    if config.file:
        return splits.read_labelled(config.file, config.columns, needed)
    source = FinetuneConfig(dataset=config.dataset)
    return splits.one_split(source, config.split, needed)


def _needed(config: ProbeConfig) -> tuple[str, ...]:
    names = (config.text, *split_names(config.choices), config.pronoun, config.pronoun_start)
    return tuple(name for name in (*names, config.label) if name)


def _join(
    parts: Sequence[tuple[str, str]], tokenizer: Tokenizer, context_length: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the tokens of (before, scored) and the first scored one of each.

    Each is begun by a line break, as generated text is; of one longer than the context the end is
    kept. The first token of a sequence is never scored: nothing comes before it.
    """
    start = np.array(tokenizer.encode("\n")[:1] or [tokenizer.start_id], np.int32)
    before, scored = (tokenizer.encode_batch([part[i] for part in parts]) for i in (0, 1))
    tokens, first = [], []
    for context, span in zip(before, scored, strict=True):
        ids = np.concatenate([start, context, span])[-context_length:]
        tokens.append(ids)
        first.append(max(1, len(ids) - len(span)))
    return tokens, np.array(first, np.int32)


def _parts(config: ProbeConfig, rows: dict[str, list[Any]], i: int, where: str):
    """Yields (what comes before, what is scored) for each candidate of row i."""
    text = as_text(rows[config.text][i])
    if config.kind == ProbeKind.ACCEPTABILITY:
        yield "", text
        return
    if config.kind == ProbeKind.NEXT_WORD:
        # The space is for character tokenizers; others drop it.
        for word in split_names(config.words):
            yield f"{text} {config.append} ", word
        return
    candidates = [as_text(rows[name][i]) for name in split_names(config.choices)]
    if config.kind == ProbeKind.MULTIPLE_CHOICE:
        for candidate in candidates:
            yield f"{text} ", candidate
        return
    before, after = _divided(config, rows, text, i, f"{where}: row {i + 1}, column {config.text}")
    for candidate in candidates:
        yield before + candidate, after


def _divided(
    config: ProbeConfig, rows: dict[str, list[Any]], text: str, i: int, where: str
) -> tuple[str, str]:
    """What stands before and after the place where the candidates are put."""
    if not config.pronoun:
        before, found, after = text.partition("_")
        require(found, f"{where}: no _ for what the candidates replace")
        return before, after
    pronoun = as_text(rows[config.pronoun][i])
    places = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(pronoun)}(?!\w)", text)]
    if config.pronoun_start:
        start = as_text(rows[config.pronoun_start][i])
        places = [place for place in places if str(place) == start]
    count = len(places) if pronoun else 0
    require(
        count == 1,
        f"{where}: has {pronoun!r} {count} times as a word"
        + (f" at {start}" if config.pronoun_start else "; a column of its place is needed")
        + f" (column {config.pronoun})",
    )
    return text[: places[0]], text[places[0] + len(pronoun) :]


def build(name: str, config: ProbeConfig, tokenizer: Tokenizer, context_length: int) -> Probe:
    """Reads and tokenises a probe.

    Raises:
      UserError: no such file, column or place to substitute at; a label that is not understood.
    """
    table = _table(config, _needed(config))
    rows = table.columns(_needed(config))
    if config.limit:
        rows = {column: values[: config.limit] for column, values in rows.items()}
    chosen = ProbeKind(config.kind).has_candidates
    choices = split_names(config.choices) if chosen else ()
    kind = TaskKind.MULTIPLE_CHOICE if chosen else TaskKind.CLASSIFICATION
    spec = TaskSpec(kind, config.text, choices=choices, label=config.label)
    table = LabelledTable(rows, table.source)
    spec = tasks.find_labels(spec, table)
    words = split_names(config.words)
    require(
        config.kind != ProbeKind.NEXT_WORD or len(words) == len(spec.labels),
        f"`probes.{name}.words`={config.words}: the {len(spec.labels)} labels "
        f"{', '.join(spec.labels[:5])} need a word each",
    )
    require(
        config.kind != ProbeKind.ACCEPTABILITY or spec.labels == ("0", "1"),
        f"{table.source}: column {config.label}: the labels of acceptability are 0 (not "
        f"acceptable) and 1, not {', '.join(spec.labels[:5])}",
    )
    count = len(rows[config.text])
    parts = [part for i in range(count) for part in _parts(config, rows, i, table.source)]
    labels = tasks.label_ids(spec, table)
    tokens, first = _join(parts, tokenizer, context_length)
    return Probe(name, config.kind, len(parts) // count, tokens, first, labels)


def log_probabilities(
    step: SpanStep,
    params: Params,
    probe: Probe,
    vocab_size: int,
    mesh: Mesh,
    stop: Callable[[], bool] = never,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns summed log-probabilities (nats) of the scored tokens and their number, [n, C] both.

    None if stopped.

    Args:
      step: from `steps.jit_span_step`.
      params: of the model.
      probe: what to score.
      vocab_size: of the model, which decides how many rows fit a batch.
      mesh: the devices.
      stop: asked between batches.
    """
    lengths = np.array([len(tokens) for tokens in probe.tokens])
    outputs = []
    order, divisor, start = np.argsort(lengths, kind="stable"), mesh_lib.batch_divisor(mesh), 0
    while start < len(order):
        if stop():
            return None
        # Shortest first; the length of a batch is that of its longest row.
        length = -(-int(lengths[order[start]]) // _STEP) * _STEP
        rows = max(1, _LOGITS // (length * vocab_size) // divisor) * divisor
        fits = order[start:][lengths[order[start:]] <= length][:rows]
        batch = loader.lm_batch([probe.tokens[i] for i in fits], length, rows)
        for row, i in enumerate(fits):
            batch.lm_weights[row, : probe.first[i] - 1] = 0
        outputs.append((fits, step(params, mesh_lib.to_devices(batch, mesh))))
        start += len(fits)
    found = np.zeros((2, len(lengths)), np.float32)
    # Fetched at the end: the device never waits for the host.
    for fits, output in jax.device_get(outputs):
        found[:, fits] = np.stack(output)[:, : len(fits)]
    totals, counts = found.reshape(2, -1, probe.num_candidates)
    return totals, counts


def threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the bound above which to answer 1, so that most of `labels` (0, 1) are met."""
    distinct, place = np.unique(scores, return_inverse=True)
    ones = np.bincount(place, labels == 1, len(distinct))
    zeros = np.bincount(place, labels != 1, len(distinct))
    # Right answers with the bound at each distinct score, and below all of them.
    right = np.concatenate([[0], np.cumsum(zeros - ones)]) + ones.sum()
    best = int(right.argmax())
    if best == 0:
        return float(distinct[0]) - 1
    # Half-way to the next score: where the other half's scores will lie is not known.
    return float(distinct[best - 1 : best + 1].mean())


def answers(kind: str, totals: np.ndarray, counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns int [n]: the class or candidate that the log-probabilities say."""
    if kind == ProbeKind.NEXT_WORD:
        return totals.argmax(axis=1)
    # No token is no answer.
    means = np.where(counts > 0, totals / np.maximum(counts, 1), -np.inf)
    if kind != ProbeKind.ACCEPTABILITY:
        return means.argmax(axis=1)
    found = np.zeros(len(labels), np.int64)
    # Rows often come sorted by their label, or with their labels in turn.
    halves = np.random.default_rng(0).permutation(len(labels)) % 2
    for half in (0, 1):
        bound = threshold(means[halves != half, 0], labels[halves != half])
        found[halves == half] = means[halves == half, 0] > bound
    return found


def run(
    probes: Sequence[Probe],
    step: SpanStep,
    params: Params,
    vocab_size: int,
    mesh: Mesh,
    stop: Callable[[], bool] = never,
) -> dict[str, dict[str, float]] | None:
    """Returns name -> the probe's score by its metric, the commonest answer's "floor", "rows".

    None if stopped.
    """
    found = {}
    for probe in probes:
        scored = log_probabilities(step, params, probe, vocab_size, mesh, stop)
        if scored is None:
            return None
        totals, counts = scored
        said = answers(probe.kind, totals, counts, probe.labels)
        names, classes = (probe.metric,), max(probe.num_candidates, 2)
        score = metrics.compute(names, probe.labels, said, classes)
        floor = metrics.floor(names, probe.labels, classes)
        found[probe.name] = {
            **score, "floor": floor[probe.metric], "rows": float(len(probe.labels)),
        }  # fmt: skip
    return found


@functools.cache
def jit_span_step(mesh: Mesh, model: GPT) -> Callable[[Params, Batch], Any]:
    """Returns the jitted (params, batch) -> for each row the sum of the log-probabilities of the
    tokens that `lm_weights` predict, and the sum of these weights: float32 [B] both, replicated.
    """

    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        x_BTD = gpt.run(
            model, params, batch.tokens, batch.segment_ids, batch.positions, method="hidden"
        )
        logits_BTV = gpt.run(model, params, x_BTD, method="lm_logits")
        targets_BT = losses.lm_targets(batch)
        log_p_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
        log_p_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
        output = ((log_p_BT * batch.lm_weights).sum(axis=1), batch.lm_weights.sum(axis=1))
        return jax.lax.with_sharding_constraint(output, mesh_lib.replicated(mesh))

    return jax.jit(step)
