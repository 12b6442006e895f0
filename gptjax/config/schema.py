"""The typed configuration, which `experiments/*.py` build and `--config.FIELD=VALUE` changes.

The configuration consists of plain dataclasses, which `ml_collections.config_flags` reads and
type-checks. An `Experiment` contains other configurations as its parts, such as `ModelConfig`.
Fields can be written to until `validation.validate` returns a checked and frozen copy. Frozen parts
can be static arguments of jitted functions, because they are hashable constants.

Fields that hold a member of an enumeration have the type `str`, because flags set strings. A member
of an enumeration equals its string.

In the texts of this file the paper is Radford et al. 2018, the authors' code is OpenAI's
finetune-transformer-lm, and the hub is the Hugging Face hub.
"""

import dataclasses
import enum
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from gptjax.config.constraints import fraction, limited, not_negative, one_of, positive
from gptjax.errors import nearest, require


class Stage(enum.StrEnum):
    """The stages of a run, in the order in which they are trained."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"
    FINETUNE_FROM_SCRATCH = "finetune_from_scratch"
    """A repetition of the fine-tuning from random weights, as a comparison."""


class TaskKind(enum.StrEnum):
    """The kinds of labelled tasks.

    The candidates of an example are the token sequences that the model reads for the example: one
    for each answer of a multiple choice, and one or two in the other tasks. A long text can have
    more (`Long.WINDOWS`).
    """

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
        """Whether the model reads the two texts in both orders and adds the two hidden states."""
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
    """The kinds of zero-shot probes, which are defined in `gptjax.evaluate.probes`.

    A probe is a task that the language model does without any training for it.
    """

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
    """All values except the results of matrix products."""
    FULL = "full"
    """All values."""


class AttentionKind(enum.StrEnum):
    """The implementations of attention."""

    AUTO = "auto"
    """The fastest implementation that the devices and the model allow."""
    PLAIN = "plain"
    """Computes all attention scores at once, on every kind of device."""
    BLOCKED = "blocked"
    """Computes the attention scores block by block, on CPUs."""
    PALLAS = "pallas"
    """A Pallas routine for TPUs."""
    CUDNN = "cudnn"
    """A cuDNN routine for NVIDIA GPUs, in bfloat16 and without attention dropout."""


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
    """The words of the authors' code. This way needs ftfy and spaCy."""


class Algorithm(enum.StrEnum):
    """The optimizers."""

    ADAMW = "adamw"
    OPENAI = "openai"
    """The Adam of the authors' code."""


class Schedule(enum.StrEnum):
    """The shapes of the learning rate schedule after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class LineBreaks(enum.StrEnum):
    """The treatment of line breaks inside a paragraph of a text file."""

    AUTO = "auto"
    """Means JOIN for files whose lines are wrapped at a fixed width, and KEEP for other files."""
    KEEP = "keep"
    JOIN = "join"
    """The lines of a paragraph become one line."""


class LmMean(enum.StrEnum):
    """The ways to average the LM loss over a batch."""

    TOKEN = "token"
    """The mean over all tokens of the batch."""
    SEQUENCE = "sequence"
    """The mean over the tokens of each sequence, and then the mean of these means."""


class Cut(enum.StrEnum):
    """The ways to shorten two texts that share one sequence."""

    LONGEST = "longest"
    """If the texts do not fit into the context together, the longer text loses tokens first."""
    HALF = "half"
    """Each text is cut to (context length / 2) - 2 tokens, even if the other text is short."""


class Long(enum.StrEnum):
    """The ways to read a text that is longer than the context."""

    CUT = "cut"
    """The text loses tokens at its end, as in the paper."""
    WINDOWS = "windows"
    """The text is read in several parts, the windows. The task head reads the mean of the hidden
    states of all windows."""


class Head(enum.StrEnum):
    """The hidden states that the task head reads."""

    EXTRACT = "extract"
    """The hidden state at the extract token, which is the last token of the sequence."""
    MEAN = "mean"
    """The mean of the hidden states at all tokens of the sequence."""
    FLATTEN = "flatten"
    """The hidden states of all positions."""


class ClassWeights(enum.StrEnum):
    """The weights of the classes in the training loss."""

    NONE = "none"
    BALANCED = "balanced"
    """The weight of a class is inversely proportional to its number of training rows."""


class Baseline(enum.StrEnum):
    """The models that are trained on the rows of a fine-tuning, as a comparison."""

    LINEAR = "linear"
    """A linear model of word counts (`gptjax.evaluate.linear`)."""
    NONE = "none"


class WeightFormat(enum.StrEnum):
    """The formats of other programs, which the modes `import` and `export` read and write."""

    OPENAI = "openai"
    HUGGINGFACE = "huggingface"


class PictureFormat(enum.StrEnum):
    """The formats of the pictures that the mode `explain` draws."""

    PNG = "png"
    SVG = "svg"
    PDF = "pdf"


class BenchKind(enum.StrEnum):
    """The activities that the mode `bench` can time."""

    TRAIN = "train"
    GENERATE = "generate"
    INPUT = "input"


@dataclasses.dataclass
class _Config:
    """The base of the configurations. The fields of a `frozen` copy cannot be written to."""

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("_frozen"):
            raise dataclasses.FrozenInstanceError(f"cannot assign to {name}: it is final")
        object.__setattr__(self, name, value)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig(_Config):
    """Sizes and numerics of the decoder. The defaults are the values of GPT-1 (117M)."""

    vocab_size: int = not_negative(0)
    """Rows of the token embedding. 0 means the size of the tokenizer's vocabulary."""
    context_length: int = positive(512)
    """Tokens of the longest possible sequence. The position embedding has as many rows."""
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
    """Rows of the segment embedding, which marks the text that a token belongs to: 0 (no such
    embedding), 2 (first text, second text) or 3 (first text, second text, padding)."""
    tied: bool = True
    """Whether the LM head is the token embedding. Otherwise it is a linear layer with a bias."""
    one_matrix: bool = False
    """Whether tokens and positions are rows of one matrix, as in OpenAI's code of GPT-1. Embedding
    dropout is then applied to the matrix, the matrix after dropout is also the LM head, and the
    softmax of the LM covers the positions too."""
    embedding_dropout: float = fraction(0.1)
    attention_dropout: float = fraction(0.1)
    residual_dropout: float = fraction(0.1)
    head_dropout: float = fraction(0.1)
    """Dropout probability of the hidden state that the task head reads."""
    head_dropout_shared: bool = False
    """Whether all token sequences of an example (one for each answer, or for each order of two
    texts) share one dropout mask in the task head."""
    init_std: float = positive(0.02)
    """Standard deviation of the initial weights."""
    layer_norm_epsilon: float = positive(1e-5)
    dtype: str = one_of(Dtype.FLOAT32)
    """Dtype of activations and matrix products: float32 or bfloat16. Parameters, softmax, logits
    and losses are always float32."""
    remat: str = one_of(Remat.NONE)
    """Rematerialisation: the values that the backward pass of a block computes again, to save
    memory. The choices are none, dots (all values except the results of matrix products) and full
    (all values)."""
    unroll: int = not_negative(0)
    """Layers in one iteration of the loop over the layers. More layers make steps faster and
    compilation slower. 0 means all layers on a CPU if `remat` is none, and otherwise one layer. (On
    a CPU, XLA undoes `remat` in unrolled layers.)"""
    attention: str = one_of(AttentionKind.AUTO)
    """Implementation of attention: plain (all scores at once), blocked (for CPUs), pallas (for
    TPUs), cudnn (for NVIDIA GPUs, in bfloat16 and without attention dropout), or auto (the fastest
    implementation that the devices and the model allow)."""

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
    """bpe (GPT-1 style BPE, trained on the text), gpt1 (the vocabulary and merges of `vocab_file`
    and `merges_file`), or character."""
    vocab_size: int = positive(8000)
    """Size of a trained BPE vocabulary. It includes `<unk>`, but not the four special tokens."""
    file: str = ""
    """A saved `tokenizer.json`, which is loaded. Empty means that `kind` decides."""
    vocab_file: str = ""
    """For kind gpt1: the file of the vocabulary, `encoder_bpe_40000.json`."""
    merges_file: str = ""
    """For kind gpt1: the file of the merges, `vocab_40000.bpe`."""
    words: str = one_of(Words.FAST)
    """For kind gpt1: the way to split text into words. The choices are fast and exact (the words of
    OpenAI's code, which needs ftfy and spaCy)."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class OptimizerConfig(_Config):
    """Adam with decoupled weight decay, clipping by the global norm, and a schedule."""

    algorithm: str = one_of(Algorithm.ADAMW)
    """adamw, or openai (exactly the Adam and the schedules of OpenAI's code)."""
    learning_rate: float = positive(2.5e-4)
    """Learning rate at the end of the warm-up."""
    schedule: str = one_of(Schedule.COSINE)
    """Learning rate after the warm-up: cosine or linear (they fall to 0 at the end) or constant."""
    warmup_steps: int = not_negative(0)
    """Steps of the warm-up. 0 means that `warmup_fraction` decides."""
    warmup_fraction: float = fraction(0.0)
    """Steps of the warm-up as a fraction of all steps, if `warmup_steps` is 0."""
    beta1: float = fraction(0.9)
    beta2: float = fraction(0.999)
    epsilon: float = positive(1e-8)
    weight_decay: float = not_negative(0.01)
    """Decoupled weight decay of embeddings and weight matrices, not of biases and gains."""
    clip_norm: float = not_negative(1.0)
    """Largest global norm of the gradient. 0 means no clipping."""
    layer_decay: float = limited(1.0, lambda decay: 0 < decay <= 1, "must be above 0 and at most 1")
    """Factor of the learning rate from each layer to the layer below it: of L layers, layer l
    (counted from 0) has the learning rate times layer_decay^(L - 1 - l), the embeddings times
    layer_decay^L, and the heads have the whole rate. 1 means one rate for all."""
    accumulation: int = positive(1)
    """Micro-batches in a step, whose gradients are added. The number does not change the
    objective."""
    max_bad_steps: int = positive(5)
    """Number of non-finite updates in a row that ends the run with exit code 3. If there are fewer,
    these updates are skipped."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class PretrainConfig(_Config):
    """Language modelling on windows of contiguous text."""

    dataset: str = ""
    """`builtin` (the docstrings of Python), or a data set of the Hugging Face hub, such as
    `owner/name:config`."""
    text: str = "text"
    """Column of the text in a data set of the hub."""
    train_files: str = ""
    """Text files as comma-separated globs, instead of a data set."""
    validation_files: str = ""
    """Text files as comma-separated globs. Empty means the end of the training text."""
    validation_fraction: float = fraction(0.1)
    """Fraction of the training text that is held out if there are no validation files."""
    line_breaks: str = one_of(LineBreaks.AUTO)
    """keep (the line breaks of the file), join (the lines of a paragraph become one line), or auto
    (join for files whose lines are wrapped at a fixed width, and keep for other files)."""
    batch_size: int = positive(64)
    """Windows in a step, on all devices together."""
    window: int = 0
    """Tokens in a window, which is one training sequence. 0 means the model's context length."""
    steps: int = not_negative(0)
    """Steps of the training. 0 means that `epochs` decides."""
    epochs: float = not_negative(0.0)
    """Passes over the training text."""
    eval_every: int = not_negative(0)
    """Steps between two validations. 0 means one validation, at the end."""
    save_every: int = positive(1000)
    """Steps between two checkpoints. Each validation saves a checkpoint too."""
    eval_batches: int = not_negative(0)
    """Batches in a validation. 0 means the whole validation text."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(warmup_steps=2000)
    )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class FinetuneConfig(_Config):
    """Training on labelled text with the joint loss: task_weight * task + lm_weight * LM."""

    dataset: str = ""
    """`builtin:TASK` (a task made from Python's docstrings), or a data set of the Hugging Face hub,
    such as `nyu-mll/glue:mrpc`."""
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
    """Fraction of the training rows that is held out if there is no validation file."""
    columns: str = ""
    """Names of the columns, comma-separated, for files without a header."""
    task: str = one_of(TaskKind.CLASSIFICATION)
    """classification, entailment, similarity, multiple_choice or regression."""
    text: str = "text"
    """Column of the text. `a+b` means two columns, joined by a space. `c[0]` means the first entry
    of a column of lists."""
    text_pair: str = ""
    """Column of the second text, for the tasks entailment, similarity and regression."""
    choices: str = ""
    """Columns of the answers, comma-separated, for the task multiple_choice."""
    label: str = "label"
    """Column of the label, or of the number in a regression."""
    ignore_label: str = ""
    """Rows with this label are left out, for example -1 in SNLI, which means that the annotators
    disagreed."""
    metrics: str = ""
    """Names of metrics, comma-separated. The first metric selects the best checkpoint. Empty means
    the usual metrics of the task."""
    lm_weight: float = not_negative(0.5)
    """Weight of the LM loss, which is lambda in the paper."""
    task_weight: float = not_negative(1.0)
    """Weight of the task loss."""
    class_weights: str = one_of(ClassWeights.NONE)
    """Weights of the classes in the training loss: none, or balanced (a class with n_c of n
    training rows has the weight n / (number of classes * n_c), so that rare classes count as much
    as frequent ones). Validation and test losses have no weights."""
    label_smoothing: float = fraction(0.0)
    """The part epsilon of the target that all classes (or answers) share: the label gets
    1 - epsilon + epsilon / K and every other class epsilon / K, where K is the number of classes
    (Szegedy et al. 2016). Only the training loss is smoothed."""
    lm_mean: str = one_of(LmMean.TOKEN)
    """The average of the LM loss: token (the mean over all tokens) or sequence (the mean over the
    tokens of each sequence, and then the mean of these means)."""
    cut: str = one_of(Cut.LONGEST)
    """The way to shorten two texts: longest (if they exceed the context, the longer text loses
    tokens first) or half (each text is cut to (context length / 2) - 2 tokens, as in OpenAI's
    code)."""
    long: str = one_of(Long.CUT)
    """The way to read a text that is longer than the context: cut (its end is left out) or windows
    (it is read in parts that fit the context, and one prediction is made from all parts). windows
    is for the task classification."""
    max_windows: int = positive(16)
    """For windows: parts of a text that are read at most. The rest of a longer text is left out."""
    head: str = one_of(Head.EXTRACT)
    """The input of the task head: extract (the hidden state at the last token), mean (the mean of
    the hidden states at all tokens) or flatten (the hidden states of all positions, side by side).
    With flatten, a sequence is `start text delimiter [text_pair delimiter]`, padded to the length
    of the longest sequence."""
    drop_last: bool = False
    """Whether the last, smaller batch of each epoch is dropped. Otherwise such a batch is filled
    with examples of the next epoch."""
    batch_size: int = positive(32)
    """Examples in a step, on all devices together."""
    epochs: float = not_negative(3.0)
    """Passes over the training rows."""
    steps: int = not_negative(0)
    """Steps of the training. 0 means that `epochs` decides."""
    row_length: int = not_negative(0)
    """Tokens in a row of a batch, which holds several examples. 0 means a length that suits the
    examples."""
    evals_per_epoch: float = positive(1.0)
    """Validations in an epoch."""
    patience: int = not_negative(0)
    """Validations in a row without a better first metric that end the training. The learning rate
    follows the schedule of the full length. 0 means that the training never ends early."""
    save_every: int = positive(1000)
    """Steps between two checkpoints. Each validation saves a checkpoint too."""
    compare_from_scratch: bool = False
    """Whether a second fine-tuning from random weights follows, to show the gain of pretraining."""
    baseline: str = one_of(Baseline.LINEAR)
    """The model whose score stands beside the score of GPT: linear (TF-IDF with logistic or ridge
    regression, trained on the same rows in at most 20 seconds or a tenth of the fine-tuning,
    whichever is longer) or none."""
    transfer: str = limited(
        "all",
        lambda layers: layers in ("all", "none") or layers.isdecimal(),
        "must be all, none, or a number of layers",
    )
    """The pretrained weights to start from: all, none, or a number N (the embeddings and the first
    N layers)."""
    average: float = fraction(0.0)
    """Decay of an exponential moving average of the weights, for example 0.99. The averaged weights
    are validated, saved as the model and tested, while the training goes on with the weights that
    are not averaged. 0 means no average."""
    freeze: int = not_negative(0)
    """Layers at the bottom that keep their first weights, as the embeddings then do too. Only the
    layers above them and the heads are trained. The frozen layers have no dropout, and their output
    for each text is computed once and kept in the cache. 0 means that everything is trained."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=6.25e-5, schedule="linear", warmup_fraction=0.002
        )
    )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ProbeConfig(_Config):
    """A zero-shot probe: a task that the language model does without any training for it."""

    kind: str = one_of(ProbeKind.MULTIPLE_CHOICE)
    """acceptability, next_word, multiple_choice or substitution. gptjax/evaluate/probes.py defines
    them."""
    dataset: str = ""
    """`builtin:TASK`, or a data set of the Hugging Face hub."""
    split: str = "validation"
    """Split of the data set."""
    file: str = ""
    """A file of labelled rows, instead of a data set."""
    columns: str = ""
    """Names of the columns, comma-separated, for a file without a header."""
    text: str = "text"
    """Column of the text. `a+b` means two columns, joined by a space. `c[0]` means the first entry
    of a column of lists. For substitution, `_` in the text marks the place of the candidates."""
    choices: str = ""
    """Names of columns, comma-separated. In a multiple choice they hold the answers. In a
    substitution they hold the candidates for the place of the pronoun."""
    pronoun: str = ""
    """For substitution, if the text has no `_`: the column of the word that the candidates
    replace."""
    pronoun_start: str = ""
    """For substitution: the column of the index of the pronoun's first character in the text."""
    label: str = "label"
    """Column of the label."""
    append: str = "very"
    """For next_word: the words that are appended to the text."""
    words: str = "negative,positive"
    """For next_word: one word for each label, comma-separated, in the order of the labels."""
    limit: int = not_negative(1000)
    """Number of rows that are used, from the first row on. 0 means all rows."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig(_Config):
    """Number of devices along each axis of the mesh. One number can be -1, which means all devices
    that the other axes leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class CheckpointConfig(_Config):
    """The numbers of the newest and of the best checkpoints that each stage keeps."""

    keep_newest: int = positive(2)
    keep_best: int = not_negative(1)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class AblationConfig(_Config):
    """The comparison of the mode `ablate`: each variant of each task, with several seeds."""

    tasks: dict[str, FinetuneConfig] = dataclasses.field(default_factory=dict, hash=False)
    """Name of a task -> its fine-tuning. Empty means the field `finetune` of the experiment."""
    only: str = ""
    """Names of the tasks to run, comma-separated. Empty means all tasks."""
    variants: str = "full,no_pretraining,no_lm"
    """Names of the variants, comma-separated. Besides the default variants there are `layers=N`
    (start from the embeddings and N pretrained layers) and `lambda=X` (weight of the LM loss)."""
    parallel: int = not_negative(0)
    """Fine-tunings that run at the same time. 0 means one fine-tuning on each device, or two on a
    single CPU device."""

    @property
    def chosen(self) -> dict[str, FinetuneConfig]:
        """The tasks to run."""
        names = split_names(self.only) or tuple(self.tasks)
        return {name: self.tasks[name] for name in names if name in self.tasks}


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Experiment(_Config):
    """The configuration of a run: a tokenizer, a model, and up to two stages."""

    name: str = "experiment"
    seed: int = limited(0, lambda seed: 0 <= seed < 2**32, f"must be 0 to {2**32 - 1}")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    pretrain: PretrainConfig | None = None
    finetune: FinetuneConfig | None = None
    ablation: AblationConfig | None = None
    choose: str = ""
    """Names of fields, comma-separated, whose values are chosen by the training data of the
    fine-tuning (`gptjax.train.choices`). A field that was set keeps its value. `config.json` has
    the chosen values, and there this field is empty."""
    probes: dict[str, ProbeConfig] = dataclasses.field(default_factory=dict, hash=False)
    """Name of a probe -> the probe. Each validation of a pretraining runs the probes, and so does
    the mode `evaluate` with `--probes`."""
    init_from: str = ""
    """The model whose tokenizer, sizes and weights the run starts from: a workdir or checkpoint of
    gptjax, hf://OWNER/NAME@REVISION for a model of the hub (REVISION may be left out), or gpt1,
    which is OpenAI's GPT-1 on the hub. For a model of the hub, `tokenizer.words` is exact by
    default."""
    init_from_commit: str = limited(
        "",
        lambda commit: not commit or re.fullmatch("[0-9a-f]{40}", commit) is not None,
        "must be a commit of 40 hexadecimal digits, or empty",
    )
    """The commit of the hub's repository in `init_from`. Empty means that the run finds it at its
    start. `config.json` holds it, so that a continued run reads the same weights."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        # The first values of the fields in `choose`. A field that has another value later was set.
        first = {name: value_at(self, name) for name in split_names(self.choose)}
        object.__setattr__(self, "_first", first)

    def not_set(self, given: Iterable[str] = ()) -> str:
        """Returns `choose` without the fields that were set after the experiment was made.

        Args:
          given: names of fields that were set, perhaps to the value that they had.
        """
        first: dict[str, Any] = self.__dict__["_first"]
        names = split_names(self.choose)
        set_later = {name for name in first if value_at(self, name) != first[name]}
        return ",".join(name for name in names if name not in set_later.union(given))


CHOOSABLE = (
    "model.context_length", "model.embedding_dropout", "model.residual_dropout",
    "model.head_dropout", "finetune.long", "finetune.head", "finetune.lm_weight",
    "finetune.batch_size", "finetune.epochs", "finetune.optimizer.learning_rate",
)  # fmt: skip
"""The fields that `Experiment.choose` can name."""

# The fields that can differ when a run is continued in its workdir. The fields of `ablation` decide
# which results are added, and so does `finetune.baseline`. The other fields change where and how
# the same numbers are computed.
_RESUMABLE = (
    "mesh", "checkpoint", "model.remat", "model.unroll", "model.attention", "finetune.baseline",
    "ablation.variants", "ablation.only", "ablation.parallel",
)  # fmt: skip

# Name of a model in `init_from` -> its address on the hub.
_HUB_NAMES = {"gpt1": "hf://openai-community/openai-gpt"}
_HUB = "hf://"

T = TypeVar("T")


def hub_address(path: str) -> str:
    """Returns the address on the hub that a path means; "" if it is not a model of the hub.

    >>> hub_address("gpt1"), hub_address("hf://me/mine@v2"), hub_address("runs/gpt1")
    ('hf://openai-community/openai-gpt', 'hf://me/mine@v2', '')
    """
    return _HUB_NAMES.get(path, path if path.startswith(_HUB) else "")


def split_names(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of names: ``"a, b"`` -> ``("a", "b")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def frozen(config: T) -> T:
    """Returns a copy of a configuration whose fields, and fields of its parts, are read-only."""
    copy: Any = config
    if isinstance(config, dict):
        copy = {name: frozen(part) for name, part in config.items()}
    elif isinstance(config, _Config):
        names = [field.name for field in dataclasses.fields(config)]
        copy = type(config)(**{name: frozen(getattr(config, name)) for name in names})
        object.__setattr__(copy, "_frozen", True)
    return copy


def part_class(annotation: Any) -> Any:
    """Returns the configuration class X of the type X, X | None or dict[str, X].

    None means that the type has no configuration class.
    """
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
    """Returns the value at a dotted path in a configuration.

    An empty path means the configuration itself. None is returned if the path does not exist.
    """
    for name in filter(None, path.split(".")):
        is_table = isinstance(config, Mapping)
        config = config.get(name) if is_table else getattr(config, name, None)
    return config


def with_value(config: T, path: str, value: Any) -> T:
    """Returns a copy of a configuration with another value at a dotted path.

    >>> with_value(Experiment(), "model.width", 128).model.width
    128
    """
    name, _, rest = path.partition(".")
    if rest:
        value = with_value(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as plain values that JSON can represent."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Builds a frozen configuration from the values of `to_dict`.

    A field without a value gets its default.

    Args:
      cls: the configuration class.
      values: the values of `to_dict`, which may have been written as JSON and read again.
      where: the name of the source of the values, for error messages.

    Raises:
      UserError: the values have a field that the class does not have.
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
    """Lists the changes of fields that must not change when a run is continued.

    A change has the form "field: old -> new".

    Args:
      old, new: values of `to_dict`.
      prefix: a text that is put before the names of the fields.
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
    """The task of a task head: its predictions, and the columns that it is predicted from."""

    kind: TaskKind
    """The kind of the task. A string is converted to a member of `TaskKind`."""
    text: str
    """Column of the text, in the form of `FinetuneConfig.text`."""
    text_pair: str = ""
    """Column of the second text. Empty means that the task has one text."""
    choices: tuple[str, ...] = ()
    """Columns of the answers of a multiple choice."""
    label: str = "label"
    """Column of the label."""
    labels: tuple[str, ...] = ()
    """Names of the classes, or of the answers, in the order of the head's outputs."""
    cut: str = Cut.LONGEST
    """The way to shorten two texts, a member of `Cut`."""
    flatten: int = 0
    """The number of tokens that each sequence is padded or cut to, if the task head reads all
    positions. 0 means that the task head reads the last token alone."""
    windows: int = 0
    """The largest number of windows in which a long text is read (`Long.WINDOWS`). 0 means that a
    long text is cut."""
    mean: bool = False
    """Whether the task head reads the mean over all tokens of a sequence (`Head.MEAN`), instead of
    the state at its last token."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", TaskKind(self.kind))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TaskSpec":
        """Builds a task from the values of `dataclasses.asdict`, or from their JSON."""
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
        """C, the largest number of token sequences of an example."""
        if self.kind is TaskKind.MULTIPLE_CHOICE:
            return len(self.choices)
        if self.windows:
            return self.windows
        return 2 if self.kind.sums_candidates else 1

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the task head for one hidden state."""
        return len(self.labels) if self.kind.has_classes else 1

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that are read in addition to the label."""
        return tuple(name for name in (self.text, self.text_pair, *self.choices) if name)


# The fields of the model that come from the checkpoint in `init_from`. The other fields, such as
# dropout and dtype, come from the experiment.
INHERITED_SIZES = (
    "vocab_size", "context_length", "num_layers", "width", "num_heads", "ffn_width",
    "activation", "segment_types", "tied", "layer_norm_epsilon",
)  # fmt: skip


def higher_is_better(name: str) -> bool:
    """Returns whether a higher value of a metric is better. This is false for `mse` and `loss`."""
    return name not in ("mse", "loss")
