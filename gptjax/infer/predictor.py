"""A trained model in Python: for notebooks, services, and the modes of `launch.py`."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.load import open_checkpoint
from gptjax.config.schema import (
    AttentionKind,
    LmMean,
    MeshConfig,
    ModelConfig,
    ProbeConfig,
    TaskKind,
    TaskSpec,
)
from gptjax.data import tasks
from gptjax.data.packing import Packer
from gptjax.data.tables.labelled import LabelledTable
from gptjax.data.tasks import Examples
from gptjax.data.tokens import store
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import SPECIALS, UNKNOWN, Tokenizer
from gptjax.errors import require
from gptjax.evaluate import metrics, probes
from gptjax.evaluate import score as score_lib
from gptjax.infer import decoder as decoder_lib
from gptjax.infer import generate as generate_lib
from gptjax.infer.decoder import Decoder
from gptjax.infer.generate import Sampling
from gptjax.mesh import Params
from gptjax.model import gpt
from gptjax.model.gpt import GPT
from gptjax.model.objective import Objective

# Examples of a batch: enough to fill the device, few enough to need little memory.
_BATCH = 64
Rows = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the model says about rows, in their order."""

    labels: list[Any]
    """Class names, answer names, or numbers (regression)."""
    probabilities: np.ndarray | None
    """float32 [n, number of labels]; None in a regression."""
    label_names: tuple[str, ...]
    cut: int
    """Rows whose text was cut to fit the context."""
    empty: int
    """Rows with an empty text."""


@dataclasses.dataclass(frozen=True)
class LoadedGPT:
    """A checkpoint in memory.

    Attributes:
      config: sizes and numerics.
      params: nested dict of arrays.
      tokenizer: text <-> ids.
      task: the task it was fine-tuned for, or None.
      path: the checkpoint that was loaded.
    """

    config: ModelConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer
    task: TaskSpec | None
    meta: meta_lib.Meta = dataclasses.field(repr=False)
    mesh: Mesh = dataclasses.field(repr=False)
    path: str

    @property
    def model(self) -> GPT:
        """The Flax module of the parameters, for any number of rows."""
        # The kernels share the rows between the devices, which needs enough of them.
        return self._make(AttentionKind.PLAIN if self.mesh.size > 1 else AttentionKind.AUTO)

    def _batched(self, longest: int | None = None) -> GPT:
        """The same for batches whose rows the devices share."""
        return self._make(AttentionKind.AUTO, self.mesh, longest)

    @functools.cached_property
    def _decoder(self) -> Decoder:
        """A second copy of the weights, from the first generation on: later ones begin at once."""
        return decoder_lib.prepare(self.model, self.params)

    def _make(
        self, attention: AttentionKind, mesh: Mesh | None = None, longest: int | None = None
    ) -> GPT:
        # The attention of the training was for its devices, not for these.
        config = dataclasses.replace(self.config, attention=attention)
        return gpt.make_model(config, self.task, mesh, longest)

    def lm_logits(self, tokens: Any, segment_ids: Any = None) -> jax.Array:
        """Returns float32 [B, T, V]: logits of the token after each token.

        Args:
          tokens: int32 [B, T], T at most the context length (per segment where packed).
          segment_ids: int32 [B, T]: padding 0, packed sequences any other number, another than
            that of the one before; None: one a row.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        require(tokens.ndim == 2, f"lm_logits: tokens must be [B, T], not {tokens.shape}")
        segments = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
        require(
            segments.shape == tokens.shape,
            f"lm_logits: segment_ids {segments.shape} must have the shape of tokens {tokens.shape}",
        )
        require(
            int(tokens.min(initial=0)) >= 0 and int(tokens.max(initial=0)) < self.config.vocab_size,
            f"lm_logits: token ids must be 0 to {self.config.vocab_size - 1}",
        )
        positions, segments = _packing(segments)
        longest = int(positions.max(initial=0)) + 1
        require(
            longest <= self.config.context_length,
            f"lm_logits: a sequence of {longest} tokens exceeds the context of "
            f"{self.config.context_length}",
        )
        return _lm_logits(self.model, self.params, tokens, segments, positions)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_samples: int = 1,
        seed: int = 0,
    ) -> list[str]:
        """Returns `num_samples` texts: the prompt and up to `max_new_tokens` more tokens.

        Args:
          prompt: may be empty.
          max_new_tokens: may exceed the context; the window then moves by half a context.
          temperature, top_k, top_p: see `Sampling`.
          num_samples: texts to draw.
          seed: equal seeds give equal texts.
        """
        require(max_new_tokens >= 0, f"`max_new_tokens`={max_new_tokens}: must not be negative")
        require(num_samples > 0, f"`num_samples`={num_samples}: must be greater than 0")
        sampling = Sampling(temperature, top_k, top_p)
        prompt_ids = self.tokenizer.encode(prompt)
        # Something must be read before anything can be said: a line break begins a new text.
        ids = prompt_ids or self.tokenizer.encode("\n") or [self.tokenizer.start_id]
        banned = np.zeros(self.config.vocab_size, bool)
        banned[len(self.tokenizer) :] = True
        banned[[self.tokenizer.token_id(name) for name in (*SPECIALS, UNKNOWN)]] = True
        new = generate_lib.generate(
            self._decoder, np.array(ids, np.int32), max_new_tokens, num_samples, sampling, seed,
            banned,
        )  # fmt: skip
        return [self.tokenizer.decode([*prompt_ids, *row]) for row in new]

    def encode(
        self, rows: Rows | LabelledTable, where: str = "rows", labelled: bool = False
    ) -> Examples:
        """Tokenises rows (column name -> values) for the task; errors name `where`."""
        require(self.task, f"{self.path}: was not fine-tuned for a task; use a finetune checkpoint")
        assert self.task is not None
        wanted = [*self.task.text_columns, *([self.task.label] if labelled else [])]
        table = rows if isinstance(rows, LabelledTable) else LabelledTable(rows, where)
        table.require_columns(wanted)
        return tasks.encode(self.task, table, self.tokenizer, self.config.context_length, labelled)

    def predict(self, rows: Rows | Sequence[Mapping[str, Any]] | LabelledTable) -> Predictions:
        """Returns labels and probabilities (or numbers) of every row, in order.

        Args:
          rows: the task's text columns, as column name -> values or as one mapping a row; or the
            table of a file.
        """
        if not isinstance(rows, Mapping | LabelledTable):
            none = self.task.text_columns if self.task else ()
            names = dict.fromkeys([name for row in rows for name in row] or none)
            rows = {name: [row.get(name) for row in rows] for name in names}
        examples = self.encode(rows)
        assert self.task is not None
        if not len(examples):
            return Predictions([], None, self.task.labels, 0, 0)
        outputs = self._run(examples, Objective(self.task.kind, lm_weight=0.0))
        found = score_lib.predictions(self.task, outputs.logits)
        if self.task.kind is TaskKind.REGRESSION:
            return Predictions(found.tolist(), None, (), examples.cut, examples.empty)
        probabilities = np.asarray(jax.nn.softmax(outputs.logits, axis=-1))
        labels = [self.task.labels[i] for i in found]
        return Predictions(labels, probabilities, self.task.labels, examples.cut, examples.empty)

    def score(
        self, rows: Rows | LabelledTable, where: str = "rows", names: str = ""
    ) -> dict[str, float]:
        """Returns losses and metrics on labelled rows.

        Args:
          rows: text columns and the label column.
          where: what to call the rows in an error message.
          names: metrics, comma-separated; empty: the usual ones of the task.
        """
        examples = self.encode(rows, where, labelled=True)
        assert self.task is not None
        assert examples.labels is not None
        require(len(examples), f"{where}: no rows")
        chosen = metrics.parse(names, self.task.kind)
        outputs = self._run(examples, Objective(self.task.kind))
        assert outputs.task_loss is not None
        found = score_lib.predictions(self.task, outputs.logits)
        scores = metrics.compute(chosen, examples.labels, found, len(self.task.labels))
        baseline = metrics.majority_baseline(chosen, examples.labels, len(self.task.labels))
        losses = {"task_loss": outputs.task_loss, "lm_loss": outputs.lm_loss}
        return losses | scores | {f"floor_{name}": value for name, value in baseline.items()}

    def score_text(self, texts: Iterable[str], window: int = 0) -> dict[str, float]:
        """Returns {"loss" (nats per token), "perplexity"} of the LM on the texts in a row.

        Args:
          texts: read once, in order.
          window: tokens seen at once; 0: the context length.
        """
        stream = store.token_stream(texts, self.tokenizer)
        require(len(stream) > 1, "evaluate: the text has fewer than two tokens")
        rows = mesh_lib.batch_divisor(self.mesh) * 8
        return self._evaluator(Objective()).language_model(
            self.params, stream, window or self.config.context_length, rows
        )

    def probe(self, configs: Mapping[str, ProbeConfig]) -> dict[str, dict[str, float]]:
        """Returns name -> score, floor and rows of each zero-shot probe (see `probes.py`)."""
        built = [
            probes.build(name, each, self.tokenizer, self.config.context_length)
            for name, each in configs.items()
        ]
        return probes.run(self._evaluator(Objective()), self.params, built)

    def _evaluator(self, objective: Objective, longest: int | None = None) -> score_lib.Evaluator:
        return score_lib.Evaluator(self._batched(longest), self.mesh, objective)

    def _run(self, examples: Examples, objective: Objective) -> score_lib.Outputs:
        divisor = mesh_lib.batch_divisor(self.mesh)
        # Powers of two: requests of about the same size find their program compiled.
        wanted = max(64, int(examples.lengths.max()), round(5 * float(examples.lengths.mean())))
        finetune = self.meta.experiment_config().finetune
        means = finetune is not None and finetune.lm_mean == LmMean.SEQUENCE
        packer = Packer(examples.lengths, _BATCH, _power(wanted), divisor, means)
        packer.rows = _power(packer.rows)
        evaluator = self._evaluator(objective, _power(examples.max_sequence_length))
        return evaluator.outputs(self.params, examples, packer)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _packing(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions within each run of one number, and the runs numbered 1, 2, ...; 0 where padding."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    first = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    positions = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    runs = jnp.cumsum(first, axis=1, dtype=jnp.int32)
    return jnp.where(segments != 0, positions, 0), jnp.where(segments != 0, runs, 0)


def _lm_logits_of(
    model: GPT, params: Params, tokens: jax.Array, segments: jax.Array, positions: jax.Array
) -> jax.Array:
    x_BTD = gpt.run(model, params, tokens, segments, positions, method="hidden")
    return gpt.run(model, params, x_BTD, method="lm_logits")


_lm_logits = jax.jit(_lm_logits_of, static_argnames=("model",))


def load(
    path: str | os.PathLike[str],
    mesh_config: MeshConfig | None = None,
    argument: str = "path",
) -> LoadedGPT:
    """Loads a checkpoint.

    Args:
      path: a workdir (its last stage's best step), WORKDIR/checkpoints/STAGE, or a step below that.
      mesh_config: how to lay it out; by default over all devices along `data`.
      argument: name of the path in error messages.

    Raises:
      UserError: nothing there, or it is damaged.
    """
    mesh = mesh_lib.make_mesh(mesh_config or MeshConfig())
    found = open_checkpoint(os.fspath(path), argument)
    meta, where = found.meta, found.path
    tokenizer = tokenizer_lib.from_json(meta.tokenizer_json, where)
    return LoadedGPT(meta.model, found.load_params(mesh), tokenizer, meta.task, meta, mesh, where)
