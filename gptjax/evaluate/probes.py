"""Zero-shot probes: labelled tasks that a language model answers without training on them.

There are four kinds (Radford et al. 2018, section 5, "Zero-shot Behaviors"). A candidate is one of
the answers that a row offers, and the model scores each candidate by log-probabilities.

acceptability    (CoLA) The score of a sentence is the mean log-probability of its tokens. The
                 answer is "acceptable" if the score is above a threshold. The rows are divided into
                 two random halves. The threshold of a half is the best threshold of the other half.
next_word        (SST-2) "very" is appended to the text. The answer is the label whose word,
                 "negative" or "positive", is then more likely.
multiple_choice  (RACE) The answer is the candidate whose tokens have the highest mean
                 log-probability after the text.
substitution     (Winograd schemas) The answer is the candidate after which the rest of the text has
                 the highest mean log-probability.
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
from gptjax.config.schema import ProbeConfig, ProbeKind, TaskKind, TaskSpec, split_names
from gptjax.data import loader, splits, tasks
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.errors import require
from gptjax.evaluate import metrics
from gptjax.evaluate.score import Evaluator, lm_logits
from gptjax.mesh import Params
from gptjax.model import losses
from gptjax.model.gpt import GPT

# The largest number of logits in a batch (64 MiB of float32).
_LOGITS = 2**24
# Batch lengths are rounded up to a multiple of this number, so that few shapes are compiled.
_LENGTH_STEP = 32


@dataclasses.dataclass(frozen=True)
class Probe:
    """The tokenised rows of a probe: n rows with C candidates each."""

    name: str
    kind: str
    num_candidates: int
    tokens: list[np.ndarray]
    """n * C sequences, int32 [length] each. Candidate c of row i has the index i * C + c."""
    first: np.ndarray
    """int32 [n * C]: the index of the first scored token in each sequence. All later tokens of the
    sequence are scored too."""
    labels: np.ndarray
    """int32 [n]: the index of the right class or candidate."""

    @property
    def metric(self) -> str:
        """The name of the metric that compares the answers with the labels."""
        return "matthews" if self.kind == ProbeKind.ACCEPTABILITY else "accuracy"


def _join(
    parts: Sequence[tuple[str, str]], tokenizer: Tokenizer, context_length: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokenises pairs of texts. The second text is scored after the first text.

    Each sequence begins with a line break, because generated text begins so too. If a sequence is
    longer than the context, its beginning is cut off. The first token of a sequence is never
    scored, because no token precedes it.

    Args:
      parts: pairs (text before, scored text).
      tokenizer: the tokenizer of the model.
      context_length: the largest number of tokens in a sequence.

    Returns:
      The values of `Probe.tokens` and `Probe.first` for the pairs.
    """
    start = np.array(tokenizer.encode("\n")[:1] or [tokenizer.start_id], np.int32)
    before, scored = (tokenizer.encode_batch([part[i] for part in parts]) for i in (0, 1))
    tokens, first = [], []
    for context, span in zip(before, scored, strict=True):
        ids = np.concatenate([start, context, span])[-context_length:]
        tokens.append(ids)
        first.append(max(1, len(ids) - len(span)))
    return tokens, np.array(first, np.int32)


def _parts(config: ProbeConfig, table: LabelledTable, i: int) -> list[tuple[str, str]]:
    """Returns (text before, scored text) for each candidate of row i."""
    text = as_text(table.rows[config.text][i])
    if config.kind == ProbeKind.ACCEPTABILITY:
        return [("", text)]
    if config.kind == ProbeKind.NEXT_WORD:
        # A tokenizer of characters needs the space. The other tokenizers remove it.
        return [(f"{text} {config.append} ", word) for word in split_names(config.words)]
    candidates = [as_text(table.rows[name][i]) for name in split_names(config.choices)]
    if config.kind == ProbeKind.MULTIPLE_CHOICE:
        return [(f"{text} ", candidate) for candidate in candidates]
    before, after = _divided(config, table, i)
    return [(before + candidate, after) for candidate in candidates]


def _divided(config: ProbeConfig, table: LabelledTable, i: int) -> tuple[str, str]:
    """Returns the text before and the text after the place of the candidates in row i.

    This place is the first "_" of the text or, if `config.pronoun` is set, the pronoun.
    """
    text, where = as_text(table.rows[config.text][i]), table.cell(i, config.text)
    if not config.pronoun:
        before, blank, after = text.partition("_")
        require(blank, f"{where}: no _ for what the candidates replace")
        return before, after
    pronoun = as_text(table.rows[config.pronoun][i])
    places = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(pronoun)}(?!\w)", text)]
    if config.pronoun_start:
        start = as_text(table.rows[config.pronoun_start][i])
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
      UserError: a file, a column or the place of the candidates is missing, or a label is not
        understood.
    """
    choices = split_names(config.choices)
    columns = (config.text, *choices, config.pronoun, config.pronoun_start, config.label)
    needed = tuple(column for column in columns if column)
    if config.file:
        table = splits.read_labelled(config.file, config.columns, needed)
    else:
        table = splits.one_split(config.dataset, config.split, needed)
    last = config.limit or None
    rows = {column: values[:last] for column, values in table.columns(needed).items()}
    table = LabelledTable(rows, table.source)
    has_choices = ProbeKind(config.kind).has_candidates
    kind = TaskKind.MULTIPLE_CHOICE if has_choices else TaskKind.CLASSIFICATION
    spec = TaskSpec(kind, config.text, choices=choices, label=config.label)
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
    parts = [part for i in range(count) for part in _parts(config, table, i)]
    labels = tasks.label_ids(spec, table)
    tokens, first = _join(parts, tokenizer, context_length)
    return Probe(name, config.kind, len(parts) // count, tokens, first, labels)


def log_probabilities(
    evaluator: Evaluator, params: Params, probe: Probe
) -> tuple[np.ndarray, np.ndarray]:
    """Scores the candidates of a probe.

    Returns:
      float32 [n, C]: the summed log-probability of the scored tokens, in nats.
      float32 [n, C]: the number of scored tokens.
    """
    mesh, vocab_size = evaluator.mesh, evaluator.model.config.vocab_size
    step = jit_span_step(mesh, evaluator.model)
    lengths = np.array([len(tokens) for tokens in probe.tokens])
    outputs = []
    order, divisor, start = np.argsort(lengths, kind="stable"), mesh_lib.batch_divisor(mesh), 0
    while start < len(order):
        evaluator.check_stop()
        # Sequences are taken from short to long. The length of a batch is the rounded length of its
        # first sequence.
        length = -(-int(lengths[order[start]]) // _LENGTH_STEP) * _LENGTH_STEP
        rows = max(1, _LOGITS // (length * vocab_size) // divisor) * divisor
        fits = order[start:][lengths[order[start:]] <= length][:rows]
        batch = loader.lm_batch([probe.tokens[i] for i in fits], length, rows)
        for row, i in enumerate(fits):
            batch.lm_weights[row, : probe.first[i] - 1] = 0
        outputs.append((fits, step(params, mesh_lib.to_devices(batch, mesh))))
        start += len(fits)
    sums = np.zeros((2, len(lengths)), np.float32)
    # The outputs are fetched at the end, so that the device never waits for the host.
    for fits, output in jax.device_get(outputs):
        sums[:, fits] = np.stack(output)[:, : len(fits)]
    totals, counts = sums.reshape(2, -1, probe.num_candidates)
    return totals, counts


def threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the threshold with the most right answers. Scores above it get the answer 1.

    Args:
      scores: float [n], the scores of the rows.
      labels: int [n], the right answers, 0 or 1.
    """
    distinct, place = np.unique(scores, return_inverse=True)
    ones = np.bincount(place, labels == 1, len(distinct))
    zeros = np.bincount(place, labels != 1, len(distinct))
    # The number of right answers, first with a threshold below all scores, then with a threshold at
    # each distinct score.
    right = np.concatenate([[0], np.cumsum(zeros - ones)]) + ones.sum()
    best = int(right.argmax())
    if best == 0:
        return float(distinct[0]) - 1
    # The threshold is half-way to the next score, because the scores of other rows may lie anywhere
    # between the two.
    return float(distinct[best - 1 : best + 1].mean())


def answers(kind: str, totals: np.ndarray, counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the model's answer to each row.

    Args:
      kind: the kind of the probe, a value of `ProbeKind`.
      totals, counts: float [n, C], the results of `log_probabilities`.
      labels: int [n], the right answers. Only acceptability uses them, to fit its two thresholds.

    Returns:
      int [n]: the index of a class or of a candidate.
    """
    if kind == ProbeKind.NEXT_WORD:
        return totals.argmax(axis=1)
    # A candidate without tokens is never chosen.
    means = np.where(counts > 0, totals / np.maximum(counts, 1), -np.inf)
    if kind != ProbeKind.ACCEPTABILITY:
        return means.argmax(axis=1)
    acceptable = np.zeros(len(labels), np.int64)
    # The halves are random, because files are often sorted by label, or alternate between labels.
    halves = np.random.default_rng(0).permutation(len(labels)) % 2
    for half in (0, 1):
        bound = threshold(means[halves != half, 0], labels[halves != half])
        acceptable[halves == half] = means[halves == half, 0] > bound
    return acceptable


def run(
    evaluator: Evaluator, params: Params, probes: Sequence[Probe]
) -> dict[str, dict[str, float]]:
    """Scores a language model on probes.

    Returns:
      A dictionary for each probe, with the names of the probes as keys. It holds the score (the key
      is the name of the metric), "floor" (the score of the majority-class baseline) and "rows" (the
      number of rows).
    """
    scores = {}
    for probe in probes:
        totals, counts = log_probabilities(evaluator, params, probe)
        chosen = answers(probe.kind, totals, counts, probe.labels)
        names, classes = (probe.metric,), max(probe.num_candidates, 2)
        score = metrics.compute(names, probe.labels, chosen, classes)
        baseline = metrics.majority_baseline(names, probe.labels, classes)
        rows = float(len(probe.labels))
        scores[probe.name] = {**score, "floor": baseline[probe.metric], "rows": rows}
    return scores


@functools.cache
def jit_span_step(mesh: Mesh, model: GPT) -> Callable[[Params, Batch], Any]:
    """Returns a jitted function (params, batch) -> (log-probabilities, weights).

    Both results are float32 [B], replicated over the devices. For each row they are the sum of the
    log-probabilities of its tokens, weighted by `lm_weights`, and the sum of these weights.
    """

    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits_BTV = lm_logits(model, params, batch.tokens, batch.segment_ids, batch.positions)
        targets_BT = losses.lm_targets(batch)
        log_p_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
        log_p_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return (log_p_BT * batch.lm_weights).sum(axis=1), batch.lm_weights.sum(axis=1)

    return jax.jit(step, out_shardings=mesh_lib.replicated(mesh))
