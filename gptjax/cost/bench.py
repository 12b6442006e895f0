"""Times the train step, the generation or the input pipeline of an experiment on this machine.

Train steps and generation use random tokens, so they need no data. The input pipeline reads the
experiment's own data.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import time
import timeit
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
from gptjax.cost.step_spec import StepSpec
from gptjax.errors import require
from gptjax.infer import generate
from gptjax.io import console, files
from gptjax.model import flops, gpt
from gptjax.train import run as run_lib

PROMPT_TOKENS = 16
# The default number of timed runs. A run is a train step, a call of `generate` or a batch of the
# input pipeline. A batch takes little time, so more batches are timed.
_STEPS: dict[str, int] = {BenchKind.TRAIN: 10, BenchKind.GENERATE: 10, BenchKind.INPUT: 100}
# The number of runs before the timed runs. The first runs are slower, because the system maps their
# memory.
_WARMUP: dict[str, int] = {BenchKind.TRAIN: 2, BenchKind.GENERATE: 1, BenchKind.INPUT: 8}
# A path that can hold no files, passed as the workdir. With a real workdir, the tokenizer of an
# earlier run could be used.
_NO_WORKDIR = os.devnull


@dataclasses.dataclass(frozen=True)
class Request:
    """The kind of run to time, and the number of runs."""

    what: str = BenchKind.TRAIN
    """The kind of run: train, generate or input."""
    stage: str = Stage.PRETRAIN
    """The stage of the experiment: pretrain or finetune."""
    steps: int = 0
    """Number of timed runs after the warm-up. 0 means 100 for `input`, and 10 for the rest."""
    max_new_tokens: int = 100
    """Number of new tokens in a call of `generate`."""
    num_samples: int = 1
    """Number of texts in a call of `generate`."""
    profile: int = 0
    """Number of runs that JAX's profiler traces after the timed runs. 0 means none."""
    profile_folder: str = ""
    """The folder of the trace."""

    def __post_init__(self) -> None:
        choices = (("bench", self.what, tuple(BenchKind)), ("stage", self.stage, step_spec.STAGES))
        for name, value, known in choices:
            require(value in known, f"`{name}`={value}: must be one of {', '.join(known)}")
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
        """The number of timed runs."""
        return self.steps or _STEPS[self.what]


def run(experiment: Experiment, request: Request, output: str = "") -> dict[str, Any]:
    """Times the runs of a request, and prints and returns the report.

    Args:
      experiment: the configuration. The data that it names is opened only for `input`.
      request: the kind and number of runs.
      output: a file that the report is also written to; "" means none.

    Raises:
      UserError: the configuration does not suit this machine's devices, or the data is wrong.
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


def sequence_length(spec: StepSpec) -> int:
    """Returns the number of tokens of each sequence in a synthetic batch.

    It is the context length or, if that is less, the row length divided by the number of candidates
    of an example.
    """
    length = spec.batch.tokens.shape[1]
    candidates = 1 if spec.batch.extract is None else spec.batch.extract.shape[2]
    return min(spec.model.config.context_length, length // candidates)


def synthetic_batch(spec: StepSpec) -> Batch:
    """Returns a batch with the shapes of `spec`, whose rows are filled with random tokens.

    In fine-tuning, each row has as many examples as fit into the row and into the shapes.
    """
    rng = np.random.default_rng(0)
    (rows, length), part = spec.batch.tokens.shape, sequence_length(spec)
    index, sequences, examples = np.arange(length), length // part, 0
    if spec.batch.extract is not None:
        _, slots, candidates = spec.batch.extract.shape
        examples = min(slots, sequences // candidates)
        sequences = examples * candidates
    filled = index < sequences * part

    def every_row(row: np.ndarray, dtype: Any = np.int32) -> np.ndarray:
        return np.tile((row * filled).astype(dtype), (rows, 1))

    tokens = rng.integers(spec.model.config.vocab_size, size=(rows, length))
    batch = Batch(
        (tokens * filled).astype(np.int32), every_row(index // part + 1), every_row(index % part),
        every_row(0 * index), every_row(index % part < part - 1, np.float32),
    )  # fmt: skip
    if spec.batch.extract is None:
        return batch
    mask = np.tile(np.arange(slots) < examples, (rows, 1)).astype(np.float32)
    extract = (np.arange(slots * candidates).reshape(slots, candidates) + 1) * part - 1
    labels = rng.integers(max(spec.model.num_outputs, candidates), size=(rows, slots))
    hidden = spec.batch.hidden
    if hidden is not None:
        hidden = rng.standard_normal(hidden.shape, np.float32).astype(hidden.dtype)
    return batch.replace(  # type: ignore[attr-defined]
        extract=(extract * mask[..., None]).astype(np.int32),
        candidate_mask=np.repeat(mask[..., None], candidates, axis=2),
        example_mask=mask,
        labels=labels.astype(spec.batch.labels.dtype),
        hidden=hidden,
    )


def model_flops_per_token(spec: StepSpec) -> float:
    """Returns the floating-point operations of training on one token, from `gptjax.model.flops`.

    The operations of the task head are few and are not counted. The operations of the LM head are
    not counted if the weight of the LM loss is 0.
    """
    return flops.train_flops_per_token(
        spec.model.config, sequence_length(spec), spec.optimizer.frozen,
        lm_head=bool(spec.objective.lm_weight),
    )  # fmt: skip


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Switches JAX's persistent cache off. With it, reading a file would be timed instead."""
    kept = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting again only after a reset
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def _compile(spec: StepSpec, mesh: Mesh) -> tuple[Callable[..., Any], float]:
    """Returns the compiled train step, and the seconds of tracing and compilation."""
    start = time.perf_counter()
    with _without_compilation_cache():
        lowered = step_spec.lower(spec, mesh, step_spec.abstract_state(spec, mesh))
        compiled = lowered.compile()
    return compiled, time.perf_counter() - start


def _times(run_once: Callable[[], Any], request: Request) -> np.ndarray:
    """Calls `run_once` for warm-up and timed runs, and returns the seconds of each timed run.

    The time ends when the results of the run have been computed.
    """
    warmup = _WARMUP[request.what]
    runs = warmup + request.timed
    seconds = timeit.repeat(lambda: jax.block_until_ready(run_once()), number=1, repeat=runs)
    return np.array(seconds[warmup:])


def _trace(run_once: Callable[[], Any], request: Request) -> None:
    """Writes a trace of further runs if the request asks for a trace.

    The timed runs are not traced, because tracing would slow them down.
    """
    if not request.profile:
        return
    with files.disk_errors(request.profile_folder), jax.profiler.trace(request.profile_folder):
        for _ in range(request.profile):
            jax.block_until_ready(run_once())
    calls = "steps" if request.what == BenchKind.TRAIN else "calls"
    console.say(f"trace of {request.profile} {calls} -> {request.profile_folder}")


def _train(experiment: Experiment, request: Request) -> dict[str, Any]:
    """Times train steps. The time of a step includes the transfer of the batch to the devices."""
    experiment = step_spec.validated(experiment, request.stage)
    mesh = mesh_lib.make_mesh(experiment.mesh)
    spec = step_spec.build(experiment, request.stage, mesh)
    batch = synthetic_batch(spec)
    rows, length = batch.tokens.shape
    console.say(f"{request.stage}: compiling the step of {rows} x {length} tokens")
    compiled, compile_seconds = _compile(spec, mesh)
    console.say(f"compiled in {compile_seconds:.1f} s; timing {request.timed} steps")
    train_state = step_spec.new_state(spec, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(train_state.params))

    def step() -> Any:
        nonlocal train_state
        placed = mesh_lib.to_devices(batch, mesh)
        train_state, output = compiled(train_state, placed, np.uint32(0))
        return train_state, output

    seconds = _times(step, request)
    # The peak is read before `_speed` allocates large matrices.
    peak = _peak_memory()
    _trace(step, request)
    tokens = int((batch.segment_ids > 0).sum())
    return {
        "stage": request.stage,
        **_model(spec, mesh),
        "parameters": parameters,
        "batch": {"rows": rows, "row_length": length, "tokens": tokens,
                  "sequence_length": sequence_length(spec),
                  "accumulation": spec.optimizer.config.accumulation},
        "optimizer": schema.to_dict(spec.optimizer.config),
        **_speed(seconds, tokens, model_flops_per_token(spec) * tokens, spec, mesh),
        "compile_seconds": compile_seconds,
        **peak,
    }  # fmt: skip


def _speed(
    seconds: np.ndarray, tokens: int, operations: float, spec: StepSpec, mesh: Mesh
) -> dict[str, Any]:
    """Returns the speed of the median step, and its ratio to the fastest matrix product.

    Args:
      seconds: the time of each step.
      tokens: the number of tokens in a step.
      operations: the floating-point operations of a step.
      spec: the train step.
      mesh: the devices.
    """
    median, dtype = float(np.median(seconds)), spec.model.config.dtype
    # Virtual CPU devices share the cores. A matrix product on one of these devices uses all cores,
    # so the measured speed is not multiplied by the number of devices.
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


def _model(spec: StepSpec, mesh: Mesh) -> dict[str, Any]:
    return {
        "model": schema.to_dict(spec.model.config),
        "vocab_size": spec.model.config.vocab_size,
        "assumed": spec.assumed,
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "device_kind": mesh.devices.flat[0].device_kind,
    }


def _peak_memory() -> dict[str, Any]:
    """Returns the peak memory in bytes of the device that used the most memory.

    If the devices do not report this figure, it is the peak of this process. None means that this
    peak is unknown too.
    """
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
    """Times calls of `generate` on the first device of this process."""
    stage = request.stage
    if getattr(experiment, stage) is None:  # the decoder of both stages is the same
        stage = next(name for name in step_spec.STAGES if name != stage)
    experiment = step_spec.validated(experiment, stage)
    mesh = mesh_lib.make_mesh(MeshConfig(), jax.local_devices()[:1])
    spec = step_spec.build(experiment, stage, mesh)
    vocabulary = spec.model.config.vocab_size
    params = jax.jit(lambda key: gpt.init_params(spec.model, key))(jax.random.key(0))
    decoder = generate.prepare(spec.model, params)
    prompt = np.random.default_rng(0).integers(vocabulary, size=PROMPT_TOKENS, dtype=np.int32)

    def call(tokens: int) -> np.ndarray:
        sampler = generate.make_sampler(np.zeros(vocabulary, bool))
        return generate.generate(decoder, prompt, tokens, request.num_samples, sampler)

    console.say(
        f"generate: {request.num_samples} x {request.max_new_tokens} tokens, {request.timed} times"
    )
    first = float(np.median(_times(lambda: call(1), request)))
    seconds = _times(lambda: call(request.max_new_tokens), request)
    median = float(np.median(seconds))
    peak = _peak_memory()
    _trace(lambda: call(request.max_new_tokens), request)
    return {
        **_model(spec, mesh),
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
    """Times the input pipeline of the training loop, without training steps between the batches."""
    experiment = validation.validate(experiment)
    require(
        getattr(experiment, request.stage),
        f"`stage`={request.stage}: the experiment has no {request.stage} part",
    )
    mesh = mesh_lib.make_mesh(experiment.mesh)
    console.say(f"{request.stage}: loading the data")
    start = time.perf_counter()
    _, setup, stages = run_lib.prepare(experiment, _NO_WORKDIR, mesh, run_lib.Options())
    stage = next(each for each in stages if each.name == request.stage)
    load_seconds = time.perf_counter() - start
    console.say(f"loaded in {load_seconds:.1f} s; timing {request.timed} batches")
    warmup = _WARMUP[request.what]
    begun = time.perf_counter()
    batches = stage.batches.iterate(0, warmup + request.timed)
    first = next(batches)
    first_seconds = time.perf_counter() - begun
    # The warm-up uses up the batches that were prefetched before the timed part begins. These
    # batches would seem to take no time.
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
        "vocab_size": setup.model.vocab_size,
        "mesh": dict(mesh.shape),
        "batches_per_second": request.timed / seconds,
        "tokens_per_second": tokens / seconds,
        "load_seconds": load_seconds,
        "first_batch_seconds": first_seconds,
    }
