"""The mesh of devices, and the layout of parameters, training states and batches on it.

The axes of the mesh: `data` (each device has its own rows of a batch and a copy of the parameters),
`fsdp` (its own rows, and a part of the parameters), `tensor` (the same rows, and a part of every
layer's computation). Which axis of a parameter is sharded over which mesh axis is written in the
table of `gptjax.parameters`.
"""

import contextlib
import math
import os
import platform as host_platform
import re
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import parameters
from gptjax.batch import Batch
from gptjax.config.schema import MeshConfig
from gptjax.errors import require

Params = dict[str, Any]
"""The parameter tree: nested dictionaries whose leaves are arrays."""

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which the rows of a batch are sharded."""


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh with the axes `AXES`.

    Args:
      config: the size of each axis; -1 stands for the number of devices that the others leave.
      devices: the devices of the mesh; None: all devices of JAX. If they belong to several TPU
        slices, the data axis goes across the slices.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        require(
            len(devices) % fixed == 0,
            f"`mesh`: {fixed} does not divide the {len(devices)} devices",
        )
        sizes[sizes.index(-1)] = len(devices) // fixed
    require(
        int(np.prod(sizes)) == len(devices),
        f"`mesh`: data * fsdp * tensor = {' * '.join(map(str, sizes))} is not the number of "
        f"devices, {len(devices)}",
    )
    types = (AxisType.Auto,) * 3
    if devices[0].platform != "tpu":
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    outer = _over_slices(sizes, len({_slice(device) for device in devices}))
    inner = [size // share for size, share in zip(sizes, outer, strict=True)]
    # A mesh axis may be a part of an axis of the chips' torus, so that 4 x 4 chips make a mesh of
    # 2 x 4 x 2.
    if outer == [1, 1, 1]:
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=types)


def _slice(device: jax.Device) -> int:
    """Returns the number of the device's TPU slice; 0 for other devices."""
    return getattr(device, "slice_index", 0)


def slice_devices(mesh: Mesh) -> list[jax.Device]:
    """Returns the devices of the first TPU slice, in the order of the mesh."""
    devices = list(mesh.devices.flat)
    return [device for device in devices if _slice(device) == _slice(devices[0])]


def _over_slices(sizes: list[int], slices: int) -> list[int]:
    """Returns the number of parts into which the slices divide each axis.

    Slices are connected by the network of the data centre, which is a hundred times slower than
    the links inside a slice. The data axis communicates least, one sum of the gradients a step, so
    that it goes across the slices. If it is too short for all of them, fsdp goes across the rest.

    Args:
      sizes: of the three axes.
      slices: how many slices there are.

    Raises:
      UserError: the data and fsdp axes cannot be divided among the slices.

    >>> _over_slices([8, 4, 1], 2), _over_slices([2, 8, 1], 4)
    ([2, 1, 1], [2, 2, 1])
    """
    data = math.gcd(sizes[0], slices)
    rest = slices // data
    require(
        sizes[1] % rest == 0,
        f"`mesh`: data * fsdp = {sizes[0]} * {sizes[1]} must be a multiple of the {slices} "
        "slices: tensor is for the devices of one slice",
    )
    return [data, rest, 1]


def is_sharded(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Returns whether the mesh has more than one device, so that arrays are sharded."""
    return mesh is not None and mesh.size > 1


def platform(mesh: Mesh | None) -> str:
    """Returns "cpu", "gpu" or "tpu": the platform of the mesh, or of JAX's default device."""
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def compute_capability(mesh: Mesh | None) -> float:
    """Returns the compute capability of NVIDIA GPUs (8.0 for Ampere); 0 for other devices.

    Args:
      mesh: of equal devices; None: JAX's first device.
    """
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    found = re.fullmatch(r"\d+\.\d+", str(getattr(device, "compute_capability", "")))
    return float(found[0]) if found else 0.0


def batch_divisor(mesh: Mesh) -> int:
    """Returns the number of devices along the batch axes: it must divide the rows of a batch."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def _divisible(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the layout without the mesh axes that do not divide their array axis.

    An odd vocabulary size, for example, cannot be sharded over two devices.
    """
    entries = (
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=False)
    )
    return P(*entries)


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every array of a parameter tree or training state.

    Arrays whose path does not end in that of a parameter (the step, counters) are replicated.

    Args:
      tree: of arrays, or of anything with a shape.
      mesh: the devices.

    Returns:
      The same tree with a NamedSharding for each array.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parameter = parameters.find(jax.tree_util.keystr(path, simple=True, separator="/"))
        axes = parameter.mesh_axes if parameter else ()
        if parameter and axes and parameter.stacked:
            axes = (None, *axes)
        fits = len(axes) <= leaf.ndim
        return NamedSharding(mesh, _divisible(axes, leaf.shape, mesh) if fits else P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the layout of a parameter of a single layer, as `state_sharding` stores it.

    Args:
      path: of the parameter, such as "blocks/attention/qkv/kernel".
      shape: of the parameter, without the axis of the layers.
      mesh: the devices.

    Returns:
      One entry for each array axis; None where the mesh axis has one device or does not divide the
      array axis.

    Raises:
      KeyError: there is no such parameter.
    """
    axes = parameters.PARAMETERS[path].mesh_axes
    axes = axes + (None,) * (len(shape) - len(axes))
    axes = tuple(axis if axis is not None and mesh.shape[axis] > 1 else None for axis in axes)
    return _divisible(axes, shape, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, P())


def on_each_device(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Returns `function` applied on every device to its own parts of the arguments."""
    # Whether a result is equal on all devices of an axis is known to the caller. JAX's check cannot
    # always derive it, and Pallas kernels do not declare it.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Returns bool [rows]: which rows of a batch the devices of this process hold."""
    found = np.zeros(rows, bool)
    for index in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values():
        found[index] = True
    return found


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """Copies to each device its rows of a batch.

    The rows of other processes' devices are not read.
    """
    sharding = batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    # JAX counts the transfer as an implicit one, but it is meant.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(place, batch)


def describe_machine() -> str:
    """Returns the hardware and versions of a measurement: "2 x Intel(R) Xeon(R) ..., jax 0.10.2".

    On a CPU the settings of the C library's memory allocator are included.
    """
    device = jax.devices()[0]
    count, kind = jax.device_count(), device.device_kind
    if device.platform == "cpu":
        count, kind = os.cpu_count() or 1, host_platform.processor() or host_platform.machine()
        with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
            kind = next(line for line in lines if "model name" in line).partition(":")[2].strip()
    memory = os.environ.get("GLIBC_TUNABLES", "") if device.platform == "cpu" else ""
    return (
        f"{count} x {kind}, Python {host_platform.python_version()}, jax {jax.__version__}"
        f"{memory and f', GLIBC_TUNABLES={memory}'}"
    )
