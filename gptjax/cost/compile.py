"""Compiles the train step of an experiment for another machine, and reports the cost of the step.

Neither an accelerator nor data is needed, because state and batch are shapes without values.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import tempfile
import time
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.config import schema
from gptjax.cost import hardware, step_spec
from gptjax.cost.hlo import collectives, parse, peak_memory
from gptjax.cost.hlo import flops as flops_lib
from gptjax.cost.step_spec import StepSpec
from gptjax.errors import UserError, brief, require
from gptjax.io import console
from gptjax.model import flops

EXAMPLES = "v5e:4x4, 2xv5e:16x16 (two slices), v6e:2x2, v4:2x2x1, v5p:2x2x2, cpu:8"

# Settings of libtpu, Google's library for TPUs. Without them libtpu asks the metadata server of a
# cloud machine for the type of the machine, and waits long if there is no such server.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Other processes can load libtpu too. Nothing runs on the chips of this machine here, so a
    # training run can use them at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_MOST_CPUS = 1024
_MOST_SLICES = 64
# Name of a use of memory in the report -> its name in the statistics of a compiled program.
_MEMORY = {
    "arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp",
    "code": "generated_code",
}  # fmt: skip
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Target:
    """The machine to compile for."""

    topology: str
    devices: list[Any]
    chip: hardware.Chip | None
    """The published figures of the devices; None means a CPU."""


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """The compiled step, or the compiler's message that the step needs too much memory."""

    compiled: jax.stages.Compiled | None
    """The compiled step; None means that the compiler rejected the step."""
    seconds: float
    """Seconds of tracing and compilation."""
    peak_buffers: dict[str, Any] | None
    """The buffers in memory at the peak, from `peak_memory.largest`."""
    refusal: str
    """The first line of the compiler's message; "" means that the compiler accepted the step."""


def run(
    experiment: schema.Experiment, topology: str, stage: str, output: str = ""
) -> dict[str, Any]:
    """Compiles the train step of a stage for a topology, and prints and returns the report.

    Args:
      experiment: the configuration. The data that it names is not opened.
      topology: the machine, such as "v5e:4x4", "2xv5e:4x4" (two slices) or "cpu:8".
      stage: pretrain or finetune.
      output: a file that the report is also written to; "" means none.

    Raises:
      UserError: the topology is unknown, libtpu is missing, or the configuration does not suit the
        devices.
    """
    experiment = step_spec.validated(experiment, stage)
    found = report(experiment, target_of(topology), stage)
    for line in summary(found):
        console.say(line)
    console.print_json(found, output)
    return found


def report(experiment: schema.Experiment, target: Target, stage: str) -> dict[str, Any]:
    """Compiles the train step of a stage and returns the report.

    Args:
      experiment: an experiment that `step_spec.validated` returned.
      target: the machine to compile for.
      stage: pretrain or finetune.
    """
    mesh = mesh_lib.make_mesh(experiment.mesh, target.devices)
    spec = step_spec.build(experiment, stage, mesh)
    rows, length = spec.batch.tokens.shape
    kind = target.devices[0].device_kind
    console.say(f"{target.topology}: {mesh.size} x {kind}, {stage}, {rows} x {length} tokens")
    state_like = step_spec.abstract_state(spec, mesh)
    result = _compile(spec, state_like, mesh)
    console.say(f"compiled in {result.seconds:.1f} s" if result.compiled else result.refusal)
    return {
        "topology": target.topology,
        "devices": mesh.size,
        "device_kind": kind,
        "mesh": dict(mesh.shape),
        "stage": stage,
        "model": schema.to_dict(spec.model.config),
        "vocab_size": spec.model.config.vocab_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state_like.params)),
        "batch": {"rows": rows, "row_length": length, "tokens": rows * length},
        "assumed": spec.assumed,
        **_costs(spec, state_like, result, mesh, target.chip),
        "compile_seconds": result.seconds,
    }


def summary(found: dict[str, Any], lines: int = 8) -> list[str]:
    """Returns the main facts of a report as lines of text.

    Args:
      found: the result of `report`.
      lines: the largest number of buffers, and of collectives, that are listed.
    """
    peak = found["peak_memory_bytes_per_device"]
    fits = {True: "fits", False: "does not fit", None: "of a CPU"}[found["fits"]]
    text = [f"memory of a device: {peak / 2**30:.2f} GiB ({fits})" if peak else fits]
    if found["largest_buffers"]:
        text += ["the largest buffers at the peak:"]
        text += [peak_memory.summary(entry) for entry in found["largest_buffers"][:lines]]
    if found["communication"]:
        text += ["communication of a step:"]
        text += [collectives.summary(entry) for entry in found["communication"][:lines]]
    if found["step_seconds"]:
        parts = found["estimate"]
        text += [
            f"estimate, not a measurement: step {found['step_seconds'] * 1e3:.1f} ms (compute "
            f"{parts['compute_seconds'] * 1e3:.1f}, memory {parts['memory_seconds'] * 1e3:.1f}, "
            f"communication not hidden {parts['exposed_communication_seconds'] * 1e3:.1f}), "
            f"{found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.0%}"
        ]
    return text


def target_of(topology: str) -> Target:
    """Returns the machine that a topology names.

    Raises:
      UserError: the topology is unknown, libtpu is missing, or Google publishes no figure of the
        network between the slices.
    """
    many, kind, sizes = re.findall(r"^(?:(\d+)x)?([^:]*):?(.*)", topology)[0]
    wanted = f"`topology`={topology}: must be like {EXAMPLES}"
    # JAX must not take the accelerators of this machine, because other programs might use them.
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu" and not many:
        require(sizes.isdecimal() and 0 < int(sizes) <= _MOST_CPUS, wanted)
        return Target(topology, _cpus(int(sizes)), None)
    require(kind in hardware.CHIPS, wanted)
    torus = r"\d+x\d+" if kind in ("v5e", "v6e") else r"\d+x\d+x\d+"
    slices = int(many or 1)
    require(re.fullmatch(torus, sizes) and 0 < slices <= _MOST_SLICES, wanted)
    require(
        slices == 1 or hardware.CHIPS[kind].network_bytes_per_second,
        f"`topology`={topology}: Google publishes no figure of the network between {kind} slices; "
        f"give one slice, {kind}:{sizes}",
    )
    require(
        importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH"),
        f"`topology`={topology}: needs libtpu: pip install -r requirements-tpu.txt",
    )
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # In a slice of 2 x 2 chips or more, each host has 2 x 2 chips. A smaller slice belongs to one
    # host.
    bounds = [min(2, int(size)) for size in sizes.split("x")[:2]] + [1]
    options: dict[str, Any] = {"chips_per_host_bounds": bounds}
    if slices > 1:
        options["num_slices"] = slices
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device
    try:
        found = topologies.get_topology_desc(f"{kind}:{sizes}", "tpu", **options)
    # Catches every exception, because a broken libtpu can raise other errors than JaxRuntimeError.
    except Exception as error:
        raise UserError(f"{wanted} ({brief(error)})") from error
    return Target(topology, found.devices, hardware.CHIPS[kind])


def _cpus(count: int) -> list[Any]:
    # JAX raises RuntimeError if it has already started, because the number is then fixed.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")[:count]
    require(len(devices) == count, f"`topology`=cpu:{count}: JAX runs with {len(devices)} devices")
    return devices


def _compile(spec: StepSpec, state_like: Any, mesh: Mesh) -> CompileResult:
    start = time.perf_counter()
    lowered, compiled, refusal = step_spec.lower(spec, mesh, state_like), None, ""
    with tempfile.TemporaryDirectory(prefix="gptjax-") as folder:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error).splitlines()[0]
        seconds = time.perf_counter() - start
        return CompileResult(compiled, seconds, peak_memory.largest(folder), refusal)


def _costs(
    spec: StepSpec, state_like: Any, result: CompileResult, mesh: Mesh, chip: hardware.Chip | None
) -> dict[str, Any]:
    """Returns the part of the report that depends on the compiled program."""
    rows, length = spec.batch.tokens.shape
    frozen = spec.optimizer.frozen
    per_token = flops.train_flops_per_token(spec.model.config, length, frozen)
    model_flops = per_token * rows * length / mesh.size
    largest = result.peak_buffers or {"bytes": None, "largest": None}
    costs = {"model_flops_per_device": model_flops, "largest_buffers": largest["largest"]}
    if result.compiled is None:
        # Without a program, only the size of the arguments, the compiler's message and the buffers
        # at the peak are known.
        arguments = _bytes_per_device((state_like, spec.batch))
        refused = {
            "peak_memory_bytes_per_device": largest["bytes"]
            or _bytes_required(result.refusal, arguments),
            "memory": {"arguments": arguments, "buffers_at_peak": largest["bytes"]},
            "refused": result.refusal,
            "fits": False,
        }
        return costs | dict.fromkeys(_PROGRAM_FIGURES) | refused
    module = parse.parse(result.compiled.as_text() or "")
    found, traffic = flops_lib.flops_and_bytes(module, module.executions())
    analysis: Any = result.compiled.cost_analysis() or {}
    stats: Any = result.compiled.memory_analysis()
    memory = {use: getattr(stats, f"{name}_size_in_bytes") for use, name in _MEMORY.items()}
    peak = memory["arguments"] + memory["outputs"] - memory["aliased"]
    peak += memory["temporaries"] + memory["code"]
    sent, devices = collectives.find(module), mesh_lib.slice_devices(mesh)
    estimate: dict[str, Any] = dict.fromkeys(_ESTIMATED)
    if chip is not None:
        seconds = collectives.total_and_exposed_seconds(module, sent, devices, chip)
        roof = hardware.roofline(chip, max(found, model_flops), traffic, *seconds)
        estimate = _estimate(chip, roof, model_flops, rows * length)
    return costs | {
        "flops_per_device": found,
        "bytes_per_device": traffic,
        "loops_counted_once": module.unknown_loops(),
        "xla_cost_analysis": {  # XLA's own sums count the body of a loop only once
            "flops_loops_once": analysis.get("flops"),
            "bytes_loops_once": analysis.get("bytes accessed"),
        },
        "peak_memory_bytes_per_device": peak,
        "memory": memory | {"buffers_at_peak": largest["bytes"]},
        "fits": None if chip is None else peak <= chip.memory_bytes,
        "collectives": collectives.totals(sent),
        "communication": collectives.entries(module, sent, devices, chip),
        **estimate,
    }


# The entries of the report that are None for a CPU.
_ESTIMATED = ("step_seconds", "tokens_per_second", "mfu")
# The entries of the report that are None if the compiler rejected the program.
_PROGRAM_FIGURES = (
    "flops_per_device", "bytes_per_device", "collectives", "communication", *_ESTIMATED,
)  # fmt: skip


def _estimate(
    chip: hardware.Chip, roof: hardware.Roofline, model_flops: float, tokens: int
) -> dict[str, Any]:
    """Returns step time, speed and MFU (model FLOPs utilisation), computed with the roofline."""
    return {
        "step_seconds": roof.step_seconds,
        "tokens_per_second": tokens / roof.step_seconds,
        "mfu": model_flops / roof.step_seconds / chip.flops_per_second,
        "estimate": {
            "of": "step_seconds, tokens_per_second, mfu: a roofline and the communication that "
            "nothing hides, not a measurement; latencies and imperfect kernels come on top",
            **dataclasses.asdict(roof),
            **dataclasses.asdict(chip),
        },
    }


def _bytes_per_device(tree: Any) -> int:
    """Returns the bytes that a tree of sharded arrays occupies on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _bytes_required(refusal: str, arguments: int) -> int | None:
    """Returns the bytes that a rejected program needs, read from libtpu's message.

    The message has one of two forms. The number after "Used " includes the arguments of the
    program. The number after "temporaries (" does not, so the arguments are added.

    Args:
      refusal: the message.
      arguments: bytes of the arguments.

    Returns:
      The bytes, or None if the message has neither form.

    >>> _bytes_required("the total memory required for HLO temporaries (1.50G) exceeds", 2**30)
    2684354560
    """
    found = re.search(r"(temporaries \(|Used )([\d.]+)([KMGT]?)", refusal)
    if not found:
        return None
    size = int(float(found[2]) * _UNITS[found[3]])
    return size if found[1] == "Used " else arguments + size
