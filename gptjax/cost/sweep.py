"""Compiles the train step with several batch sizes, meshes and kinds of remat, and ranks them.

Remat (rematerialisation) computes activations again in the backward pass, which saves memory. The
ranking is an estimate from the compiled programs, and no accelerator is needed.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from gptjax import mesh as mesh_lib
from gptjax.config.schema import Experiment, MeshConfig, Remat
from gptjax.cost import compile, step_spec
from gptjax.errors import UserError, brief, require
from gptjax.io import console

Sizes = tuple[int, ...]
"""The sizes of the mesh axes data, fsdp and tensor."""
BATCHES = (1, 2, 4)
"""The multiples of the experiment's own batch size that are tried."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A batch size, a mesh and a kind of remat with which the step is compiled."""

    batch_size: int
    mesh: Sizes
    remat: str

    def needs_less(self, other: "Choice") -> bool:
        """Returns whether its batch is smaller than that of `other`, and the rest is the same."""
        same = (self.mesh, self.remat) == (other.mesh, other.remat)
        return same and self.batch_size < other.batch_size

    def __str__(self) -> str:
        data, fsdp, tensor = self.mesh
        return (
            f"batch {self.batch_size}, data {data} x fsdp {fsdp} x tensor {tensor}, "
            f"remat {self.remat}"
        )


def meshes(given: Sizes, devices: int, slices: int = 1) -> list[Sizes]:
    """Returns the meshes to compare: the experiment's own mesh, then a selection of other meshes.

    The selection has data parallelism alone, fsdp over all chips of a slice, fsdp over 8 chips (if
    a slice has 16 or more chips, in a multiple of 8), and tensor over 2 chips with fsdp over the
    other chips of a slice. In these meshes, fsdp and tensor stay within a slice.

    Args:
      given: sizes of the experiment's own mesh. It is returned as it is.
      devices: the number of devices.
      slices: the number of slices that the devices belong to.

    >>> meshes((1, 4, 1), 4)
    [(1, 4, 1), (4, 1, 1), (1, 2, 2)]
    >>> meshes((16, 1, 1), 16)
    [(16, 1, 1), (1, 16, 1), (2, 8, 1), (1, 8, 2)]
    >>> meshes((-1, 1, 1), 32, slices=2)[2:]
    [(2, 16, 1), (4, 8, 1), (2, 8, 2)]
    """
    chips = devices // slices
    found = [given, (devices, 1, 1), (slices, chips, 1)]
    if chips > 8 and chips % 8 == 0:
        found.append((devices // 8, 8, 1))
    if chips % 2 == 0:
        found.append((slices, chips // 2, 2))
    return list(dict.fromkeys(found))


def choices(experiment: Experiment, stage: str, devices: int, slices: int = 1) -> Iterator[Choice]:
    """Yields the choices in the order in which they are compiled, small batches first.

    A batch size is rounded up to a multiple of the number of devices times the number of
    accumulation steps.

    Args:
      experiment: the configuration to start from.
      stage: pretrain or finetune.
      devices: the number of devices.
      slices: the number of slices that the devices belong to.
    """
    config = getattr(experiment, stage)
    sizes: Sizes = dataclasses.astuple(experiment.mesh)
    left = devices // math.prod(size for size in sizes if size != -1)
    given = tuple(left if size == -1 else size for size in sizes)
    unit = devices * config.optimizer.accumulation
    batches = [math.ceil(factor * config.batch_size / unit) * unit for factor in BATCHES]
    for batch in dict.fromkeys(batches):
        for mesh in meshes(given, devices, slices):
            for remat in Remat:
                yield Choice(batch, mesh, remat)


def with_choice(experiment: Experiment, stage: str, choice: Choice) -> Experiment:
    """Returns a validated copy of the experiment with the fields of a choice set."""
    config = dataclasses.replace(getattr(experiment, stage), batch_size=choice.batch_size)
    copy = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, remat=choice.remat),
        mesh=MeshConfig(**dict(zip(mesh_lib.AXES, choice.mesh, strict=True))),
        **{stage: config},
    )
    return step_spec.validated(copy, stage)


def run(
    experiment: Experiment, topology: str, stage: str, limit: int, output: str = ""
) -> dict[str, Any]:
    """Compiles choices for a topology. Prints a table on stderr and the ranking as JSON.

    Args:
      experiment: the configuration to start from.
      topology: a topology of TPUs, such as "v5e:4x4". A CPU has no published figures to rank by.
      stage: pretrain or finetune.
      limit: the largest number of compilations.
      output: a file that the report is also written to; "" means none.

    Raises:
      UserError: the topology is unknown or has CPUs, libtpu is missing, the configuration does not
        suit the devices, or the limit is below 1.
    """
    require(limit > 0, f"`sweep_limit`={limit}: must be at least 1")
    experiment = step_spec.validated(experiment, stage)
    target = compile.target_of(topology)
    require(
        target.chip,
        f"`topology`={topology}: a CPU has no published figures to rank by; `sweep` takes a TPU's",
    )
    # Raises a `UserError` if the experiment's mesh does not suit these devices.
    mesh = mesh_lib.make_mesh(experiment.mesh, target.devices)
    slices = mesh.size // len(mesh_lib.slice_devices(mesh))
    wanted = list(choices(experiment, stage, mesh.size, slices))
    entries, compiled = _try_all(experiment, target, stage, wanted, limit)
    found = {
        "topology": topology,
        "devices": mesh.size,
        "stage": stage,
        "of": "an estimate by the compiled program and the chip's published figures, not a "
        "measurement",
        "ranking": rank(entries),
        "compiled": compiled,
        "left_out": len(wanted) - len(entries),
    }
    for line in table(found):
        console.say(line)
    console.print_json(found, output)
    return found


def _try_all(
    experiment: Experiment, target: compile.Target, stage: str, wanted: list[Choice], limit: int
) -> tuple[list[dict[str, Any]], int]:
    """Returns the entries of the choices, and the number of compilations.

    A choice is not compiled if the same choice with a smaller batch already needs too much memory.
    Its entry then says so. After `limit` compilations, the other choices have no entry.
    """
    tried: list[tuple[Choice, dict[str, Any]]] = []
    compiled = 0
    for choice in wanted:
        small = next((c for c, e in tried if _too_large(e) and c.needs_less(choice)), None)
        if small is not None:
            entry = _not_fitting(choice, f"batch {small.batch_size} does not fit already")
        elif compiled < limit:
            compiled += 1
            console.say(f"{compiled} of at most {min(limit, len(wanted))}: {choice}")
            entry = _try(experiment, target, stage, choice)
            jax.clear_caches()
        else:
            continue
        tried.append((choice, entry))
    return [entry for _, entry in tried], compiled


def _too_large(entry: dict[str, Any]) -> bool:
    return not entry["fits"] and entry["peak_memory_bytes_per_device"] is not None


def _not_fitting(choice: Choice, reason: str) -> dict[str, Any]:
    entry = {
        "batch_size": choice.batch_size,
        "mesh": dict(zip(mesh_lib.AXES, choice.mesh, strict=True)),
        "remat": choice.remat,
        "fits": False,
        "reason": reason,
    }
    names = ("peak_memory_bytes_per_device", "step_seconds", "tokens_per_second", "mfu")
    return entry | dict.fromkeys(names)


def _try(
    experiment: Experiment, target: compile.Target, stage: str, choice: Choice
) -> dict[str, Any]:
    """Compiles a choice, and returns an entry with its costs or with the reason of the failure."""
    try:
        found = compile.report(with_choice(experiment, stage, choice), target, stage)
    except UserError as error:  # the configuration does not suit this choice
        return _not_fitting(choice, str(error))
    except jax.errors.JaxRuntimeError as error:  # the compiler fails for another reason
        return _not_fitting(choice, brief(error))
    entry = _not_fitting(choice, found.get("refused", ""))
    return entry | {name: found[name] for name in entry if name in found and name != "mesh"}


def rank(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the entries sorted by tokens per second; entries that do not fit come last."""
    return sorted(entries, key=lambda e: (not e["fits"], -(e["tokens_per_second"] or 0)))


def table(found: dict[str, Any]) -> list[str]:
    """Returns the ranking of a report as lines of text."""
    lines = ["    batch  data x fsdp x tensor  remat  GiB/device  step ms     tokens/s  MFU"]
    for entry in found["ranking"]:
        mesh = " x ".join(str(size) for size in entry["mesh"].values())
        line = f"{entry['batch_size']:9d}  {mesh:>20}  {entry['remat']:>5}"
        peak = entry["peak_memory_bytes_per_device"]
        line += f"  {peak / 2**30:10.2f}" if peak else " " * 12
        if entry["fits"]:
            line += (
                f"  {entry['step_seconds'] * 1e3:7.1f}  {entry['tokens_per_second']:11,.0f}"
                f"  {entry['mfu']:3.0%}"
            )
        else:
            line += f"  does not fit: {entry['reason'] or 'the chip has less memory'}"
        lines.append(line)
    if found["left_out"]:
        lines.append(f"{found['left_out']} choices not compiled; a higher limit compiles more")
    return [*lines, "An estimate by the compiled programs, not a measurement."]
