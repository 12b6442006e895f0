"""The typed configuration: what `experiments/*.py` build and `--config.FIELD=VALUE` override.

Plain dataclasses that `ml_collections.config_flags` reads and type-checks as they are. They can be
written to until `validate` has checked and frozen them; from then on they are constants, so that a
part of the configuration may be a static (hashed) argument of a jitted function.
"""

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from gptjax.errors import nearest, require


class Stage(enum.StrEnum):
    """The stages of a run, in the order in which they follow each other."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"
    FINETUNE_FROM_SCRATCH = "finetune_from_scratch"
    """The same fine-tuning from random weights, to compare with."""


class TaskKind(enum.StrEnum):
    """The kinds of labelled tasks."""

    CLASSIFICATION = "classification"
    ENTAILMENT = "entailment"
    SIMILARITY = "similarity"
    MULTIPLE_CHOICE = "multiple_choice"
    REGRESSION = "regression"

    @property
    def is_pair(self) -> bool:
        """Whether an example consists of two texts."""
        return self in (TaskKind.ENTAILMENT, TaskKind.SIMILARITY, TaskKind.REGRESSION)

    @property
    def sums_candidates(self) -> bool:
        """Whether the model reads the two texts in both orders and adds up the two states."""
        return self in (TaskKind.SIMILARITY, TaskKind.REGRESSION)

    @property
    def is_single_sequence(self) -> bool:
        """Whether the model reads an example as one token sequence."""
        return self in (TaskKind.CLASSIFICATION, TaskKind.ENTAILMENT)

    @property
    def has_classes(self) -> bool:
        """Whether the task head has one output for every class, instead of a single score."""
        return self not in (TaskKind.MULTIPLE_CHOICE, TaskKind.REGRESSION)


class ProbeKind(enum.StrEnum):
    """The kinds of zero-shot probes of a language model; `gptjax.evaluate.probes` defines them."""

    ACCEPTABILITY = "acceptability"
    NEXT_WORD = "next_word"
    MULTIPLE_CHOICE = "multiple_choice"
    SUBSTITUTION = "substitution"

    @property
    def has_candidates(self) -> bool:
        """Whether the language model chooses among texts that every row gives."""
        return self in (ProbeKind.MULTIPLE_CHOICE, ProbeKind.SUBSTITUTION)


class Activation(enum.StrEnum):
    """The activation functions of the feed-forward layers."""

    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class Dtype(enum.StrEnum):
    """The dtypes of activations and matrix products."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.StrEnum):
    """What the backward pass of a block computes again instead of storing it."""

    NONE = "none"
    DOTS = "dots"
    """Everything except matrix products."""
    FULL = "full"


class AttentionKind(enum.StrEnum):
    """The implementations of attention."""

    AUTO = "auto"
    """The fastest implementation that the devices and the model allow."""
    PLAIN = "plain"
    """All attention scores at once, on every kind of device."""
    BLOCKED = "blocked"
    """Block by block, for CPUs."""
    PALLAS = "pallas"
    """A kernel for TPUs."""
    CUDNN = "cudnn"
    """cuDNN's kernel for NVIDIA GPUs, in bfloat16 and without dropout."""


class TokenizerKind(enum.StrEnum):
    """The kinds of tokenizers."""

    BPE = "bpe"
    """A GPT-1 style byte pair encoding that is trained on the run's own text."""
    GPT1 = "gpt1"
    """GPT-1's own vocabulary and merges."""
    CHARACTER = "character"


class Words(enum.StrEnum):
    """How the GPT-1 tokenizer splits text into words before it merges characters."""

    FAST = "fast"
    EXACT = "exact"
    """As the authors' code does, which needs ftfy and spaCy."""


class Algorithm(enum.StrEnum):
    """The optimizers."""

    ADAMW = "adamw"
    OPENAI = "openai"
    """The Adam of the authors' released code."""


class Schedule(enum.StrEnum):
    """How the learning rate changes after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class LineBreaks(enum.StrEnum):
    """What happens to line breaks inside a paragraph of a text file."""

    AUTO = "auto"
    """JOIN in files whose lines are wrapped at a fixed width, else KEEP."""
    KEEP = "keep"
    JOIN = "join"


class LmMean(enum.StrEnum):
    """How the LM loss is averaged over a batch."""

    TOKEN = "token"
    """One mean over all tokens."""
    SEQUENCE = "sequence"
    """The mean of the means of the sequences."""


class Cut(enum.StrEnum):
    """How two texts are shortened that do not fit into the context together."""

    LONGEST = "longest"
    """The longer text loses tokens first."""
    HALF = "half"
    """Each text is cut to half a context less two tokens."""


class Head(enum.StrEnum):
    """The states that the task head reads."""

    EXTRACT = "extract"
    """The state at the last token of the sequence."""
    FLATTEN = "flatten"
    """The states of all positions."""


class WeightFormat(enum.StrEnum):
    """The formats of other programs that weights are imported from and exported to."""

    OPENAI = "openai"
    HUGGINGFACE = "huggingface"


class BenchKind(enum.StrEnum):
    """The activities that mode `bench` can time."""

    TRAIN = "train"
    GENERATE = "generate"
    INPUT = "input"


class _Config:
    """Refuses writes once frozen."""

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("_frozen"):
            raise dataclasses.FrozenInstanceError(f"cannot assign to {name}: it is final")
        object.__setattr__(self, name, value)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig(_Config):
    """Sizes and numerics of the decoder. The defaults are GPT-1 (117M)."""

    vocab_size: int = 0
    """Rows of the token embedding; 0: as many as the tokenizer has."""
    context_length: int = 512
    """Longest sequence in tokens: rows of the position embedding."""
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    ffn_width: int = 0
    """0: four times the width."""
    activation: str = "gelu_tanh"
    segment_types: int = 0
    """Rows of a segment embedding over `token_types`: 0 (none), 2, or 3, the third for padding."""
    tied: bool = True
    """The LM head is the token embedding; else a linear layer of its own, with bias."""
    one_matrix: bool = False
    """Tokens and positions are rows of one matrix, as in the authors' code: embedding dropout is
    applied to the matrix, the dropped matrix is the LM head too, and its softmax covers the
    positions."""
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    head_dropout: float = 0.1
    """Dropout on the state that the task head reads."""
    head_dropout_shared: bool = False
    """One mask for all candidates of an example (answers, orders of two texts)."""
    init_std: float = 0.02
    layer_norm_epsilon: float = 1e-5
    dtype: str = "float32"
    """Of activations and matrix products; parameters, softmax, logits and losses are float32."""
    remat: str = "none"
    """What a block recomputes in the backward pass: none, dots (all but matrix products), full."""
    unroll: int = 0
    """Layers per iteration of the scan over layers: more compile time, faster steps; 0: all of them
    on a CPU, where that gains most, one elsewhere and with remat (a CPU recomputes nothing of
    layers that are all written out)."""
    attention: str = "auto"
    """How attention is computed: plain (all scores at once), blocked (on CPUs), pallas (on TPUs),
    cudnn (on NVIDIA GPUs, bfloat16, without dropout); auto: what suits the devices."""

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def hidden_ffn_width(self) -> int:
        """Width inside the feed-forward layer."""
        return self.ffn_width or 4 * self.width


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TokenizerConfig(_Config):
    """Which tokenizer to train or load."""

    kind: str = "bpe"
    """bpe: GPT-1 style BPE trained on the text; gpt1: a vocabulary/merges pair; character."""
    vocab_size: int = 8000
    """Size of a trained BPE vocabulary, `<unk>` included, the four special tokens not."""
    file: str = ""
    """A saved `tokenizer.json`; replaces training."""
    vocab_file: str = ""
    """With kind gpt1: `encoder_bpe_40000.json`."""
    merges_file: str = ""
    """With kind gpt1: `vocab_40000.bpe`."""
    words: str = "fast"
    """With kind gpt1: fast; exact: as the authors cut text (ftfy and spaCy must be installed)."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class OptimizerConfig(_Config):
    """Adam with decoupled decay, global clipping and a schedule."""

    algorithm: str = "adamw"
    """adamw; openai: the Adam and the schedules of the authors' released code, to the letter."""
    learning_rate: float = 2.5e-4
    schedule: str = "cosine"
    """After the warm-up, down to 0 at the last step: cosine, linear; or constant."""
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    """Share of all steps; used where `warmup_steps` is 0."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    """Decoupled; on every array with two or more dimensions (not on biases and gains)."""
    clip_norm: float = 1.0
    """Global norm of the gradient; 0: no clipping."""
    accumulation: int = 1
    """Micro-batches a step; the objective does not depend on it."""
    max_bad_steps: int = 5
    """Non-finite updates are skipped and counted; this many in a row end the run (exit code 3)."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class PretrainConfig(_Config):
    """Language modelling on windows of contiguous text."""

    dataset: str = ""
    """`builtin`, or a hub data set such as `owner/name:config` with a text column."""
    text: str = "text"
    """Column of the text in a hub data set."""
    train_files: str = ""
    """Globs, comma-separated."""
    validation_files: str = ""
    """Globs; empty: the last `validation_fraction` of the training text is held out."""
    validation_fraction: float = 0.1
    line_breaks: str = "auto"
    """keep; join: hard-wrapped lines in a paragraph; auto: join where a file is hard-wrapped."""
    batch_size: int = 64
    """Windows a step, over all devices."""
    window: int = 0
    """Tokens a window; 0: the model's context length."""
    steps: int = 0
    epochs: float = 0.0
    """Used where `steps` is 0."""
    eval_every: int = 0
    """Steps between validations; 0: only at the end."""
    save_every: int = 1000
    """Steps between checkpoints (every validation saves too)."""
    eval_batches: int = 0
    """Validation batches; 0: all of them."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(warmup_steps=2000)
    )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class FinetuneConfig(_Config):
    """Joint training on labelled text: task loss + lm_weight * LM loss."""

    dataset: str = ""
    """`builtin:TASK`, or a hub data set such as `nyu-mll/glue:mrpc`."""
    train_file: str = ""
    validation_file: str = ""
    test_file: str = ""
    validation_split: str = "validation"
    """Name of the hub data set's validation split."""
    test_split: str = ""
    """Name of the hub data set's labelled test split, if it has one."""
    validation_fraction: float = 0.1
    """Of the training rows, held out where there is no validation file."""
    columns: str = ""
    """Names of the columns, comma-separated, for a file without a header."""
    task: str = "classification"
    text: str = "text"
    """A column; or `a+b`, two joined by a space; or `c[0]`, the first of a column of lists."""
    text_pair: str = ""
    choices: str = ""
    """Columns of the answers, comma-separated (task multiple_choice)."""
    label: str = "label"
    ignore_label: str = ""
    """Rows with this label are left out (SNLI marks what nobody could label with -1)."""
    metrics: str = ""
    """Comma-separated, the first selects the best checkpoint; empty: the usual ones of the task."""
    lm_weight: float = 0.5
    """Lambda of the joint loss."""
    task_weight: float = 1.0
    """Weight of the task loss."""
    lm_mean: str = "token"
    """The LM loss is the mean over all tokens; sequence: over the means of each sequence."""
    cut: str = "longest"
    """Of two texts that are too long, longest: the longer is cut; half: each to half a context less
    two tokens, as in the authors' code."""
    head: str = "extract"
    """What the task head reads: extract, the state at the last token; flatten: the states of all
    positions, in `start text delimiter [text_pair delimiter]` padded to the longest."""
    drop_last: bool = False
    """The last, smaller batch of each epoch is dropped; else batches run across epochs."""
    batch_size: int = 32
    """Examples a step, over all devices."""
    epochs: float = 3.0
    steps: int = 0
    """Replaces `epochs` where it is not 0."""
    row_length: int = 0
    """Tokens of a packed row; 0: chosen from the lengths of the examples."""
    evals_per_epoch: float = 1.0
    save_every: int = 1000
    compare_from_scratch: bool = False
    """Also fine-tune from random weights, to show what pretraining gains."""
    transfer: str = "all"
    """Of the pretrained weights: all; none; or N, the embeddings and the first N layers."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=6.25e-5, schedule="linear", warmup_fraction=0.002
        )
    )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ProbeConfig(_Config):
    """A task that a language model is asked to do without any training for it."""

    kind: str = "multiple_choice"
    """acceptability, next_word, multiple_choice or substitution: see `probes.py`."""
    dataset: str = ""
    """`builtin:TASK`, or a hub data set; its split `split` is read."""
    split: str = "validation"
    file: str = ""
    """A file of labelled rows, instead of a data set."""
    columns: str = ""
    """Names of the columns, comma-separated, for a file without a header."""
    text: str = "text"
    """A column, or an expression as in `FinetuneConfig.text`. In a substitution `_` stands for what
    the candidates replace."""
    choices: str = ""
    """Columns of the answers or candidates, comma-separated."""
    pronoun: str = ""
    """In a substitution: the column of what is replaced, where the text has no `_`."""
    pronoun_start: str = ""
    """In a substitution: the column of the pronoun's place in the text, in characters."""
    label: str = "label"
    append: str = "very"
    """Of next_word: what is written after the text."""
    words: str = "negative,positive"
    """Of next_word: one for each label, in their order."""
    limit: int = 1000
    """Rows at most, the first ones; 0: all."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig(_Config):
    """Devices along each axis of the mesh; -1 (once): all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class CheckpointConfig(_Config):
    """Which checkpoints stay."""

    keep_newest: int = 2
    keep_best: int = 1


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class AblationConfig(_Config):
    """What `--mode=ablate` compares: every variant of every task, over several seeds."""

    tasks: dict[str, FinetuneConfig] = dataclasses.field(default_factory=dict, hash=False)
    """Name -> fine-tuning; empty: the experiment's own `finetune`."""
    only: str = ""
    """Comma-separated names of the tasks to run; empty: all of them."""
    variants: str = "full,no_pretraining,no_lm"
    """Comma-separated; besides these `layers=N` (transferred; 0: the embeddings only) and
    `lambda=X` (the weight of the LM loss)."""
    parallel: int = 0
    """Fine-tunings at a time; 0: one on each device, on a single CPU device two."""

    @property
    def chosen(self) -> dict[str, FinetuneConfig]:
        """The tasks to run."""
        names = split_names(self.only) or tuple(self.tasks)
        return {name: self.tasks[name] for name in names if name in self.tasks}


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Experiment(_Config):
    """One run: a tokenizer, a model, and up to two stages."""

    name: str = "experiment"
    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    pretrain: PretrainConfig | None = None
    finetune: FinetuneConfig | None = None
    ablation: AblationConfig | None = None
    probes: dict[str, ProbeConfig] = dataclasses.field(default_factory=dict, hash=False)
    """Name -> what the language model is asked at each validation of pretraining, and by
    `--mode=evaluate --probes`."""
    init_from: str = ""
    """A gptjax workdir or checkpoint: its tokenizer, sizes and weights are the starting point."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


# What may differ when a workdir is continued: where the run runs, not what it computes.
_RESUMABLE = (
    "mesh", "checkpoint", "model.remat", "model.unroll", "model.attention",
    "ablation.variants", "ablation.only", "ablation.parallel",
)  # fmt: skip

T = TypeVar("T")


def split_names(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of names: ``"a, b"`` -> ``("a", "b")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _inner_type(annotation: Any) -> Any:
    """`X | None` -> `X`; anything else unchanged."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return annotation


def field_names(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all fields below a configuration class.

    Entries of a dictionary of configurations are called NAME: "ablation.tasks.NAME.epochs".
    """
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        inner = _inner_type(field.type)
        if typing.get_origin(inner) is dict:
            yield from field_names(typing.get_args(inner)[1], f"{prefix}{field.name}.NAME.")
        if dataclasses.is_dataclass(inner):
            yield from field_names(inner, f"{prefix}{field.name}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as plain JSON-ready values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Builds `cls` from `to_dict`'s values; an unknown field is a `UserError` with `where`."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kwargs = {}
    for name, value in values.items():
        require(name in fields, f"{where}: unknown field {name}{nearest(name, fields)}")
        inner = _inner_type(fields[name].type)
        if dataclasses.is_dataclass(inner) and value is not None:
            value = from_dict(typing.cast(Any, inner), value, where)
        elif typing.get_origin(inner) is dict:
            entry = typing.get_args(inner)[1]
            value = {key: from_dict(entry, each, where) for key, each in value.items()}
        kwargs[name] = value
    return cls(**kwargs)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lists "field: old -> new" for every field that may not change when a run is continued."""
    found = []
    for key in old.keys() | new.keys():
        name, left, right = prefix + key, old.get(key), new.get(key)
        if left == right or name in _RESUMABLE:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, name + ".")
        else:
            found.append(f"{name}: {json.dumps(left)} -> {json.dumps(right)}")
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """What a task head predicts, and from which columns."""

    kind: TaskKind
    """May be given as a string."""
    text: str
    text_pair: str = ""
    choices: tuple[str, ...] = ()
    label: str = "label"
    labels: tuple[str, ...] = ()
    """Names of the classes, or of the answers, in the order of the head's outputs."""
    cut: str = "longest"
    """How two texts that are too long are cut, as in `FinetuneConfig.cut`."""
    flatten: int = 0
    """Tokens that every sequence is padded (or cut) to, for a head that reads them all; 0: none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", TaskKind(self.kind))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TaskSpec":
        """Reads the values of `dataclasses.asdict`, also after a journey through JSON."""
        lists = {name: tuple(values[name]) for name in ("choices", "labels")}
        return cls(**{**values, **lists})

    @property
    def ends_in_question(self) -> bool:
        """Joined columns: too long a text is cut at its beginning; the end says what is asked."""
        return "+" in self.text

    @property
    def num_candidates(self) -> int:
        """C: token sequences per example."""
        if self.kind is TaskKind.MULTIPLE_CHOICE:
            return len(self.choices)
        return 2 if self.kind.sums_candidates else 1

    @property
    def num_outputs(self) -> int:
        """Outputs of the linear head per state."""
        return len(self.labels) if self.kind.has_classes else 1

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that are read besides the label."""
        return tuple(name for name in (self.text, self.text_pair, *self.choices) if name)


# What `init_from` fixes of the model; dropout, dtype and the like stay the experiment's.
INHERITED_SIZES = (
    "vocab_size", "context_length", "num_layers", "width", "num_heads", "ffn_width",
    "activation", "segment_types", "tied", "layer_norm_epsilon",
)  # fmt: skip


def higher_is_better(name: str) -> bool:
    """Whether more of it is better: true of every metric but ``mse`` and ``loss``."""
    return name not in ("mse", "loss")
