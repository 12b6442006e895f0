"""The class `GPT`: a trained model, for notebooks, services and the modes of the command line."""

import contextlib
import dataclasses
import functools
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.checkpoint.load import open_checkpoint
from gptjax.checkpoint.meta import Meta
from gptjax.config import schema
from gptjax.config.schema import AttentionKind, MeshConfig, TaskKind, TaskSpec
from gptjax.data import tasks
from gptjax.data.packing import Packer
from gptjax.data.tables import memory
from gptjax.data.tables.labelled import LabelledTable
from gptjax.data.tables.memory import Table
from gptjax.data.tokens import store
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import UserError, brief, require
from gptjax.evaluate import calibration, metrics, probes
from gptjax.evaluate import score as score_lib
from gptjax.infer import embedding as embedding_lib
from gptjax.infer import generate as generate_lib
from gptjax.infer import inside as inside_lib
from gptjax.infer import row as row_lib
from gptjax.infer.inside import Changes
from gptjax.infer.row import Row, Texts
from gptjax.io import files, remote
from gptjax.mesh import Params
from gptjax.model import gpt as gpt_lib
from gptjax.model.objective import Objective

_lm_logits = jax.jit(score_lib.lm_logits, static_argnames=("model",))
# The number of examples in a batch: enough to keep a device busy, and few enough for its memory.
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of a model for some rows, in the order of the rows."""

    labels: list[Any]
    """The name of the most likely class or answer of each row; in a regression, the number."""
    probabilities: np.ndarray | None
    """float32 [number of rows, number of labels]; None in a regression, or if there are no rows.
    They are the softmax of the logits divided by `GPT.temperature`."""
    label_names: tuple[str, ...]
    """The label of each column of `probabilities`; () in a regression."""
    cut: int
    """The number of rows with a text that was shortened to fit into the context."""
    empty: int
    """The number of rows with an empty text."""
    unknown: float = 0.0
    """The fraction of the tokens of the texts that the tokenizer does not know."""
    reading: tasks.Reading = dataclasses.field(default_factory=tasks.Reading)
    """The part of the texts that the model reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class GPT:
    """A trained model in memory; `gptjax.load`, `finetune` and `pretrain` return one.

    Every model computes logits and generates text. Only a model that was fine-tuned for a task
    (`task` is not None) predicts and scores labelled rows.

    Attributes:
      config: the configuration of the model.
      params: the parameters, as nested dictionaries of arrays.
      tokenizer: the tokenizer, which converts text to token ids and back.
      task: the task of the fine-tuning, with the names of its labels; None for a language model.
      meta: everything that the checkpoint holds besides the arrays.
      mesh: the devices that hold the parameters.
      path: the folder of the checkpoint, WORKDIR/checkpoints/STAGE/STEP.
      summary: the contents of WORKDIR/summary.json; empty if there is no such file.
      folder: an object that keeps a temporary workdir until this model is deleted. None means that
        the workdir is not temporary.
      temperature: the number that divides the task logits, fitted on the validation split (see
        `gptjax.evaluate.calibration`). It changes the probabilities, and no label. It is 1.0 for
        models of earlier versions.
    """

    config: schema.ModelConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: tokenizer_lib.Tokenizer
    task: TaskSpec | None
    meta: Meta = dataclasses.field(repr=False)
    mesh: Mesh = dataclasses.field(repr=False)
    path: str
    summary: dict[str, Any] = dataclasses.field(repr=False, default_factory=dict)
    folder: object = dataclasses.field(repr=False, default=None)
    temperature: float = 1.0

    @functools.cached_property
    def model(self) -> gpt_lib.GPT:
        """The Flax module of the parameters, for batches of any number of rows."""
        # On several devices, plain attention is used. The other implementations divide the rows of
        # a batch among the devices. For that, the number of rows must be a multiple of the number
        # of devices, but the number of rows in a user's batch is arbitrary.
        several = self.mesh.size > 1
        return self._module(AttentionKind.PLAIN if several else AttentionKind.AUTO)

    @functools.cached_property
    def experiment(self) -> schema.Experiment:
        """The configuration of the run. An imported model has only default training settings."""
        return self.meta.experiment_config()

    @functools.cached_property
    def _decoder(self) -> generate_lib.Decoder:
        """The model with a copy of its parameters for generation, made at the first generation."""
        return generate_lib.prepare(self.model, self.params)

    def _module(
        self, attention: AttentionKind, mesh: Mesh | None = None, longest: int | None = None
    ) -> gpt_lib.GPT:
        # The attention implementation of the training run is not used, because it was chosen for
        # other devices.
        config = dataclasses.replace(self.config, attention=attention)
        return gpt_lib.make_model(config, self.task, mesh, longest)

    @functools.cached_property
    def never_drawn(self) -> np.ndarray:
        """bool [V], true for the tokens that are never generated.

        They are the special tokens, and ids of the vocabulary that the tokenizer does not have.
        """
        banned_V = np.zeros(self.config.vocab_size, bool)
        banned_V[len(self.tokenizer) :] = True
        special = (*tokenizer_lib.SPECIALS, tokenizer_lib.UNKNOWN)
        banned_V[[self.tokenizer.token_id(name) for name in special]] = True
        return banned_V

    def require_task(self) -> TaskSpec:
        """Returns the task. Raises `UserError` if the model is a language model."""
        if self.task is None:
            raise UserError(
                f"{self.path}: was not fine-tuned for a task; use a finetune checkpoint"
            )
        return self.task

    def lm_logits(self, tokens: Any, segment_ids: Any = None) -> jax.Array:
        """Returns for each token the logits of the next token, float32 [B, T, V].

        Args:
          tokens: int32 [B, T], token ids. No sequence must be longer than the context.
          segment_ids: int32 [B, T], for rows that hold several sequences. All tokens of a sequence
            have the same nonzero id, and adjacent sequences have different ids. Padding has the
            id 0. None means that each row is one sequence.

        Raises:
          UserError: shapes are wrong, ids are not in the vocabulary, or a sequence is too long.
        """
        tokens = _int32(tokens, "tokens", self.config.vocab_size - 1)
        require(tokens.ndim == 2, f"`tokens`: must be [B, T], not {tokens.shape}")
        segments = np.ones_like(tokens)
        if segment_ids is not None:
            segments = _int32(segment_ids, "segment_ids", np.iinfo(np.int32).max)
        require(
            segments.shape == tokens.shape,
            f"`segment_ids`: {segments.shape} must have the shape of tokens {tokens.shape}",
        )
        positions, segments = _positions(jnp.asarray(segments))
        longest = int(positions.max(initial=0)) + 1
        require(
            longest <= self.config.context_length,
            f"`tokens`: a sequence of {longest} tokens exceeds the context of "
            f"{self.config.context_length}",
        )
        return _lm_logits(self.model, self.params, jnp.asarray(tokens), segments, positions)

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_samples: int = 1,
        seed: int = 0,
    ) -> list[str]:
        """Returns texts that begin with the prompt.

        Args:
          prompt: a text, or its token ids. It can be empty.
          max_new_tokens: the number of tokens after the prompt. If the text becomes as long as the
            context, the model goes on from the last half of it.
          temperature: a divisor of the logits. 0 means that the most likely token is always taken.
          top_k: the number of most likely tokens to draw from. 0 means all tokens.
          top_p: a probability. The draw is limited to the smallest set of most likely tokens whose
            probabilities add up to at least `top_p`.
          num_samples: the number of texts.
          seed: the seed of the random numbers, 0 to 2**32 - 1. Equal seeds give equal texts.

        Returns:
          `num_samples` texts.

        Raises:
          UserError: a number is out of its range, or the prompt is neither a text nor token ids.
        """
        for name, value in {"max_new_tokens": max_new_tokens, "num_samples": num_samples}.items():
            require(isinstance(value, int | np.integer), f"`{name}`={value}: must be an integer")
        require(max_new_tokens >= 0, f"`max_new_tokens`={max_new_tokens}: must not be negative")
        require(num_samples > 0, f"`num_samples`={num_samples}: must be greater than 0")
        if isinstance(prompt, str):
            prompt_ids = self.tokenizer.encode(prompt)
        else:
            require(not isinstance(prompt, bytes), "`prompt`: is bytes; give a text")
            prompt_ids = _int32(prompt, "prompt", self.config.vocab_size - 1).tolist()
        # The model needs at least one token to read. An empty prompt becomes a line break, because
        # in the training data a line break precedes a new text.
        ids = prompt_ids or self.tokenizer.encode("\n") or [self.tokenizer.start_id]
        sampler = generate_lib.make_sampler(self.never_drawn, seed, temperature, top_k, top_p)
        new = generate_lib.generate(
            self._decoder, np.array(ids, np.int32), max_new_tokens, num_samples, sampler
        )
        return [self.tokenizer.decode([*prompt_ids, *row]) for row in new]

    def predict(self, rows: Table) -> Predictions:
        """Returns the label and the probabilities (or the number) of every row, in order.

        Args:
          rows: a table with the text columns of the task. It is a mapping of column names to lists,
            a list of mappings, a pandas DataFrame, a pyarrow Table or a `datasets.Dataset`. Other
            columns are not read.

        Raises:
          UserError: the model is a language model, or a column is missing.
        """
        task = self.require_task()
        examples = self.encode(rows)
        if not len(examples):
            return Predictions([], None, task.labels, 0, 0)
        facts = examples.cut, examples.empty, examples.unknown, examples.reading
        evaluator, packer = self._batched(examples, Objective(task.kind, lm_weight=0.0))
        outputs = evaluator.outputs(self.params, examples, packer)
        found = score_lib.predictions(task, outputs.logits)
        if task.kind is TaskKind.REGRESSION:
            return Predictions(found.tolist(), None, (), *facts)
        logits = outputs.logits / np.float32(self.temperature)
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
        labels = [task.labels[i] for i in found]
        return Predictions(labels, probabilities, task.labels, *facts)

    def score(self, rows: Table, where: str = "`rows`", names: str = "") -> dict[str, float]:
        """Returns the losses and the metrics of the model, and the metrics of a baseline.

        Args:
          rows: a table with the text and label columns of the task, in a form that `predict` takes.
          where: the name of the table in error messages.
          names: comma-separated names of metrics. An empty string means accuracy, or in a
            regression all of its metrics.

        Returns:
          A dictionary with the keys "task_loss", "lm_loss" (nats), the name of each metric, and
          "floor_METRIC" for each metric, which is the score of the majority-class baseline (in a
          regression, of the mean baseline), "unknown_tokens", the fraction of the tokens of the
          texts that the tokenizer does not know, and "read_tokens", the fraction of the tokens of
          the texts that the model reads (the others do not fit into the context). "task_loss" is
          the loss that was trained, without the temperature. "calibrated_task_loss" is the loss
          with it, which is the mean of -log of the probability that `predict` gives to the label.
          A regression lacks it.

        Raises:
          UserError: the model is a language model, a column is missing, there are no rows, or a
            label is unknown.
        """
        task = self.require_task()
        examples = self.encode(rows, where, labelled=True)
        assert examples.labels is not None
        require(len(examples), f"{where}: no rows")
        chosen = metrics.parse(names, task.kind)
        evaluator, packer = self._batched(examples, Objective(task.kind))
        scores, logits = evaluator.task_with_outputs(self.params, examples, packer, task, chosen)
        del scores["loss"]
        if calibration.is_defined(task.kind):
            scores["calibrated_task_loss"] = calibration.task_loss(
                logits, examples.labels, self.temperature
            )
        baseline = metrics.majority_baseline(chosen, examples.labels, len(task.labels))
        scores |= {f"floor_{name}": value for name, value in baseline.items()}
        share = examples.reading.share
        return scores | {"unknown_tokens": examples.unknown, "read_tokens": share}

    def encode(self, rows: Table, where: str = "`rows`", labelled: bool = False) -> tasks.Examples:
        """Returns rows as token sequences, in the format on which the task head was trained.

        Args:
          rows: a table in a form that `predict` takes.
          where: the name of the table in error messages.
          labelled: whether to read the label column too.
        """
        task = self.require_task()
        wanted = [*task.text_columns, *([task.label] if labelled else [])]
        if not isinstance(rows, LabelledTable):
            rows = LabelledTable(memory.columns(rows, where, wanted), where)
        rows.require_columns(wanted)
        return tasks.encode(task, rows, self.tokenizer, self.config.context_length, labelled)

    def read(self, texts: Texts, label: Any = None) -> Row:
        """Returns a text as the packed row that the model reads.

        Args:
          texts: a text, or for a task with several texts a mapping of column names to texts.
          label: the label, as in a file of the task. A language model has none.

        Raises:
          UserError: a text is missing or does not fit, or the label does not exist.
        """
        if self.task is None:
            require(isinstance(texts, str), "`text`: a language model reads one text")
            require(label is None, f"`label`={label}: {self.path} is a language model")
            return row_lib.of_text(
                typing.cast(str, texts), self.tokenizer, self.config.context_length
            )
        return row_lib.of_example(
            texts, self.task, self.tokenizer, self.config.context_length, label, self._lm_means
        )

    @functools.cached_property
    def opened(self) -> gpt_lib.GPT:
        """The Flax module for a look inside (see `gptjax.infer.inside`)."""
        return inside_lib.open_model(self.model)

    def inside(
        self,
        texts: Texts | Row,
        keep: Sequence[str] = ("embedding", "attention", "blocks", "logits"),
        changes: Changes | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns named activations for one text: name -> a float32 array.

        >>> found = gpt.inside("a moving film", keep=["attention"])      # doctest: +SKIP
        >>> found["attention"].shape          # [L, H, T, S]              # doctest: +SKIP
        (1, 4, 5, 5)
        >>> off = gptjax.Changes(heads_off=[(0, 2)])                      # doctest: +SKIP
        >>> gpt.inside("a moving film", ["task_logits"], off)            # doctest: +SKIP

        Args:
          texts: as in `read`, or its result.
          keep: the names of the activations. `gptjax.infer.inside.AXES` lists them with their axes.
          changes: heads to switch off, tokens to hide, states to replace. None means no change.

        Raises:
          UserError: the text cannot be read, there is no activation of a name, or a change does not
            fit the row.
        """
        row = texts if isinstance(texts, Row) else self.read(texts)
        require(
            self.task is not None or "task_logits" not in keep,
            f"`keep`: {self.path} is a language model and has no task_logits",
        )
        return inside_lib.activations(
            self.opened, self.params, row.batch, keep, changes or Changes()
        )

    def embed(self, rows: Table | Sequence[str]) -> np.ndarray:
        """Returns a vector for every row, for search, clustering or a model of one's own.

        Args:
          rows: for a model of a task a table, as in `predict`. For a language model a list of
            texts, none of them longer than the context.

        Returns:
          float32 [n, D]. It is what the task head reads: the state at the extract token or the mean
          state, added up over both orders of a similarity or regression, averaged over windows. In
          a multiple choice it is [n, C, D], a vector for each answer; with a flattened task head
          [n, S, D], the S states that the head reads. For a language model it is the mean of the
          last states of the text.

        Raises:
          UserError: a column is missing, or a text of a language model does not fit.
        """
        if self.task is None:
            require(not isinstance(rows, str | bytes), "`rows`: is a single text; write [text]")
            listed = isinstance(rows, Sequence) and not hasattr(rows, "columns")
            require(listed, f"`rows`: is a {type(rows).__name__}; give a list of texts")
            texts = list(typing.cast(Sequence[str], rows))
            for number, text in enumerate(texts, 1):
                require(isinstance(text, str), f"`rows`: {number} is a {type(text).__name__}")
            ids = self.tokenizer.encode_batch(texts)
            context = self.config.context_length
            return embedding_lib.of_texts(self.model, self.params, ids, context)
        examples = self.encode(rows)
        if not len(examples):
            return np.zeros((0, self.config.width), np.float32)
        evaluator, packer = self._batched(examples, Objective(self.task.kind, lm_weight=0.0))
        return embedding_lib.of_examples(evaluator.model, self.params, examples, packer, self.mesh)

    def score_text(self, texts: Iterable[str], window: int = 0) -> dict[str, float]:
        """Scores the language model on texts, which are joined in their order.

        Args:
          texts: the texts. They are read once.
          window: the number of tokens that the model reads at once, from 2 to the context length.
            0 means the context length.

        Returns:
          {"loss" (nats per token), "perplexity" (the exponential of the loss), "unknown_tokens"
          (the fraction of the tokens that the tokenizer does not know)}.

        Raises:
          UserError: `texts` is a single text or has fewer than two tokens, or the window is wrong.
        """
        require(not isinstance(texts, str | bytes), "`texts`: is a single text; write [text]")
        window, context = window or self.config.context_length, self.config.context_length
        require(2 <= window <= context, f"`window`={window}: must be 0, or 2 to {context}")
        stream = store.token_stream(texts, self.tokenizer)
        require(len(stream) > 1, "`texts`: fewer than two tokens")
        rows = mesh_lib.batch_divisor(self.mesh) * 8
        evaluator = self._evaluator(Objective())
        scores = evaluator.language_model(self.params, stream, window, rows)
        unknown = store.statistics(stream, self.tokenizer).unknown
        return scores | {"unknown_tokens": unknown / len(stream)}

    def probe(self, configs: Mapping[str, schema.ProbeConfig]) -> dict[str, dict[str, float]]:
        """Scores the model on zero-shot probes, which `gptjax.evaluate.probes` explains.

        Args:
          configs: name of a probe -> its configuration.

        Returns:
          Name of a probe -> its score (the key is the name of the metric), "floor" (the score of
          the majority-class baseline) and "rows" (the number of rows).
        """
        built = [
            probes.build(name, config, self.tokenizer, self.config.context_length)
            for name, config in configs.items()
        ]
        return probes.run(self._evaluator(Objective()), self.params, built)

    @property
    def _lm_means(self) -> bool:
        """Whether the LM weights in each sequence add up to 1."""
        finetune = self.experiment.finetune
        return finetune is not None and finetune.lm_mean == schema.LmMean.SEQUENCE

    def _evaluator(self, objective: Objective, longest: int | None = None) -> score_lib.Evaluator:
        module = self._module(AttentionKind.AUTO, self.mesh, longest)
        return score_lib.Evaluator(module, self.mesh, objective)

    def _batched(
        self, examples: tasks.Examples, objective: Objective
    ) -> tuple[score_lib.Evaluator, Packer]:
        """Returns an evaluator and a packer for these examples."""
        divisor = mesh_lib.batch_divisor(self.mesh)
        wanted = round(5 * float(examples.lengths.mean()))
        if examples.row_limit:
            wanted = min(wanted, examples.row_limit)
        wanted = max(64, int(examples.lengths.max()), wanted)
        # Sizes are powers of two so that requests of similar sizes share compiled programs.
        packer = Packer(examples.lengths, _BATCH, _power(wanted), divisor, self._lm_means)
        packer.rows = _power(packer.rows)
        return self._evaluator(objective, _power(examples.max_sequence_length)), packer


def _power(number: int) -> int:
    """Returns the smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _int32(values: Any, name: str, largest: int) -> np.ndarray:
    """Returns integers of any type as an int32 array.

    Args:
      values: an array, or nested lists.
      name: the name of the argument, for error messages.
      largest: the largest value that is allowed. The smallest is 0.

    Raises:
      UserError: a value is no integer or is out of its range.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise UserError(f"`{name}`: is no array of integers ({brief(error)})") from error
    whole = array.size == 0 or np.issubdtype(array.dtype, np.integer)
    require(whole, f"`{name}`: must be integers, not {array.dtype}")
    low, high = array.min(initial=0), array.max(initial=0)
    require(
        low >= 0 and high <= largest,
        f"`{name}`: {low if low < 0 else high} is out of its range, 0 to {largest}",
    )
    return array.astype(np.int32)


def _positions(segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the positions of the tokens in their segments and new segment ids, both int32 [B, T].

    A segment is a series of adjacent tokens with equal ids. The new ids of a row increase from
    segment to segment. Padding (id 0) gets 0 in both arrays.
    """
    index = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
    first = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
    positions = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    runs = jnp.cumsum(first, axis=1, dtype=jnp.int32)
    return jnp.where(segments_BT != 0, positions, 0), jnp.where(segments_BT != 0, runs, 0)


def load(
    path: str | os.PathLike[str], mesh_config: MeshConfig | None = None, argument: str = "path"
) -> GPT:
    """Loads a trained model, as `gptjax.load` does.

    Args:
      path, mesh_config: as in `gptjax.load`.
      argument: the name of the argument `path` in error messages.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    checkpoint = open_checkpoint(os.fspath(path), argument)
    gpt = from_checkpoint(checkpoint, mesh_config)
    return dataclasses.replace(gpt, summary=_summary(checkpoint.path))


class AnyCheckpoint(Protocol):
    """A model that can be loaded: a `Checkpoint`, or a model of the Hugging Face hub."""

    @property
    def path(self) -> str:
        """The name of the model in messages."""

    @property
    def meta(self) -> Meta:
        """The metadata of the model."""

    @property
    def temperature(self) -> float:
        """The number that the task logits are divided by."""

    def load_params(self, mesh: Mesh) -> Params:
        """Returns the parameters, sharded over the devices of a mesh."""


def from_checkpoint(checkpoint: AnyCheckpoint, mesh_config: MeshConfig | None = None) -> GPT:
    """Returns the model of a checkpoint, without a summary.

    Args:
      checkpoint: the checkpoint.
      mesh_config: the devices, as in `load`.

    Raises:
      UserError: the checkpoint is damaged.
    """
    mesh = mesh_lib.make_mesh(mesh_config or MeshConfig())
    meta, path = checkpoint.meta, checkpoint.path
    params = checkpoint.load_params(mesh)
    tokenizer = tokenizer_lib.from_json(meta.tokenizer_json, path)
    return GPT(
        meta.model, params, tokenizer, meta.task, meta, mesh, path,
        temperature=checkpoint.temperature,
    )  # fmt: skip


def _summary(path: str) -> dict[str, Any]:
    """Returns the contents of a workdir's summary.json; {} if this file is missing or damaged.

    Args:
      path: the folder of a checkpoint, WORKDIR/checkpoints/STAGE/STEP.
    """
    file = remote.absolute(path).parents[2] / "summary.json"
    with contextlib.suppress(UserError):
        return files.read_json(file)
    return {}
