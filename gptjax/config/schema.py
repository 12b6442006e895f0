"""The typed configuration, which `experiments/*.py` build and `--config.FIELD=VALUE` changes.

It consists of plain dataclasses, which `ml_collections.config_flags` reads and type-checks. Their
fields can be written to until `validation.validate` returns a checked and frozen copy. Frozen parts
are constants: they are hashed as static arguments of jitted functions.

Fields that hold a member of an enumeration have the type `str`, because flags set strings. Members
equal their strings.
"""

import dataclasses
import enum
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from gptjax.config.constraints import fraction, limited, not_negative, one_of, positive
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
        """Whether each row lists the candidates that the language model chooses from."""
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
    """The values that the backward pass of a block computes again, to save memory."""

    NONE = "none"
    DOTS = "dots"
    """All values but those of matrix products."""
    FULL = "full"
    """All values."""


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
    """The ways to split text into words before the GPT-1 tokenizer merges their characters."""

    FAST = "fast"
    EXACT = "exact"
    """As the authors' code does, which needs ftfy and spaCy."""


class Algorithm(enum.StrEnum):
    """The optimizers."""

    ADAMW = "adamw"
    OPENAI = "openai"
    """The Adam of the authors' released code."""


class Schedule(enum.StrEnum):
    """The shapes of the learning rate's curve after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class LineBreaks(enum.StrEnum):
    """The treatment of line breaks inside a paragraph of a text file."""

    AUTO = "auto"
    """JOIN for files whose lines are wrapped at a fixed width, KEEP for others."""
    KEEP = "keep"
    JOIN = "join"
    """The lines of a paragraph become one line."""


class LmMean(enum.StrEnum):
    """The ways to average the LM loss over a batch."""

    TOKEN = "token"
    """One mean over all tokens."""
    SEQUENCE = "sequence"
    """The mean of the means of the sequences."""


class Cut(enum.StrEnum):
    """The ways to shorten two texts that do not fit into the context together."""

    LONGEST = "longest"
    """The longer text loses tokens first."""
    HALF = "half"
    """Each text keeps half a context less two tokens."""


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


@dataclasses.dataclass
class _Config:
    """Base of the configurations: `frozen` copies refuse writes to their fields."""

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("_frozen"):
            raise dataclasses.FrozenInstanceError(f"cannot assign to {name}: it is final")
        object.__setattr__(self, name, value)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig(_Config):
    """Sizes and numerics of the decoder. The defaults are those of GPT-1 (117M)."""

    vocab_size: int = not_negative(0)
    """Rows of the token embedding. 0 means the size of the tokenizer's vocabulary."""
    context_length: int = positive(512)
    """Length of the longest sequence in tokens; rows of the position embedding."""
    num_layers: int = positive(12)
    width: int = positive(768)
    num_heads: int = positive(12)
    ffn_width: int = not_negative(0)
    """Width inside the feed-forward layers. 0 means four times `width`."""
    activation: str = one_of(Activation.GELU_TANH)
    """Activation function of the feed-forward layers: gelu_tanh or relu."""
    segment_types: int = limited(
        0, lambda rows: rows in (0, 2, 3), "must be 0 (none), 2, or 3 (with one for padding)"
    )
    """Rows of an embedding of the token types: 0 (no such embedding), 2 (first and second text), or
    3 (and padding)."""
    tied: bool = True
    """Whether the LM head is the token embedding. Otherwise it is a linear layer with a bias."""
    one_matrix: bool = False
    """Whether tokens and positions are rows of one matrix, as in the authors' code. Embedding
    dropout is then applied to the matrix, the matrix after dropout is the LM head too, and the
    softmax of the LM covers the positions as well."""
    embedding_dropout: float = fraction(0.1)
    attention_dropout: float = fraction(0.1)
    residual_dropout: float = fraction(0.1)
    head_dropout: float = fraction(0.1)
    """Dropout of the state that the task head reads."""
    head_dropout_shared: bool = False
    """Whether all candidates of an example (answers, orders of two texts) share one dropout mask in
    the task head."""
    init_std: float = positive(0.02)
    """Standard deviation of the initial weights."""
    layer_norm_epsilon: float = positive(1e-5)
    dtype: str = one_of(Dtype.FLOAT32)
    """Dtype of activations and matrix products: float32 or bfloat16. Parameters, softmax, logits
    and losses are float32 in any case."""
    remat: str = one_of(Remat.NONE)
    """The values that the backward pass of a block computes again, to save memory: none, dots (all
    but matrix products) or full (all)."""
    unroll: int = not_negative(0)
    """Layers in one iteration of the scan over layers. More of them make steps faster and
    compilation slower. 0 means all layers on a CPU without `remat`, where the gain is largest, and
    one layer otherwise (XLA undoes `remat` in unrolled layers on a CPU)."""
    attention: str = one_of(AttentionKind.AUTO)
    """Implementation of attention: plain (all scores at once), blocked (for CPUs), pallas (for
    TPUs), cudnn (for NVIDIA GPUs, in bfloat16 and without attention dropout), or auto, the best one
    for the devices."""

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def hidden_ffn_width(self) -> int:
        """Width inside the feed-forward layers."""
        return self.ffn_width or 4 * self.width


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TokenizerConfig(_Config):
    """The tokenizer that is trained or loaded."""

    kind: str = one_of(TokenizerKind.BPE)
    """bpe (GPT-1 style BPE, trained on the text), gpt1 (a given vocabulary and merges), or
    character."""
    vocab_size: int = positive(8000)
    """Size of a trained BPE vocabulary. It includes `<unk>`, but not the four special tokens."""
    file: str = ""
    """A saved `tokenizer.json` that is loaded instead of a training."""
    vocab_file: str = ""
    """For kind gpt1: the vocabulary, `encoder_bpe_40000.json`."""
    merges_file: str = ""
    """For kind gpt1: the merges, `vocab_40000.bpe`."""
    words: str = one_of(Words.FAST)
    """For kind gpt1, the way to split text into words: fast, or exact (as the authors' code does,
    which needs ftfy and spaCy)."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class OptimizerConfig(_Config):
    """Adam with decoupled weight decay, clipping by the global norm, and a schedule."""

    algorithm: str = one_of(Algorithm.ADAMW)
    """adamw, or openai: the Adam and the schedules of the authors' code, to the letter."""
    learning_rate: float = positive(2.5e-4)
    """Learning rate at the end of the warm-up."""
    schedule: str = one_of(Schedule.COSINE)
    """After the warm-up: cosine or linear (both fall to 0 at the end), or constant."""
    warmup_steps: int = not_negative(0)
    """Steps of the warm-up. 0 means that `warmup_fraction` decides."""
    warmup_fraction: float = fraction(0.0)
    """Steps of the warm-up as a fraction of all steps."""
    beta1: float = fraction(0.9)
    beta2: float = fraction(0.999)
    epsilon: float = positive(1e-8)
    weight_decay: float = not_negative(0.01)
    """Decoupled decay of all arrays of two or more dimensions (so not of biases and gains)."""
    clip_norm: float = not_negative(1.0)
    """Largest global norm of the gradient. 0 means no clipping."""
    accumulation: int = positive(1)
    """Micro-batches that a step adds up. The objective does not depend on it."""
    max_bad_steps: int = positive(5)
    """Non-finite updates in a row that end the run with exit code 3. Fewer are skipped."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class PretrainConfig(_Config):
    """Language modelling on windows of contiguous text."""

    dataset: str = ""
    """`builtin`, or a data set of the hub such as `owner/name:config`."""
    text: str = "text"
    """Column of the text in a data set of the hub."""
    train_files: str = ""
    """Text files as comma-separated globs, instead of a data set."""
    validation_files: str = ""
    """Text files as comma-separated globs. Empty means the end of the training text."""
    validation_fraction: float = fraction(0.1)
    """Fraction of the training text that is held out where there are no validation files."""
    line_breaks: str = one_of(LineBreaks.AUTO)
    """keep (as in the file), join (the lines of a paragraph become one line), or auto (join in
    files whose lines are wrapped)."""
    batch_size: int = positive(64)
    """Windows in a step, over all devices."""
    window: int = 0
    """Tokens in a window. 0 means the model's context length."""
    steps: int = not_negative(0)
    """Steps of the training. 0 means that `epochs` decides."""
    epochs: float = not_negative(0.0)
    """Passes over the training text."""
    eval_every: int = not_negative(0)
    """Steps between two validations. 0 means one validation, at the end."""
    save_every: int = positive(1000)
    """Steps between two checkpoints. Each validation saves one too."""
    eval_batches: int = not_negative(0)
    """Batches in a validation. 0 means the whole validation text."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(warmup_steps=2000)
    )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class FinetuneConfig(_Config):
    """Training on labelled text with the joint loss: task_weight * task + lm_weight * LM."""

    dataset: str = ""
    """`builtin:TASK`, or a data set of the hub such as `nyu-mll/glue:mrpc`."""
    train_file: str = ""
    """A file of labelled rows, instead of a data set."""
    validation_file: str = ""
    """A file of labelled rows. Empty means a part of the training rows."""
    test_file: str = ""
    """A file of labelled rows. Empty means no test."""
    validation_split: str = "validation"
    """Name of the validation split in a data set of the hub."""
    test_split: str = ""
    """Name of a labelled test split in a data set of the hub. Empty means no test."""
    validation_fraction: float = fraction(0.1)
    """Fraction of the training rows that is held out where there is no validation file."""
    columns: str = ""
    """Names of the columns, comma-separated, for files without a header."""
    task: str = one_of(TaskKind.CLASSIFICATION)
    """classification, entailment, similarity, multiple_choice or regression."""
    text: str = "text"
    """A column. `a+b` means two columns joined by a space, `c[0]` the first entry of a column of
    lists."""
    text_pair: str = ""
    """Column of the second text, for the tasks entailment, similarity and regression."""
    choices: str = ""
    """Columns of the answers, comma-separated, for the task multiple_choice."""
    label: str = "label"
    """Column of the label, or of the number in a regression."""
    ignore_label: str = ""
    """Rows with this label are left out, such as -1 in SNLI, where the annotators disagreed."""
    metrics: str = ""
    """Comma-separated names. The first one selects the best checkpoint. Empty means the usual
    metrics of the task."""
    lm_weight: float = not_negative(0.5)
    """Weight of the LM loss, the paper's lambda."""
    task_weight: float = not_negative(1.0)
    """Weight of the task loss."""
    lm_mean: str = one_of(LmMean.TOKEN)
    """The LM loss is the mean over all tokens (token), or the mean of each sequence's mean
    (sequence)."""
    cut: str = one_of(Cut.LONGEST)
    """The way to shorten two texts that exceed the context: longest (the longer text loses tokens)
    or half (each text keeps half a context less two tokens, as in the authors' code)."""
    head: str = one_of(Head.EXTRACT)
    """The input of the task head: extract (the state at the last token) or flatten (the states of
    all positions of `start text delimiter [text_pair delimiter]`, padded to the longest)."""
    drop_last: bool = False
    """Whether the last, smaller batch of each epoch is dropped. Otherwise batches run across
    epochs."""
    batch_size: int = positive(32)
    """Examples in a step, over all devices."""
    epochs: float = not_negative(3.0)
    """Passes over the training rows."""
    steps: int = not_negative(0)
    """Steps of the training. 0 means that `epochs` decides."""
    row_length: int = not_negative(0)
    """Tokens in a packed row. 0 means a length that suits the examples."""
    evals_per_epoch: float = positive(1.0)
    """Validations in an epoch."""
    save_every: int = positive(1000)
    """Steps between two checkpoints. Each validation saves one too."""
    compare_from_scratch: bool = False
    """Whether a second fine-tuning starts from random weights, to show the gain of pretraining."""
    transfer: str = limited(
        "all",
        lambda layers: layers in ("all", "none") or layers.isdecimal(),
        "must be all, none, or a number of layers",
    )
    """The pretrained weights to start from: all, none, or N (the embeddings and N layers)."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=6.25e-5, schedule="linear", warmup_fraction=0.002
        )
    )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ProbeConfig(_Config):
    """A zero-shot task: the language model solves it without any training for it."""

    kind: str = one_of(ProbeKind.MULTIPLE_CHOICE)
    """acceptability, next_word, multiple_choice or substitution: see `evaluate/probes.py`."""
    dataset: str = ""
    """`builtin:TASK`, or a data set of the hub."""
    split: str = "validation"
    """Split of the data set."""
    file: str = ""
    """A file of labelled rows, instead of a data set."""
    columns: str = ""
    """Names of the columns, comma-separated, for a file without a header."""
    text: str = "text"
    """A column, or an expression as in `FinetuneConfig.text`. In a substitution, `_` marks the
    place of the candidates."""
    choices: str = ""
    """Columns of the answers or candidates, comma-separated."""
    pronoun: str = ""
    """For substitution, where the text has no `_`: the column of the word that candidates
    replace."""
    pronoun_start: str = ""
    """For substitution: the column of the pronoun's position in the text, in characters."""
    label: str = "label"
    """Column of the label."""
    append: str = "very"
    """For next_word: the words that are appended to the text."""
    words: str = "negative,positive"
    """For next_word: one word for each label, comma-separated, in the order of the labels."""
    limit: int = not_negative(1000)
    """Number of rows, from the first one. 0 means all rows."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig(_Config):
    """Number of devices along each axis of the mesh. One of them may be -1: all devices left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class CheckpointConfig(_Config):
    """The numbers of checkpoints of a stage that are kept."""

    keep_newest: int = positive(2)
    keep_best: int = not_negative(1)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class AblationConfig(_Config):
    """The comparison of mode `ablate`: each variant of each task, with several seeds."""

    tasks: dict[str, FinetuneConfig] = dataclasses.field(default_factory=dict, hash=False)
    """Name -> fine-tuning. Empty means the experiment's own `finetune`."""
    only: str = ""
    """Names of the tasks to run, comma-separated. Empty means all tasks."""
    variants: str = "full,no_pretraining,no_lm"
    """Comma-separated. Others are `layers=N` (N pretrained layers; 0: the embeddings alone) and
    `lambda=X` (the weight of the LM loss)."""
    parallel: int = not_negative(0)
    """Fine-tunings at the same time. 0 means one on each device, and two on a single CPU device."""

    @property
    def chosen(self) -> dict[str, FinetuneConfig]:
        """The tasks to run."""
        names = split_names(self.only) or tuple(self.tasks)
        return {name: self.tasks[name] for name in names if name in self.tasks}


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Experiment(_Config):
    """One run: a tokenizer, a model, and up to two stages."""

    name: str = "experiment"
    seed: int = limited(0, lambda seed: 0 <= seed < 2**32, f"must be 0 to {2**32 - 1}")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    pretrain: PretrainConfig | None = None
    finetune: FinetuneConfig | None = None
    ablation: AblationConfig | None = None
    probes: dict[str, ProbeConfig] = dataclasses.field(default_factory=dict, hash=False)
    """Name -> probe. Each validation of a pretraining runs them, and `--mode=evaluate --probes`."""
    init_from: str = ""
    """A workdir or checkpoint of gptjax. Its tokenizer, sizes and weights are the starting
    point."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


# Fields that may differ when a workdir is continued: they change where and how the same numbers are
# computed, or (in `ablation`) which results are added.
_RESUMABLE = (
    "mesh", "checkpoint", "model.remat", "model.unroll", "model.attention",
    "ablation.variants", "ablation.only", "ablation.parallel",
)  # fmt: skip

T = TypeVar("T")


def split_names(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of names: ``"a, b"`` -> ``("a", "b")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def frozen(config: T) -> T:
    """Returns a copy of a configuration whose fields, also those of its parts, refuse writes."""
    copy: Any = config
    if isinstance(config, dict):
        copy = {name: frozen(part) for name, part in config.items()}
    elif isinstance(config, _Config):
        names = [field.name for field in dataclasses.fields(config)]
        copy = type(config)(**{name: frozen(getattr(config, name)) for name in names})
        object.__setattr__(copy, "_frozen", True)
    return copy


def part_class(annotation: Any) -> Any:
    """Returns the configuration class X of the type X, X | None or dict[str, X], or None."""
    types = (annotation, *typing.get_args(annotation))
    return next((each for each in types if dataclasses.is_dataclass(each)), None)


def field_names(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all fields of a configuration class and of its parts.

    In a dictionary of configurations, NAME stands for any key: "ablation.tasks.NAME.epochs".
    """
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        yield name
        if part := part_class(field.type):
            entry = ".NAME" if typing.get_origin(field.type) is dict else ""
            yield from field_names(part, f"{name}{entry}.")


def value_at(config: Any, path: str) -> Any:
    """Returns what a configuration has at a dotted path, "" meaning itself; None: nothing."""
    for name in filter(None, path.split(".")):
        is_table = isinstance(config, Mapping)
        config = config.get(name) if is_table else getattr(config, name, None)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as plain JSON-ready values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Builds a frozen configuration from the values of `to_dict`; missing fields have defaults.

    Args:
      cls: the configuration class.
      values: from `to_dict`, possibly written as JSON and read again.
      where: name of their source in error messages.

    Raises:
      UserError: a field that the class does not have.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kwargs = {}
    for name, value in values.items():
        require(name in fields, f"{where}: unknown field {name}{nearest(name, fields)}")
        part = part_class(fields[name].type)
        if part and typing.get_origin(fields[name].type) is dict:
            value = {key: from_dict(part, entry, where) for key, entry in value.items()}
        elif part and value is not None:
            value = from_dict(part, value, where)
        kwargs[name] = value
    return frozen(cls(**kwargs))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lists "field: old -> new" for each field that may not change when a run is continued.

    Args:
      old, new: values of `to_dict`.
      prefix: goes before the names of the fields.
    """
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
    """The task of a head: what it predicts, and from which columns."""

    kind: TaskKind
    """A string is converted."""
    text: str
    """Column of the text, as in `FinetuneConfig.text`."""
    text_pair: str = ""
    """Column of the second text; empty if the task has one text."""
    choices: tuple[str, ...] = ()
    """Columns of the answers of a multiple choice."""
    label: str = "label"
    """Column of the label."""
    labels: tuple[str, ...] = ()
    """Names of the classes, or of the answers, in the order of the head's outputs."""
    cut: str = Cut.LONGEST
    """The way to shorten two texts that exceed the context, as in `FinetuneConfig.cut`."""
    flatten: int = 0
    """Tokens that each sequence is padded or cut to, for a head that reads all positions. 0 means a
    head that reads the last token alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", TaskKind(self.kind))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TaskSpec":
        """Reads the values of `dataclasses.asdict`, also after they were written as JSON."""
        lists = {name: tuple(values[name]) for name in ("choices", "labels")}
        return cls(**{**values, **lists})

    @property
    def ends_in_question(self) -> bool:
        """Whether the text consists of joined columns, the last of which is a question.

        Such a text is cut at its beginning if it is too long.
        """
        return "+" in self.text

    @property
    def num_candidates(self) -> int:
        """C: token sequences in an example."""
        if self.kind is TaskKind.MULTIPLE_CHOICE:
            return len(self.choices)
        return 2 if self.kind.sums_candidates else 1

    @property
    def num_outputs(self) -> int:
        """Outputs of the linear head for a state."""
        return len(self.labels) if self.kind.has_classes else 1

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that are read besides the label."""
        return tuple(name for name in (self.text, self.text_pair, *self.choices) if name)


# Fields of the model that `init_from` decides. Dropout, dtype and others are the experiment's own.
INHERITED_SIZES = (
    "vocab_size", "context_length", "num_layers", "width", "num_heads", "ffn_width",
    "activation", "segment_types", "tied", "layer_norm_epsilon",
)  # fmt: skip


def higher_is_better(name: str) -> bool:
    """Returns whether a higher value of a metric is better: not so for ``mse`` and ``loss``."""
    return name not in ("mse", "loss")
