"""Compiles the train step of an experiment for machines that are not there, and says what it costs.

No accelerator is needed and no data is read: the step, its state and its batch are abstract.
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
from gptjax.config.schema import Experiment
from gptjax.cost import hardware, step_spec
from gptjax.cost.hlo import collectives, parse, peak_memory
from gptjax.cost.hlo import flops as flops_lib
from gptjax.cost.step_spec import Plan
from gptjax.errors import UserError, brief, require
from gptjax.io import console
from gptjax.model import flops

EXAMPLES = "v5e:4x4, 2xv5e:16x16 (two slices), v6e:2x2, v4:2x2x1, v5p:2x2x2, cpu:8"

# libtpu asks a cloud machine's metadata server what it runs on, and waits where there is none.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # It only compiles: a training on this machine may hold the chips meanwhile.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_MOST_CPUS = 1024
_MOST_SLICES = 64
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is compiled for."""

    topology: str
    devices: list[Any]
    chip: hardware.Chip | None
    """Published figures; None: a CPU."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The compiled step; or None, and why the compiler refused it for want of memory."""

    compiled: jax.stages.Compiled | None
    seconds: float
    held: dict[str, Any] | None
    """The buffers of the peak, from `buffers.largest`."""
    refusal: str = ""


def run(experiment: Experiment, topology: str, stage: str, output: str = "") -> dict[str, Any]:
    """Compiles the train step of a stage for a topology; prints and returns the report.

    Args:
      experiment: the configuration; files of text and data sets that it names are not opened.
      topology: "v5e:4x4", "2xv5e:4x4" (two slices), "cpu:8", ...
      stage: pretrain or finetune.
      output: a file that gets the report too.

    Raises:
      UserError: an unknown topology, no libtpu, or a configuration that does not fit it.
    """
    experiment = step_spec.validated(experiment, stage)
    found = report(experiment, machine(topology), stage)
    for line in summary(found):
        console.say(line)
    console.print_json(found, output)
    return found


def machine(topology: str) -> Machine:
    """Returns the devices of a topology and their chip, as `devices_of`."""
    return Machine(topology, *devices_of(topology))


def report(experiment: Experiment, target: Machine, stage: str) -> dict[str, Any]:
    """Returns what the train step of a stage of a validated experiment costs."""
    mesh = mesh_lib.make_mesh(experiment.mesh, target.devices)
    plan = step_spec.build(experiment, stage, mesh)
    rows, length = plan.batch.tokens.shape
    kind = target.devices[0].device_kind
    console.say(f"{target.topology}: {mesh.size} x {kind}, {stage}, {rows} x {length} tokens")
    state_like = step_spec.abstract_state(plan, mesh)
    outcome = _compile(plan, state_like, mesh)
    console.say(f"compiled in {outcome.seconds:.1f} s" if outcome.compiled else outcome.refusal)
    return {
        "topology": target.topology,
        "devices": mesh.size,
        "device_kind": kind,
        "mesh": dict(mesh.shape),
        "stage": stage,
        "model": schema.to_dict(plan.model.config),
        "vocab_size": plan.model.config.vocab_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state_like.params)),
        "batch": {"rows": rows, "row_length": length, "tokens": rows * length},
        "assumed": plan.assumed,
        **_costs(plan, state_like, outcome, mesh, target.chip),
        "compile_seconds": outcome.seconds,
    }


def summary(found: dict[str, Any], lines: int = 8) -> list[str]:
    """Returns the largest buffers and collectives of a report, and its estimates, as lines."""
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


def devices_of(topology: str) -> tuple[list[Any], hardware.Chip | None]:
    """Returns the devices of a topology, and their published figures (None: a CPU).

    Raises:
      UserError: libtpu is missing, or does not know the topology.
    """
    many, kind, sizes = re.findall(r"^(?:(\d+)x)?([^:]*):?(.*)", topology)[0]
    wanted = f"`topology`={topology}: must be like {EXAMPLES}"
    # The devices of this machine are not used: they may be busy.
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu" and not many:
        require(sizes.isdecimal() and 0 < int(sizes) <= _MOST_CPUS, wanted)
        return _cpus(int(sizes)), None
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

    # A host holds 2 x 2 chips of a larger slice; a smaller one is a part of a host.
    bounds = [min(2, int(size)) for size in sizes.split("x")[:2]] + [1]
    options: dict[str, Any] = {"chips_per_host_bounds": bounds}
    if slices > 1:
        options["num_slices"] = slices
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device
    try:
        found = topologies.get_topology_desc(f"{kind}:{sizes}", "tpu", **options)
    except Exception as error:  # JaxRuntimeError, and what a broken libtpu may raise
        raise UserError(f"{wanted} ({brief(error)})") from error
    return found.devices, hardware.CHIPS[kind]


def _cpus(count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # JAX runs already: it has what it has
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")[:count]
    require(len(devices) == count, f"`topology`=cpu:{count}: JAX runs with {len(devices)} devices")
    return devices


def _compile(plan: Plan, state_like: Any, mesh: Mesh) -> Outcome:
    start = time.perf_counter()
    lowered = step_spec.lower(plan, mesh, state_like)
    with tempfile.TemporaryDirectory(prefix="gptjax-") as folder:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal, seconds = str(error).splitlines()[0], time.perf_counter() - start
            return Outcome(None, seconds, peak_memory.largest(folder), refusal)
        seconds = time.perf_counter() - start
        return Outcome(compiled, seconds, peak_memory.largest(folder))


def _costs(
    plan: Plan, state_like: Any, outcome: Outcome, mesh: Mesh, chip: hardware.Chip | None
) -> dict[str, Any]:
    """The part of the report that depends on what was compiled."""
    rows, length = plan.batch.tokens.shape
    model_flops = flops.train_flops_per_token(plan.model.config, length) * rows * length / mesh.size
    largest = outcome.held or {"bytes": None, "largest": None}
    costs = {"model_flops_per_device": model_flops, "largest_buffers": largest["largest"]}
    if outcome.compiled is None:
        # No program, so no figures of one: what the compiler says of its needs, and what is given.
        held = _held(state_like) + _held(plan.batch)
        return (
            costs
            | dict.fromkeys(_OF_A_PROGRAM)
            | {
                "peak_memory_bytes_per_device": largest["bytes"]
                or _required(outcome.refusal, held),
                "memory": {"arguments": held, "buffers_at_peak": largest["bytes"]},
                "refused": outcome.refusal,
                "fits": False,
            }
        )
    module = parse.parse(outcome.compiled.as_text() or "")
    found, traffic = flops_lib.flops(module), flops_lib.memory_bytes(module)
    analysis = outcome.compiled.cost_analysis() or {}
    memory = _memory(outcome.compiled)
    peak = memory["arguments"] + memory["outputs"] - memory["aliased"]
    peak += memory["temporaries"] + memory["code"]
    sent, devices = collectives.find(module), mesh_lib.slice_devices(mesh)
    roof, communication = None, 0.0
    if chip is not None:
        communication, exposed = collectives.exposed_seconds(module, sent, devices, chip)
        roof = hardware.roofline(chip, max(found, model_flops), traffic, exposed)
    return costs | {
        "flops_per_device": found,
        "bytes_per_device": traffic,
        "loops_counted_once": module.unknown_loops(),
        "xla_cost_analysis": {  # its own sums, which count the body of every loop once
            "flops_loops_once": analysis.get("flops"),
            "bytes_loops_once": analysis.get("bytes accessed"),
        },
        "peak_memory_bytes_per_device": peak,
        "memory": memory | {"buffers_at_peak": largest["bytes"]},
        "fits": None if chip is None else peak <= chip.memory_bytes,
        "collectives": collectives.totals(sent),
        "communication": collectives.listed(module, sent, devices, chip),
        **_estimates(chip, roof, communication, model_flops, rows * length),
    }


_OF_A_PROGRAM = (
    "flops_per_device", "bytes_per_device", "collectives", "communication", "step_seconds",
    "tokens_per_second", "mfu",
)  # fmt: skip


def _estimates(
    chip: hardware.Chip | None,
    roof: hardware.Roofline | None,
    communication: float,
    model_flops: float,
    tokens: int,
) -> dict[str, Any]:
    """Step time, speed and MFU by the roofline; null for a CPU, which has no published figures."""
    if chip is None or roof is None:
        return dict.fromkeys(("step_seconds", "tokens_per_second", "mfu"))
    return {
        "step_seconds": roof.step_seconds,
        "tokens_per_second": tokens / roof.step_seconds,
        "mfu": model_flops / roof.step_seconds / chip.flops_per_second,
        "estimate": {
            "of": "step_seconds, tokens_per_second, mfu: a roofline and the communication that "
            "nothing hides, not a measurement; latencies and imperfect kernels come on top",
            "compute_seconds": roof.compute_seconds,
            "memory_seconds": roof.memory_seconds,
            "communication_seconds": communication,
            "exposed_communication_seconds": roof.exposed_seconds,
            **dataclasses.asdict(chip),
        },
    }


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one device by their use, from XLA's buffer assignment."""
    stats: Any = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }


def _held(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _required(refusal: str, held: int) -> int | None:
    """Bytes that a refused program needs, as libtpu's message says; None where it does not.

    Args:
      refusal: the message.
      held: bytes of the arguments, which one of its two forms leaves out.

    >>> _required("the total memory required for HLO temporaries (1.50G) exceeds", 2**30)
    2684354560
    """
    found = re.search(r"(temporaries \(|Used )([\d.]+)([KMGT]?)", refusal)
    if not found:
        return None
    size = int(float(found[2]) * _UNITS[found[3]])
    return size if found[1] == "Used " else held + size
