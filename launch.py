"""Everything that gptjax does, by absl flags: `python launch.py --help`.

python launch.py                                     the quickstart, into runs/quickstart
python launch.py --config=experiments/NAME.py        another experiment
python launch.py --config.finetune.epochs=1          one field of it changed
python launch.py --mode=predict --checkpoint=DIR --input=FILE --output=FILE
"""

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from gptjax import errors
from gptjax.cli import malloc
from gptjax.cluster import processes
from gptjax.config.schema import BenchKind, Stage, WeightFormat, Words
from gptjax.errors import Preempted, ProcessLost, TrainingDiverged, UserError, require
from gptjax.io.console import no_reader, tell

FOLDER = os.path.dirname(os.path.abspath(__file__))
QUICKSTART = os.path.join(FOLDER, "experiments", "quickstart.py")
FLAGS = flags.FLAGS

MODE = flags.DEFINE_enum(
    "mode",
    "train",
    [
        "train",
        "evaluate",
        "predict",
        "generate",
        "tokenizer",
        "import",
        "export",
        "ablate",
        "compile",
        "bench",
    ],
    "What to do.",
)
CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Experiment file, by default experiments/quickstart.py; --config.FIELD=VALUE "
    "changes one field of it.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", "", "train, ablate: folder of the run, or gs://BUCKET/FOLDER; empty: runs/NAME."
)
SEEDS = flags.DEFINE_integer("seeds", 3, "ablate: seeds to run, from --config.seed on.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "evaluate, predict, generate: a workdir, a stage or a step of it."
)
INPUT = flags.DEFINE_string(
    "input", "", "predict, evaluate: a file of rows (evaluate of a language model: text files); "
    "tokenizer: text files (comma-separated globs); import: a folder of weights; export: a "
    "workdir, a stage or a step of it."
)  # fmt: skip
OUTPUT = flags.DEFINE_string(
    "output", "", "predict: the file to write (.csv, .tsv, .jsonl); tokenizer, import, export: the "
    "folder; compile, bench: a file that gets the report too."
)  # fmt: skip
FORMAT = flags.DEFINE_enum(
    "format",
    WeightFormat.HUGGINGFACE,
    list(WeightFormat),
    "import, export: whose format the other is.",
)
TOPOLOGY = flags.DEFINE_string(
    "topology", "", "compile: the machine to compile for, one of v4, v5e, v5p, v6e with its shape "
    "(v5e:4x4, v4:2x2x1), of two slices 2xv5e:16x16; or cpu:8."
)  # fmt: skip
SWEEP = flags.DEFINE_bool(
    "sweep", False, "compile: tries batch sizes, remat and meshes, and ranks those that fit."
)  # fmt: skip
SWEEP_LIMIT = flags.DEFINE_integer("sweep_limit", 12, "compile --sweep: compilations at most.")
STAGE = flags.DEFINE_enum(
    "stage",
    Stage.PRETRAIN,
    [Stage.PRETRAIN, Stage.FINETUNE],
    "compile, bench: whose train step (or input).",
)
BENCH = flags.DEFINE_enum(
    "bench", BenchKind.TRAIN, list(BenchKind), "bench: what is timed on this machine."
)
STEPS = flags.DEFINE_integer(
    "steps", 0, "bench: steps (calls, batches) to time; 0: 10, of batches of input 100."
)
PROBES = flags.DEFINE_bool(
    "probes", False, "evaluate: the zero-shot probes of --config, or of the checkpoint's own run."
)
SPLIT = flags.DEFINE_string(
    "split", "validation", "evaluate: split of the experiment's own data; predict: of its data "
    "set on the hub, where there is no --input."
)  # fmt: skip
GLUE = flags.DEFINE_string(
    "glue", "", "predict: write the benchmark's submission file of this task (cola, sst2, mrpc, "
    "...) instead of our columns."
)  # fmt: skip
PROMPT = flags.DEFINE_string("prompt", "", "generate: how the text begins.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "generate, bench: tokens to add.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "generate: 0 takes the most likely token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "generate: draw among the k most likely; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "generate: draw among the likeliest p of probability.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "generate, bench: texts to draw.")
SEED = flags.DEFINE_integer("seed", 0, "generate: of the draws.")
COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", "", "train, several processes: HOST:PORT of process 0. This and the "
    "next two only where the environment (TPU, GKE, Slurm, Open MPI) does not say it."
)  # fmt: skip
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "train: processes of this run.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "train: which of them this is, from 0.")
INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout", 300, "train: seconds for all processes to come up.", lower_bound=1
)
HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "train: seconds without a sign of life until a process counts as "
    "lost, and the others end.", lower_bound=2
)  # fmt: skip


def _workdir() -> str:
    return WORKDIR.value or os.path.join("runs", CONFIG.value.name)


def _train() -> None:
    from gptjax.cli import modes
    from gptjax.train import run

    given = config_flags.get_override_values(FLAGS["config"])
    summary = run.run(CONFIG.value, _workdir(), given)
    modes.show_results(_workdir(), summary)


def _ablate() -> None:
    from gptjax.ablation import run as run_lib

    given = config_flags.get_override_values(FLAGS["config"])
    run_lib.run(CONFIG.value, _workdir(), SEEDS.value, given)


def _evaluate() -> None:
    from gptjax.cli import modes

    if PROBES.value:
        # Without --config the flag holds the quickstart, which says nothing of this checkpoint.
        given = any(re.match("--?config($|=)", argument) for argument in sys.argv[1:])
        modes.evaluate_probes(CHECKPOINT.value, CONFIG.value.probes if given else None)
        return
    modes.evaluate(CHECKPOINT.value, SPLIT.value, INPUT.value)


def _predict() -> None:
    from gptjax.cli import modes

    split = SPLIT.value if FLAGS["split"].present else ""
    modes.predict(CHECKPOINT.value, INPUT.value, OUTPUT.value, split, GLUE.value)


def _generate() -> None:
    from gptjax.cli import modes

    modes.generate(
        CHECKPOINT.value, PROMPT.value, MAX_NEW_TOKENS.value, TEMPERATURE.value,
        TOP_K.value, TOP_P.value, NUM_SAMPLES.value, SEED.value,
    )  # fmt: skip


def _tokenizer() -> None:
    from gptjax.cli import modes

    modes.train_tokenizer(CONFIG.value.tokenizer, INPUT.value, OUTPUT.value)


def _import() -> None:
    from gptjax.interop import convert

    # The experiment has nothing to say here, a flag has.
    words = config_flags.get_override_values(FLAGS["config"]).get("tokenizer.words", Words.EXACT)
    for line in convert.import_weights(INPUT.value, OUTPUT.value, FORMAT.value, words):
        print(line)
    print(f"to start from them: --config.init_from={OUTPUT.value}")


def _export() -> None:
    from gptjax.interop import convert

    for line in convert.export_weights(INPUT.value, OUTPUT.value, FORMAT.value):
        print(line)


def _compile() -> None:
    from gptjax.cost import compile, sweep

    if SWEEP.value:
        stage, limit = STAGE.value, SWEEP_LIMIT.value
        sweep.run(CONFIG.value, TOPOLOGY.value, stage, limit, OUTPUT.value)
        return
    compile.run(CONFIG.value, TOPOLOGY.value, STAGE.value, OUTPUT.value)


def _bench() -> None:
    from gptjax.cost import bench

    request = bench.Request(
        BENCH.value, STAGE.value, STEPS.value, MAX_NEW_TOKENS.value, NUM_SAMPLES.value
    )
    bench.run(CONFIG.value, request, OUTPUT.value)


_MODES: dict[str, Callable[[], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "generate": _generate,
    "tokenizer": _tokenizer,
    "import": _import,
    "export": _export,
    "ablate": _ablate,
    "compile": _compile,
    "bench": _bench,
}


def _with_flags(text: str) -> str:
    """A message of the library with flags for arguments and fields."""
    from gptjax.cli.console import with_flags
    from gptjax.config import schema

    own = {name for name in FLAGS if not name.startswith("config.")}
    # These are flags of some modes, and fields of an experiment that others train.
    train = FLAGS["mode"].value in ("train", "ablate", "compile", "bench")
    shared = {"seed", "probes", "checkpoint"} if train else set()
    return with_flags(text, own - shared, schema.field_names(schema.Experiment))


def _error(error: object, code: int) -> int:
    """Prints one line and returns the exit code; one of several processes ends here."""
    text = _with_flags(" ".join(str(error).split()))
    try:
        print("error:", text, file=sys.stderr, flush=True)
    except OSError:
        no_reader()
    processes.leave(code, text)
    return code


def _join() -> None:
    """Joins the other processes of this run, if there are any."""
    options = processes.Options(
        COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value,
        INITIALIZATION_TIMEOUT.value, HEARTBEAT_TIMEOUT.value,
    )  # fmt: skip
    processes.start(options, MODE.value)


def _check_config_flags(argv: list[str]) -> None:
    """Names a missing experiment file, and the nearest field for one that does not exist."""
    from gptjax.config import schema as schema_lib

    fields = list(schema_lib.field_names(schema_lib.Experiment))
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            path = value.partition(":")[0]
            folder = os.path.relpath(os.path.dirname(QUICKSTART))
            known = sorted(file for file in os.listdir(folder) if file.endswith(".py"))
            paths = [os.path.join(folder, file) for file in known]
            near = errors.nearest(path, paths) or f"; {folder} has {', '.join(known)}"
            require(os.path.isfile(path), f"--config={value}: no such file{near}")
        # A task of an ablation, a probe has the name that the experiment gives it.
        field = re.sub(r"^config\.(ablation\.tasks|probes)\.[^.]+", r"config.\1.NAME", name)
        field = field.removeprefix("config.")
        known_field = field == name or field in fields
        require(known_field, f"--{name}: no such field{errors.nearest(field, fields)}")


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; a wrong one is one line and exit code 2, help is exit code 0."""
    if "--config" in argv[:-1]:  # absl's other spelling: --config FILE
        place = argv.index("--config")
        argv = [*argv[:place], f"--config={argv[place + 1]}", *argv[place + 2 :]]
    if not any(argument.lstrip("-").startswith("config=") for argument in argv):
        argv = [argv[0], f"--config={QUICKSTART}", *argv[1:]]
    try:
        _check_config_flags([argument for argument in argv[1:] if argument.startswith("-")])
        return FLAGS(argv)
    except SystemExit as end:  # absl prints the help that was asked for, and ends with 1
        asked = any(re.match(r"--?(help|\?)", argument) for argument in argv[1:])
        sys.exit(0 if asked else end.code)
    except (UserError, flags.Error) as error:
        sys.exit(_error(error, 2))
    except KeyError as error:  # an entry of ablation.tasks or probes
        message = f"the experiment has no entry {error.args[0]!r}; its file says which it has"
        sys.exit(_error(f"--config: {message}", 2))
    except ValueError as error:  # a field of a part that the experiment does not have
        missing = re.search("pretrain|finetune|ablation", str(error))
        if missing is None:
            raise
        part = missing.group()
        message = f"the experiment has no {part} part; --config.{part}=build adds one with defaults"
        sys.exit(_error(f"--config.{part}: {message}", 2))


def _set_up_jax() -> None:
    """The persistent compilation cache: the second run of a model starts at once."""
    import jax

    from gptjax.data import cache

    if cache.folder() and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.path.join(cache.folder(), "xla")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _quiet_orbax() -> None:
    """Of a damaged checkpoint it leaves tracebacks in the background, where we print one line."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    usual = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            usual(unraisable)

    sys.unraisablehook = hook


def _asked_to_stop(*_: object) -> None:
    """SIGTERM where no training is under way: while modules load, during the report, other modes.

    Nothing is half-written then: files are replaced whole.
    """
    text = "asked to stop; the same command starts again"
    tell(f"error: {text}")
    # A thread, which may wait: the signal may have come while this one was telling them something.
    leave = threading.Thread(target=processes.leave, args=(75, text), daemon=True)
    leave.start()
    leave.join(40)
    os._exit(75)


def main(argv: list[str]) -> int:
    """Runs the mode; returns the exit code."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING)
    # Orbax warns of what we ask it to do, and logs errors that it raises as well.
    absl_logging.get_absl_logger().setLevel(logging.CRITICAL)
    if len(argv) > 1:
        return _error(f"{argv[1]}: unexpected argument; flags begin with --", 2)
    if MODE.value != "compile":  # which says how long it took
        _set_up_jax()
    try:
        _join()
        _MODES[MODE.value]()
    except UserError as error:
        return _error(error, 2)
    except ProcessLost as error:
        return _error(error, 1)
    except TrainingDiverged as error:
        return _error(error, 3)
    except Preempted as error:
        return _error(error, 75)
    except KeyboardInterrupt:  # at once: the second one, or before there was anything to save
        return _error("interrupted", 130)
    except Exception:
        processes.wait_for_news()  # a lost process is the reason, and says so in one line
        if processes.count() > 1:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            processes.leave(1, "see its traceback")
        raise
    processes.leave(0)
    return 0


if __name__ == "__main__":
    malloc.use_huge_pages()
    signal.signal(signal.SIGTERM, _asked_to_stop)
    _quiet_orbax()
    try:
        app.run(main, flags_parser=_parse)
    except BrokenPipeError:  # what reads our output has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    finally:
        # The exit code is settled; Python would let a SIGTERM change it while it cleans up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
