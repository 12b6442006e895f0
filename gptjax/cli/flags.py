"""The flags of the program: one table of the modes with their flags, and the parser.

A mode is an activity of the program, such as `train` or `predict`. The flag `--config.FIELD=VALUE`
changes a field of the experiment. A part of the experiment is a group of fields, such as `model`.

The help texts, absl's definitions of the flags, and the names of flags in error messages (see
`gptjax.cli.console`) all come from the table `MODES`.
"""

import dataclasses
import itertools
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from absl import flags
from ml_collections import config_flags

from gptjax.config import experiments, schema
from gptjax.config.paper_tasks import SUBMISSIONS
from gptjax.config.schema import BenchKind, Experiment, PictureFormat, Stage, WeightFormat
from gptjax.errors import UserError, nearest, require

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Mode:
    """An activity of the program."""

    summary: str
    """One sentence that says what the mode does."""
    example: str
    """The arguments of an example, without the name of the mode."""
    flags: dict[str, str]
    """NAME=PLACEHOLDER -> the help text of the flag in this mode. A switch is NAME alone."""
    parts: tuple[str, ...] = ()
    """The parts of the experiment that the mode reads, the most important part first. They are
    keys of `gptjax.cli.usage.PARTS`."""

    @property
    def names(self) -> frozenset[str]:
        """The names of the flags of this mode."""
        return frozenset(flag.partition("=")[0] for flag in self.flags)


_CHECKPOINT = (
    "The trained model: the workdir of a run (its last stage at the best step), "
    "WORKDIR/checkpoints/STAGE (another stage at its best step) or WORKDIR/checkpoints/STAGE/STEP "
    "(another step)."
)
_OR_HUB = (
    f"{_CHECKPOINT} Or a model of the Hugging Face hub: hf://OWNER/NAME, "
    "hf://OWNER/NAME@REVISION or gpt1."
)
_WORKDIR = (
    "The folder that the run writes to: a path, or gs://BUCKET/FOLDER. Default: runs/NAME, where "
    "NAME is --config.name."
)
_REPORT = "A file to write the report to. The report is printed in any case."
_TRAINING = (
    "experiment", "finetune", "pretrain", "tokenizer", "model", "optimizer", "mesh", "checkpoint",
)  # fmt: skip
_STEP = ("model", "mesh", "pretrain", "finetune", "optimizer", "tokenizer")

MODES: dict[str, Mode] = {
    "train": Mode(
        "Trains a model. The same command continues a training that was stopped.",
        "--config=finetune_file --config.finetune.train_file=train.csv",
        {
            "workdir=DIR": _WORKDIR,
            "coordinator_address=HOST:PORT": "For a training with several processes: the address "
            "of process 0. Give --coordinator_address, --num_processes and --process_id together, "
            "and only if TPU, GKE, Slurm or Open MPI does not provide these values.",
            "num_processes=N": "The number of processes of the training. 1 alone means a training "
            "in one process, even if the environment names several processes.",
            "process_id=N": "The index of this process, from 0.",
            "initialization_timeout=SECONDS": "The time that all processes have to start.",
            "heartbeat_timeout=SECONDS": "If a process is silent for this time, it is considered "
            "lost, and the other processes end.",
            "profile=STEPS": "Traces this many steps of each stage with JAX's profiler, into "
            "WORKDIR/profile. The first steps, which compile, are left out. 0 means no trace.",
        },
        (*_TRAINING, "probes"),
    ),
    "evaluate": Mode(
        "Computes the losses and metrics of a trained model.",
        "--checkpoint=runs/finetune_file --split=test",
        {
            "checkpoint=DIR": _OR_HUB,
            "input=FILE": "Labelled rows to score, with the columns that the model was fine-tuned "
            "on. For a language model: text files, as comma-separated globs. Default: the data "
            "that the model was trained with.",
            "split=NAME": "The split of the training's data to score: validation or test. "
            "Default: validation.",
            "probes": "Instead of losses and metrics, prints the scores of zero-shot probes, which "
            "are tasks that the language model was never trained on. The probes are the field "
            "probes of --config. Without --config they are the probes of the run that trained the "
            "model.",
        },
        ("probes",),
    ),
    "predict": Mode(
        "Writes a label and its probabilities for every row of a file.",
        "--checkpoint=runs/finetune_file --input=new.csv --output=predictions.csv",
        {
            "checkpoint=DIR": _OR_HUB,
            "input=FILE": "The rows: .csv, .tsv, .jsonl or .parquet, with the text columns that "
            "the model was fine-tuned on.",
            "output=FILE": "The file to write: .csv, .tsv or .jsonl, with one line for each row, "
            "in the same order.",
            "split=NAME": "A split of the Hugging Face data set that the model was fine-tuned on. "
            "Its rows are used instead of --input.",
            "glue=TASK": "Writes a submission for the server of the GLUE benchmark, with the "
            f"columns index and prediction. TASK is {', '.join(SUBMISSIONS)}.",
        },
    ),
    "generate": Mode(
        "Continues a text.",
        "--checkpoint=runs/quickstart --prompt='Returns' --temperature=0.8",
        {
            "checkpoint=DIR": _OR_HUB,
            "prompt=TEXT": "The beginning of the text. It may be empty.",
            "max_new_tokens=N": "The number of tokens to add.",
            "temperature=T": "Divides the logits: lower values make likely tokens more likely. 0 "
            "takes the most likely token every time.",
            "top_k=K": "Draws from the K most likely tokens only. 0 means all tokens.",
            "top_p=P": "Draws from the smallest set of most likely tokens whose probabilities add "
            "up to P. 1 means all tokens.",
            "num_samples=N": "The number of texts.",
            "seed=N": "The seed of the random draws. Equal seeds give equal texts.",
        },
    ),
    "explain": Mode(
        "Writes a page that shows, step by step, how a model reads one text.",
        "--checkpoint=runs/quickstart --text=Returns --output=page.html",
        {
            "checkpoint=DIR": _OR_HUB,
            "text=TEXT": "The text: the first text of a pair, or the question of a multiple "
            "choice.",
            "text_pair=TEXT": "The second text of a pair.",
            "choice=TEXT": "An answer of a multiple choice. Give the flag once for each answer, in "
            "their order.",
            "label=LABEL": "The right label, for the task loss: a class, the number of a "
            "regression, or the answer of a multiple choice as in the training file.",
            "output=FILE": "The page to write (.html), or the numbers alone (.json). With "
            "--format: the folder of the pictures.",
            "format=FORMAT": "Draws pictures instead of a page: png, svg or pdf. They are the "
            "mask, the attention of each block, the table of the steps, the tokens coloured by "
            "their surprise and, for a task, by their part in the answer.",
            "language=LANGUAGE": "The language that the page opens in: en or zh.",
            "heads=HEADS": "The heads whose queries, keys and values are in the page, as "
            "LAYER.HEAD with commas, both from 0: 0.3,5.11. Default: the eight most telling "
            "heads.",
            "compare=DIRS": "Other checkpoints, separated by commas, that read the same text: "
            "before and after fine-tuning, or pretrained and from scratch. They must have the same "
            "tokenizer. Default: the checkpoints that the run kept, of a model of up to 20 million "
            "parameters. none means none.",
            "other_text=TEXT": "Another text to compare with --text. The other texts of a pair or "
            "of a multiple choice stay the same.",
            "weights": "Puts a model of up to 20 million parameters into the page, so that the "
            "page can compute other texts. Up to 2 million are always in it.",
        },
    ),
    "tokenizer": Mode(
        "Trains a tokenizer on text files.",
        "--input='books/*.txt' --output=tokenizer --config.tokenizer.vocab_size=8000",
        {
            "input=FILES": "The text files, as comma-separated globs.",
            "output=DIR": "The folder to write tokenizer.json to. A BPE is also written as "
            "vocab.json and merges.txt.",
        },
        ("tokenizer",),
    ),
    "import": Mode(
        "Converts a GPT-1 of OpenAI or Hugging Face into a workdir.",
        "--format=openai --input=finetune-transformer-lm/model --output=runs/gpt1",
        {
            "input=DIR": "The folder with the weights.",
            "output=DIR": "The workdir to create. Other modes take it as --checkpoint, and "
            "trainings start from it with --config.init_from.",
            "format=NAME": "The format of the weights: openai (the files of OpenAI's "
            "finetune-transformer-lm) or huggingface (a folder of an openai-gpt model for "
            "transformers). Default: huggingface.",
            "config.tokenizer.words=HOW": "The way to split text into words: exact (the way of "
            "OpenAI's code, which uses ftfy and spaCy) or fast (nearly the same words, without "
            "these libraries). Default: exact.",
        },
    ),
    "export": Mode(
        "Converts a trained model for transformers, or for OpenAI's code of GPT-1.",
        "--input=runs/finetune_file --output=for_transformers",
        {
            "input=DIR": _CHECKPOINT,
            "output=DIR": "The folder to create.",
            "format=NAME": "The format to write: huggingface (a folder of an openai-gpt model for "
            "transformers) or openai (the files of OpenAI's finetune-transformer-lm). "
            "Default: huggingface.",
        },
    ),
    "ablate": Mode(
        "Measures what pretraining and the auxiliary loss contribute, with several seeds.",
        "--config=gpt1_task:rte --config.init_from=runs/gpt1 --seeds=3",
        {
            "workdir=DIR": _WORKDIR,
            "seeds=N": "The number of seeds. The first seed is --config.seed, and each later seed "
            "is one higher.",
        },
        ("ablation", *_TRAINING),
    ),
    "compile": Mode(
        "Compiles the train step for a machine that you need not have, and estimates its time and "
        "memory.",
        "--config=larger:350m --topology=v5e:4x4",
        {
            "topology=NAME": "The machine: a TPU v4, v5e, v5p or v6e with its shape (v5e:4x4, "
            "v4:2x2x1), several slices of TPUs (2xv5e:16x16), or a number of CPU devices (cpu:8).",
            "stage=STAGE": "The stage whose train step is compiled: pretrain or finetune.",
            "sweep": "Compiles several batch sizes, meshes and values of model.remat, and ranks "
            "those that fit into memory.",
            "sweep_limit=N": "The largest number of programs that --sweep compiles.",
            "output=FILE": _REPORT,
        },
        _STEP,
    ),
    "bench": Mode(
        "Times training, text generation or data loading on this machine.",
        "--config=gpt1_pretrain --config.pretrain.batch_size=8 --config.mesh.data=1",
        {
            "bench=WHAT": "The activity to time: train (train steps on random tokens), generate "
            "(text generation from random tokens) or input (loading of the experiment's data).",
            "stage=STAGE": "The stage whose train step or data is timed: pretrain or finetune.",
            "steps=N": "The number of timed steps, calls of the generation, or batches. 0 means "
            "10, and 100 with --bench=input.",
            "max_new_tokens=N": "With --bench=generate: the number of tokens to generate.",
            "num_samples=N": "With --bench=generate: the number of texts to generate at once.",
            "output=FILE": _REPORT,
            "profile=STEPS": "After the timing, traces this many more steps with JAX's profiler. "
            "The trace is written to the folder profile beside --output, or without --output to "
            "runs/NAME/profile. 0 means no trace.",
        },
        _STEP,
    ),
}

COMMON: dict[str, str] = {
    "config=EXPERIMENT": "The experiment: the name of an experiment that comes with gptjax, or the "
    "path of a Python file. NAME:ARGUMENT passes an argument to the experiment. Default: "
    "quickstart.",
    "config.FIELD=VALUE": "Changes one field of the experiment.",
}
"""The flags that all modes have."""


def _help(name: str) -> str:
    """Joins the help texts of a flag in all modes: "train, ablate: TEXT export: TEXT"."""
    modes: dict[str, list[str]] = {}
    for mode, table in MODES.items():
        for flag, text in table.flags.items():
            if flag.partition("=")[0] == name:
                modes.setdefault(text, []).append(mode)
    return " ".join(f"{', '.join(those)}: {text}" for text, those in modes.items())


_ARGV: list[str] = []
"""The command line of the last call of `parse`. ml_collections searches it for `--config.FIELD`."""


def _load(config: str) -> Experiment:
    """Returns the experiment of `--config`, after a check that it has the parts in `_ARGV`."""
    experiment = experiments.load(config)
    _check_parts(experiment, _fields(_options(_ARGV)))
    return experiment


MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do. The first word does the same.")
CONFIG = config_flags.DEFINE_config_dataclass(
    "config", Experiment(), " ".join(COMMON.values()), sys_argv=_ARGV, parse_fn=_load
)
WORKDIR = flags.DEFINE_string("workdir", "", _help("workdir"))
SEEDS = flags.DEFINE_integer("seeds", 3, _help("seeds"))
CHECKPOINT = flags.DEFINE_string("checkpoint", "", _help("checkpoint"))
INPUT = flags.DEFINE_string("input", "", _help("input"))
OUTPUT = flags.DEFINE_string("output", "", _help("output"))
FORMAT = flags.DEFINE_enum("format", None, [*WeightFormat, *PictureFormat], _help("format"))
TOPOLOGY = flags.DEFINE_string("topology", "", _help("topology"))
SWEEP = flags.DEFINE_bool("sweep", False, _help("sweep"))
SWEEP_LIMIT = flags.DEFINE_integer("sweep_limit", 12, _help("sweep_limit"))
STAGE = flags.DEFINE_enum("stage", Stage.PRETRAIN, [Stage.PRETRAIN, Stage.FINETUNE], _help("stage"))
BENCH = flags.DEFINE_enum("bench", BenchKind.TRAIN, list(BenchKind), _help("bench"))
PROBES = flags.DEFINE_bool("probes", False, _help("probes"))
SPLIT = flags.DEFINE_string("split", "", _help("split"))
GLUE = flags.DEFINE_string("glue", "", _help("glue"))
TEXT = flags.DEFINE_string("text", None, _help("text"))
TEXT_PAIR = flags.DEFINE_string("text_pair", None, _help("text_pair"))
CHOICE = flags.DEFINE_multi_string("choice", None, _help("choice"))
LABEL = flags.DEFINE_string("label", None, _help("label"))
LANGUAGE = flags.DEFINE_enum("language", "en", ["en", "zh"], _help("language"))
HEADS = flags.DEFINE_string("heads", "", _help("heads"))
COMPARE = flags.DEFINE_string("compare", "", _help("compare"))
OTHER_TEXT = flags.DEFINE_string("other_text", None, _help("other_text"))
WEIGHTS = flags.DEFINE_bool("weights", False, _help("weights"))
PROMPT = flags.DEFINE_string("prompt", "", _help("prompt"))
PROFILE = flags.DEFINE_integer("profile", 0, _help("profile"), lower_bound=0)
# The values of the flags below are read with the function `values`.
flags.DEFINE_integer("steps", 0, _help("steps"))
flags.DEFINE_integer("max_new_tokens", 100, _help("max_new_tokens"))
flags.DEFINE_float("temperature", 1.0, _help("temperature"))
flags.DEFINE_integer("top_k", 0, _help("top_k"))
flags.DEFINE_float("top_p", 1.0, _help("top_p"))
flags.DEFINE_integer("num_samples", 1, _help("num_samples"))
flags.DEFINE_integer("seed", 0, _help("seed"))
flags.DEFINE_string("coordinator_address", "", _help("coordinator_address"))
flags.DEFINE_integer("num_processes", None, _help("num_processes"))
flags.DEFINE_integer("process_id", None, _help("process_id"))
flags.DEFINE_integer("initialization_timeout", 300, _help("initialization_timeout"), lower_bound=1)
flags.DEFINE_integer("heartbeat_timeout", 100, _help("heartbeat_timeout"), lower_bound=2)


def values(names: Iterable[str]) -> dict[str, Any]:
    """Returns flag name -> value of the flag, for functions whose arguments have these names."""
    return {name: FLAGS[name].value for name in names}


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line.

    Other flags are in the constants of this module, such as `WORKDIR`, or come from `values`.
    """

    mode: str
    experiment: Experiment
    overrides: Mapping[str, Any]
    """Dotted name -> value of the fields that the command line changes."""
    has_config: bool
    """Whether the command line has `--config`. Otherwise `experiment` is the quickstart."""

    @property
    def workdir(self) -> str:
        """The folder of the run."""
        return WORKDIR.value or os.path.join("runs", self.experiment.name)


@dataclasses.dataclass(frozen=True)
class HelpRequest:
    """A command line that asks for help."""

    name: str
    """The flag that asks for help, from `_HELP`."""
    mode: str
    """The mode to explain. An empty string means the overview of all modes."""
    config: str
    """The value of `--config`."""


_HELP = ("help", "h", "?", "helpshort", "helpfull", "helpxml")
"""The flags that ask for help. The last two flags ask for absl's own help texts."""


def parse(argv: Sequence[str]) -> Command | HelpRequest:
    """Reads a command line.

    Args:
      argv: the program's name and its arguments. The first argument can be the name of a mode.

    Raises:
      UserError: a mode, flag, experiment or field that does not exist, or a wrong value.
    """
    program, *arguments = argv
    word = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    _forget()
    try:
        arguments = _joined(FLAGS.read_flags_from_files(arguments, force_gnu=False))
        options = _options(arguments)
        mode = _mode(word, options)
        configs = [value for name, value in options if name == "config"]
        config = configs[-1] if configs else experiments.QUICKSTART
        for name, _ in options:
            if name in _HELP:
                return HelpRequest(name, mode, config)
        _check_fields(_fields(options))
        added = [f"--mode={word}"] if word else []
        added += [] if configs else [f"--config={config}"]
        # The program has no positional arguments. ml_collections would read fields after "--".
        flags_only = list(itertools.takewhile(lambda argument: argument != "--", arguments))
        _ARGV[:] = [program, *added, *flags_only]
        _, *rest = FLAGS(_ARGV)
        rest += arguments[len(flags_only) + 1 :]
    except flags.Error as error:
        raise UserError(str(error)) from error
    for argument in rest:
        raise UserError(
            f"{argument}: unexpected argument; the mode comes first, and flags begin with --"
        )
    overrides = config_flags.get_override_values(FLAGS["config"])
    experiment = CONFIG.value
    experiment.choose = experiment.not_set(overrides)
    return Command(MODE.value, schema.frozen(experiment), overrides, bool(configs))


def _joined(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments, with each pair "--flag", "value" joined to "--flag=value"."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--":
            return [*found, *arguments[i:]]
        if found and _lacks_value(found[-1]) and not argument.startswith("--"):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def _lacks_value(argument: str) -> bool:
    name = argument.lstrip("-")
    is_field = name.startswith("config.") and "=" not in name
    return name != argument and (is_field or (name in FLAGS and not FLAGS[name].boolean))


def _options(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the names and values of the flags. A flag without a value has an empty string."""
    before = itertools.takewhile(lambda argument: argument != "--", arguments)
    parts = [each.lstrip("-").partition("=") for each in before if each.startswith("-")]
    return [(name, value) for name, _, value in parts]


def _fields(options: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns FIELD and VALUE of each `--config.FIELD=VALUE` among the options."""
    prefix = "config."
    return [
        (name.removeprefix(prefix), value) for name, value in options if name.startswith(prefix)
    ]


def _mode(word: str, options: Sequence[tuple[str, str]]) -> str:
    """Returns the mode of a command line, or an empty string if it names no mode.

    Args:
      word: the first word of the command line, if it is no flag, or else an empty string.
      options: the names and values of the flags. `--mode` can name the mode too.

    Raises:
      UserError: there is no such mode, or the command line names two modes.
    """
    given = [(word, word)] if word else []
    given += [(value, f"--mode={value}") for name, value in options if name == "mode"]
    for mode, text in given:
        hint = nearest(mode, MODES) or f"; the modes are {', '.join(MODES)}"
        require(mode in MODES, f"{text}: no such mode{hint}")
        require(mode == given[0][0], f"{text}: there is another mode, {given[0][0]}; give only one")
    return given[-1][0] if given else ""


def _forget() -> None:
    """Undoes an earlier call of `parse`, so that a process can parse several command lines."""
    for name in list(FLAGS):
        if name.startswith("config."):
            delattr(FLAGS, name)
        else:
            FLAGS[name].unparse()
    FLAGS.unparse_flags()


def general_field(field: str) -> str:
    """Returns the dotted name of a field in the form of `schema.field_names`.

    An experiment chooses the names of its ablation tasks and probes. `schema.field_names` has NAME
    in place of each such name.

    >>> general_field("probes.cola.limit")
    'probes.NAME.limit'
    """
    return re.sub(r"^(ablation\.tasks|probes)\.[^.]+", r"\1.NAME", field)


def _check_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Raises `UserError` for a `--config.FIELD` that no experiment has."""
    known = list(schema.field_names(Experiment))
    for field, _ in fields:
        general = general_field(field)
        require(general in known, f"--config.{field}: no such field{nearest(general, known)}")


def _check_parts(experiment: Experiment, fields: Sequence[tuple[str, str]]) -> None:
    """Raises `UserError` for a `--config.PART.FIELD` if this experiment does not have the part."""
    for field, value in fields:
        annotation = Experiment.__annotations__.get(field)
        part, can_be_none = schema.part_class(annotation), types.NoneType in get_args(annotation)
        if part and can_be_none:
            # From this flag on, ml_collections has a new part, or none.
            change: dict[str, Any] = {field: part() if value == "build" else None}
            experiment = dataclasses.replace(experiment, **change)
        parts = itertools.accumulate(field.split(".")[:-1], "{}.{}".format)
        missing = next((part for part in parts if schema.value_at(experiment, part) is None), "")
        if not missing:
            continue
        outer, _, name = missing.rpartition(".")
        entries = schema.value_at(experiment, outer)
        if isinstance(entries, Mapping):
            raise UserError(
                f"--config.{field}: the experiment has no entry {name!r}{nearest(name, entries)}; "
                f"its entries are {', '.join(entries) or 'none'}"
            )
        raise UserError(
            f"--config.{field}: the experiment has no {missing} part; --config.{missing}=build "
            "before it adds one with the default values"
        )
