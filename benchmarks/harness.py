"""Runs the variants in rounds: each round runs every variant once, in a process of its own.

The order of the variants is reversed in every second round. A machine that becomes slower, or is
busy for a while, then favours no variant.
"""

import dataclasses
import fnmatch
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from benchmarks.sizes import SIZES
from gptjax.config.schema import split_names
from gptjax.errors import UserError, nearest, require

WORKER = pathlib.Path(__file__).with_name("worker.py")
RESULTS = pathlib.Path(__file__).with_name("results")

# Name of an allocator setting -> its value of GLIBC_TUNABLES: the C library's defaults, the setting
# of gptjax itself, and all settings that make a variant faster.
ALLOCATORS = {
    "system": "",
    "huge_pages": "glibc.malloc.hugetlb=1",
    "tuned": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:"
    "glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456",
}
OURS_LAUNCHES_WITH = "huge_pages"
_CEILINGS = ("jax", "torch")

# The benchmarks do not use absl's global flags. gptjax defines flags of the same names there, and
# the tests load both.
FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "size", "gpt1", f"Of the model (and batch): {', '.join(SIZES)}.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "steps", 5, "Timed repetitions in every process, after the warm-up.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "rounds", 3, "Times that every variant is run, in a new process each.", flag_values=FLAGS
)
flags.DEFINE_string(
    "only", "",
    "Comma-separated: names of variants, or parts of one (pytorch), or patterns (ours-*/tuned); "
    "empty: all of them.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "allocators", "huge_pages",
    f"Comma-separated, of {', '.join(ALLOCATORS)}: the C library's memory that variants run with; "
    "all: each of them.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "output", str(RESULTS), "Folder for the table, the JSON and the plot.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "timeout", 1800, "Seconds after which a worker is stopped.", lower_bound=1, flag_values=FLAGS
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """An implementation with its settings, to be measured."""

    name: str
    """IMPLEMENTATION-DTYPE[-MORE]/ALLOCATOR"""
    spec: dict[str, Any]
    """The argument of the worker."""
    allocator: str = "system"


@dataclasses.dataclass
class Result:
    """The measurements of a variant."""

    variant: Variant
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One for each round."""
    error: str = ""
    """The reason why a worker died. The variant runs in no further round then."""


def chosen_allocators() -> list[str]:
    """Returns the names that --allocators asks for."""
    names = list(split_names(FLAGS.allocators))
    if names == ["all"]:
        return list(ALLOCATORS)
    for name in names:
        require(
            name in ALLOCATORS,
            f"--allocators={name}: must be of {', '.join(ALLOCATORS)} or all"
            f"{nearest(name, ALLOCATORS)}",
        )
    require(names, "--allocators: give at least one")
    return names


def variants(task: str, cases: dict[str, dict[str, Any]], common: dict[str, Any]) -> list[Variant]:
    """Returns the cases with each allocator, if --only asks for them.

    Args:
      task: the task of the worker.
      cases: name -> the part of the spec that belongs to this case.
      common: the part of the spec that all cases share.
    """
    every = [
        Variant(f"{name}/{allocator}", {"task": task, **common, **own}, allocator)
        for allocator in chosen_allocators()
        for name, own in cases.items()
    ]
    wanted = split_names(FLAGS.only)
    for pattern in wanted:
        require(
            any(_matches(each.name, pattern) for each in every),
            f"--only={pattern}: no such variant{nearest(pattern, cases)}; there are "
            f"{', '.join(cases)}, each with /{' /'.join(chosen_allocators())}",
        )
    return [v for v in every if not wanted or any(_matches(v.name, each) for each in wanted)]


def _matches(name: str, pattern: str) -> bool:
    """Returns whether a pattern is the name, its part before the slash or dash, or matches it."""
    case = name.rpartition("/")[0]
    return pattern in (name, case, case.partition("-")[0]) or fnmatch.fnmatch(name, pattern)


def ceilings() -> list[Variant]:
    """Returns the variants that measure matrix products: both libraries in both dtypes."""
    return [
        Variant(f"{library}-{dtype}", {"task": "ceiling", "implementation": library,
                "dtype": dtype}, OURS_LAUNCHES_WITH)
        for library in _CEILINGS
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip


def run(
    every: Sequence[Variant],
    rounds: int,
    save: Callable[[list[Result]], None],
    timeout: float,
) -> list[Result]:
    """Runs every variant once in each round.

    Args:
      every: the variants.
      rounds: number of rounds, at least 1.
      save: called with all results after each round. A run that is stopped keeps these results.
      timeout: the most seconds of a worker.
    """
    require(rounds > 0, f"--rounds={rounds}: must be greater than 0")
    results = [Result(variant) for variant in every]
    # The cache of compiled programs is new, so that only the first round compiles, and always does.
    with tempfile.TemporaryDirectory(prefix="benchmark-") as caches:
        for number in range(rounds):
            for result in results if number % 2 == 0 else results[::-1]:
                if not result.error:
                    _run_once(result, pathlib.Path(caches), timeout)
                    _say(number + 1, rounds, result)
            save(results)
    return results


def _run_once(result: Result, caches: pathlib.Path, timeout: float) -> None:
    variant = result.variant
    # Each variant has a cache of its own. With a common one only the first variant would compile.
    cache = caches / variant.name.replace("/", "_")
    spec = {**variant.spec, "started": time.time()}
    before = os.getloadavg()[0]
    command = [sys.executable, str(WORKER), json.dumps(spec)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False,
            env=_environment(variant.allocator, cache),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        result.error = f"took more than {timeout:g} seconds"
        return
    if done.returncode:
        result.error = _reason(done)
        return
    record = json.loads(done.stdout.strip().splitlines()[-1])
    record["process_seconds"] = time.time() - spec["started"]
    record["load_before"] = before
    result.records.append(record)


def _environment(allocator: str, cache: pathlib.Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if ALLOCATORS[allocator]:
        environment["GLIBC_TUNABLES"] = ALLOCATORS[allocator]
    return environment | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    """Returns the reason why a worker died, in one line."""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0] and line[0] != " "]
    return (errors or lines or [f"exit code {done.returncode}"])[-1].strip()[:300]


def _say(number: int, rounds: int, result: Result) -> None:
    text = result.error or f"{result.records[-1]['process_seconds']:.1f} s"
    print(f"round {number}/{rounds}  {result.variant.name}  {text}", file=sys.stderr, flush=True)


def command(main: Callable[[], None]) -> None:
    """Runs a benchmark as a program; prints one line and exits with 2 for wrong flags or files."""

    if {"--help", "-h"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__, FLAGS.get_help(), sep="\n")
        sys.exit(0)
    try:
        rest = FLAGS(sys.argv)[1:]
        require(not rest, f"{' '.join(rest)}: unexpected argument; flags begin with --")
        main()
    except (UserError, flags.Error) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)
