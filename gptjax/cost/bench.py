"""What an experiment would run, timed on this machine: its train step, generation, or its input.

Steps and generation run on synthetic tokens, so no data is needed; input is the experiment's own.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.config import schema, validation
from gptjax.config.schema import BenchKind, Experiment, MeshConfig, Stage
from gptjax.cost import step_spec
from gptjax.cost.step_spec import Plan
from gptjax.errors import require
from gptjax.infer import decoder as decoder_lib
from gptjax.infer import generate
from gptjax.infer.generate import Sampling
from gptjax.io import console, files
from gptjax.model import flops, gpt
from gptjax.train import run as run_lib

PROMPT_TOKENS = 16
# Timed where the number is left to us; batches of input are cheap, and one alone tells little.
_STEPS: dict[str, int] = {BenchKind.TRAIN: 10, BenchKind.GENERATE: 10, BenchKind.INPUT: 100}
# The first runs touch their memory for the first time.
_WARMUP: dict[str, int] = {BenchKind.TRAIN: 2, BenchKind.GENERATE: 1, BenchKind.INPUT: 8}
# No folder of a run: the tokenizer is that of the experiment, not of what lies around.
_NO_WORKDIR = os.devnull


@dataclasses.dataclass(frozen=True)
class Request:
    """What is timed."""

    what: str = BenchKind.TRAIN
    stage: str = Stage.PRETRAIN
    steps: int = 0
    """Steps, calls or batches that are timed, after the warm-up; 0: 10 (100 batches of input)."""
    max_new_tokens: int = 100
    """Of a call of `generate`."""
    num_samples: int = 1
    profile: int = 0
    """Steps or calls to trace with JAX's profiler, after the timed ones; 0: none."""
    profile_folder: str = ""
    """Where the trace goes."""

    def __post_init__(self) -> None:
        kinds = tuple(BenchKind)
        require(self.what in kinds, f"`bench`={self.what}: must be one of {', '.join(kinds)}")
        require(
            self.stage in step_spec.STAGES,
            f"`stage`={self.stage}: must be one of {', '.join(step_spec.STAGES)}",
        )
        require(self.steps >= 0, f"`steps`={self.steps}: must not be negative")
        require(
            self.max_new_tokens > 1,
            f"`max_new_tokens`={self.max_new_tokens}: must be greater than 1; the first is timed "
            "apart",
        )
        require(self.num_samples > 0, f"`num_samples`={self.num_samples}: must be greater than 0")
        require(
            self.profile == 0 or self.what != BenchKind.INPUT,
            f"`profile`={self.profile}: traces a device, which `bench`=input does not use",
        )

    @property
    def timed(self) -> int:
        """How many are timed."""
        return self.steps or _STEPS[self.what]


def run(experiment: Experiment, request: Request, output: str = "") -> dict[str, Any]:
    """Times what the request asks for; prints and returns the report.

    Args:
      experiment: the configuration; only `input` opens the data that it names.
      request: what to time.
      output: a file that gets the report too.

    Raises:
      UserError: a configuration that does not fit this machine's devices, or wrong data.
    """
    measure: dict[str, Callable[[Experiment, Request], dict[str, Any]]] = {
        BenchKind.TRAIN: _train,
        BenchKind.GENERATE: _generate,
        BenchKind.INPUT: _input,
    }
    report = {
        "bench": request.what,
        **measure[request.what](experiment, request),
        "steps": request.timed,
        "warmup_steps": _WARMUP[request.what],
        "machine": mesh_lib.describe_machine(),
        "allocator": os.environ.get("GLIBC_TUNABLES", ""),
    }
    console.print_json(report, output)
    return report


def sequence_length(plan: Plan) -> int:
    """Returns the tokens of each sequence of a synthetic batch: as long as they may be."""
    length = plan.batch.tokens.shape[1]
    candidates = 1 if plan.batch.extract is None else plan.batch.extract.shape[2]
    return min(plan.model.config.context_length, length // candidates)


def synthetic_batch(plan: Plan) -> Batch:
    """Returns a host batch of the plan's shapes: rows of random tokens, filled with examples."""
    rng = np.random.default_rng(0)
    (rows, length), part = plan.batch.tokens.shape, sequence_length(plan)
    index, sequences, examples = np.arange(length), length // part, 0
    if plan.batch.extract is not None:
        _, slots, candidates = plan.batch.extract.shape
        examples = min(slots, sequences // candidates)
        sequences = examples * candidates
    filled = index < sequences * part

    def every_row(row: np.ndarray, dtype: Any = np.int32) -> np.ndarray:
        return np.tile((row * filled).astype(dtype), (rows, 1))

    tokens = rng.integers(plan.model.config.vocab_size, size=(rows, length))
    batch = Batch(
        (tokens * filled).astype(np.int32), every_row(index // part + 1), every_row(index % part),
        every_row(0 * index), every_row(index % part < part - 1, np.float32),
    )  # fmt: skip
    if plan.batch.extract is None:
        return batch
    mask = np.tile(np.arange(slots) < examples, (rows, 1)).astype(np.float32)
    extract = (np.arange(slots * candidates).reshape(slots, candidates) + 1) * part - 1
    labels = rng.integers(max(plan.model.num_outputs, candidates), size=(rows, slots))
    return batch.replace(  # type: ignore[attr-defined]
        extract=(extract * mask[..., None]).astype(np.int32),
        candidate_mask=np.repeat(mask[..., None], candidates, axis=2),
        example_mask=mask,
        labels=labels.astype(plan.batch.labels.dtype),
    )


def model_flops_per_token(plan: Plan) -> float:
    """Returns the operations of training on one token, as `gptjax.model.flops` counts them.

    The task head's few are left out; so is the LM head where the LM loss has no weight.
    """
    config = plan.model.config
    counted = flops.train_flops_per_token(config, sequence_length(plan))
    if not plan.objective.lm_weight:
        counted -= 3 * 2 * config.width * config.vocab_size
    return counted


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Without the persistent cache: how long a compilation takes, not how long a file's reading."""
    kept = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def _compile(plan: Plan, mesh: Mesh) -> tuple[Callable[..., Any], float]:
    """The compiled train step, and the seconds that tracing and compiling it took."""
    start = time.perf_counter()
    with _nothing_kept():
        lowered = step_spec.lower(plan, mesh, step_spec.abstract_state(plan, mesh))
        compiled = lowered.compile()
    return compiled, time.perf_counter() - start


def _times(run_once: Callable[[], Any], request: Request) -> np.ndarray:
    """Seconds of each timed run, each waited for; the warm-up's are left out."""
    seconds = []
    for _ in range(_WARMUP[request.what] + request.timed):
        start = time.perf_counter()
        jax.block_until_ready(run_once())
        seconds.append(time.perf_counter() - start)
    return np.array(seconds[_WARMUP[request.what] :])


def _trace(run_once: Callable[[], Any], request: Request) -> None:
    """Writes a trace of some more runs, if asked for one: tracing would slow the timed ones."""
    if not request.profile:
        return
    with files.disk_errors(request.profile_folder), jax.profiler.trace(request.profile_folder):
        for _ in range(request.profile):
            jax.block_until_ready(run_once())
    calls = "steps" if request.what == BenchKind.TRAIN else "calls"
    console.say(f"trace of {request.profile} {calls} -> {request.profile_folder}")


def _train(experiment: Experiment, request: Request) -> dict[str, Any]:
    """Train steps one by one, each with the batch's way to the devices."""
    experiment = step_spec.validated(experiment, request.stage)
    mesh = mesh_lib.make_mesh(experiment.mesh)
    plan = step_spec.build(experiment, request.stage, mesh)
    batch = synthetic_batch(plan)
    rows, length = batch.tokens.shape
    console.say(f"{request.stage}: compiling the step of {rows} x {length} tokens")
    compiled, compile_seconds = _compile(plan, mesh)
    console.say(f"compiled in {compile_seconds:.1f} s; timing {request.timed} steps")
    train_state = step_spec.new_state(plan, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(train_state.params))

    def step() -> Any:
        nonlocal train_state
        placed = mesh_lib.to_devices(batch, mesh)
        train_state, output = compiled(train_state, placed, np.uint32(0))
        return train_state, output

    seconds = _times(step, request)
    peak = _peak_memory()  # before the ceiling's matrices
    _trace(step, request)
    tokens = int((batch.segment_ids > 0).sum())
    return {
        "stage": request.stage,
        **_model(plan, mesh),
        "parameters": parameters,
        "batch": {"rows": rows, "row_length": length, "tokens": tokens,
                  "sequence_length": sequence_length(plan),
                  "accumulation": plan.optimizer.accumulation},
        "optimizer": schema.to_dict(plan.optimizer),
        **_speed(seconds, tokens, model_flops_per_token(plan) * tokens, plan, mesh),
        "compile_seconds": compile_seconds,
        **peak,
    }  # fmt: skip


def _speed(
    seconds: np.ndarray, tokens: int, operations: float, plan: Plan, mesh: Mesh
) -> dict[str, Any]:
    """Speed by the median step, and its share of what this machine's products reach."""
    median, dtype = float(np.median(seconds)), plan.model.config.dtype
    # Virtual CPU devices share the cores that one device's products already use in full.
    devices = 1 if mesh_lib.platform(mesh) == "cpu" else mesh.size
    ceiling = flops.matmul_ceiling(dtype) * devices
    return {
        "tokens_per_second": tokens / median,
        "step_ms_median": 1e3 * median,
        "step_ms_p90": 1e3 * float(np.percentile(seconds, 90)),
        "flops_per_step": operations,
        "flops_per_second": operations / median,
        "mfu": operations / median / ceiling,
        "mfu_against": {
            "flops_per_second": ceiling,
            "of": f"the best of several square {dtype} products on this machine, measured after "
            f"the steps, times {devices}; not the maker's figure",
        },
    }


def _model(plan: Plan, mesh: Mesh) -> dict[str, Any]:
    return {
        "model": schema.to_dict(plan.model.config),
        "vocab_size": plan.model.config.vocab_size,
        "assumed": plan.assumed,
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "device_kind": mesh.devices.flat[0].device_kind,
    }


def _peak_memory() -> dict[str, Any]:
    """Bytes of the fullest device, or of this process where devices do not say (null: nor it)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        return {"peak_memory_bytes": max(peaks), "peak_memory_of": "the fullest device"}
    peak = None
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"VmHWM:\s*(\d+) kB", text):
            peak = int(found[1]) * 1024
    return {"peak_memory_bytes": peak, "peak_memory_of": "the process, compiler included"}


def _generate(experiment: Experiment, request: Request) -> dict[str, Any]:
    """Whole calls of `generate` on the first device, as a loaded checkpoint makes them."""
    stage = request.stage
    if getattr(experiment, stage) is None:  # either has the same decoder
        stage = next(name for name in step_spec.STAGES if name != stage)
    experiment = step_spec.validated(experiment, stage)
    mesh = mesh_lib.make_mesh(MeshConfig(), jax.local_devices()[:1])
    plan = step_spec.build(experiment, stage, mesh)
    vocabulary = plan.model.config.vocab_size
    params = jax.jit(lambda key: gpt.init_params(plan.model, key))(jax.random.key(0))
    decoder = decoder_lib.prepare(plan.model, params)
    prompt = np.random.default_rng(0).integers(vocabulary, size=PROMPT_TOKENS, dtype=np.int32)

    def call(tokens: int) -> np.ndarray:
        return generate.generate(
            decoder, prompt, tokens, request.num_samples, Sampling(), 0, np.zeros(vocabulary, bool)
        )  # fmt: skip

    console.say(
        f"generate: {request.num_samples} x {request.max_new_tokens} tokens, {request.timed} times"
    )
    first = float(np.median(_times(lambda: call(1), request)))
    seconds = _times(lambda: call(request.max_new_tokens), request)
    median = float(np.median(seconds))
    peak = _peak_memory()
    _trace(lambda: call(request.max_new_tokens), request)
    return {
        **_model(plan, mesh),
        "prompt_tokens": PROMPT_TOKENS,
        "max_new_tokens": request.max_new_tokens,
        "num_samples": request.num_samples,
        "tokens_per_second": request.num_samples * request.max_new_tokens / median,
        "first_token_ms": 1e3 * first,
        "ms_per_token": 1e3 * float(np.median(seconds - first)) / (request.max_new_tokens - 1),
        "call_ms_median": 1e3 * median,
        "call_ms_p90": 1e3 * float(np.percentile(seconds, 90)),
        **peak,
    }


def _input(experiment: Experiment, request: Request) -> dict[str, Any]:
    """Batches as the training loop gets them, with nothing else to wait for."""
    experiment = validation.validate(experiment)
    require(
        getattr(experiment, request.stage),
        f"`stage`={request.stage}: the experiment has no {request.stage} part",
    )
    mesh = mesh_lib.make_mesh(experiment.mesh)
    console.say(f"{request.stage}: loading the data")
    start = time.perf_counter()
    _, model, stages = run_lib.prepare(experiment, _NO_WORKDIR, mesh)
    stage = next(each for each in stages if each.name == request.stage)
    load_seconds = time.perf_counter() - start
    console.say(f"loaded in {load_seconds:.1f} s; timing {request.timed} batches")
    warmup = _WARMUP[request.what]
    begun = time.perf_counter()
    batches = stage.batches.iterate(0, warmup + request.timed)
    first = next(batches)
    first_seconds = time.perf_counter() - begun
    # More than are prefetched: those that lie ready would make it look faster than it is.
    for _ in range(warmup - 1):
        next(batches)
    begun, tokens = time.perf_counter(), 0
    for batch in batches:
        tokens += int((batch.segment_ids > 0).sum())
    seconds = time.perf_counter() - begun
    rows, length = first.tokens.shape
    return {
        "stage": request.stage,
        "batch": {"rows": rows, "row_length": length, "tokens": tokens / request.timed},
        "vocab_size": model.vocab_size,
        "mesh": dict(mesh.shape),
        "batches_per_second": request.timed / seconds,
        "tokens_per_second": tokens / seconds,
        "load_seconds": load_seconds,
        "first_batch_seconds": first_seconds,
    }
