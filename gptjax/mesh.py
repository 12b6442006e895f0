"""The mesh of devices, and the sharding of parameters, training states and batches on the mesh.

The mesh has three axes. The devices along an axis share the work as follows:

data     Each device has its own rows of a batch, and a copy of the parameters.
fsdp     Each device has its own rows of a batch, and a shard of the parameters.
tensor   All devices have the same rows. Each device does a part of the computation of each layer.

The table in `gptjax.parameters` says which axis of a parameter is sharded over which mesh axis.
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
      config: the size of each axis. -1 means all devices that the other axes leave.
      devices: the devices of the mesh. None means all devices of JAX. If the devices belong to
        several TPU slices, the data axis is divided among the slices first.

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
    # An axis of the torus of chips can be divided among several mesh axes. For example, 4 x 4 chips
    # can be a mesh of 2 x 4 x 2.
    if outer == [1, 1, 1]:
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=types)


def _slice(device: jax.Device) -> int:
    """Returns the index of the TPU slice of a device. Devices other than TPUs have 0."""
    return getattr(device, "slice_index", 0)


def slice_devices(mesh: Mesh) -> list[jax.Device]:
    """Returns the devices of the first TPU slice, in the order of the mesh."""
    devices = list(mesh.devices.flat)
    return [device for device in devices if _slice(device) == _slice(devices[0])]


def _over_slices(sizes: list[int], slices: int) -> list[int]:
    """Returns the number of parts into which the TPU slices divide each mesh axis.

    Slices are connected by the network of the data centre, which is a hundred times slower than
    the links inside a slice. The data axis communicates least, one sum of the gradients in a step.
    Therefore the data axis is divided among the slices. If the data axis cannot be divided among
    all slices, the fsdp axis is divided as well.

    Args:
      sizes: the sizes of the three axes.
      slices: the number of slices.

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
    """Returns whether the mesh has more than one device. Arrays are then sharded."""
    return mesh is not None and mesh.size > 1


def platform(mesh: Mesh | None) -> str:
    """Returns the platform of the mesh: "cpu", "gpu" or "tpu".

    If the mesh is None, the result is the platform of JAX's default device.
    """
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def compute_capability(mesh: Mesh | None) -> float:
    """Returns the compute capability of NVIDIA GPUs, such as 8.0 for Ampere. Other devices have 0.

    Args:
      mesh: a mesh of equal devices. None means JAX's first device.
    """
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    found = re.fullmatch(r"\d+\.\d+", str(getattr(device, "compute_capability", "")))
    return float(found[0]) if found else 0.0


def batch_divisor(mesh: Mesh) -> int:
    """Returns the number of devices along the batch axes, which must divide the rows of a batch."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def _divisible(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the partition spec without the mesh axes that do not divide their array axis.

    For example, a vocabulary of odd size cannot be sharded over two devices.
    """
    entries = (
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=False)
    )
    return P(*entries)


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every array of a parameter tree or training state.

    An array is replicated if its path does not end in the path of a parameter. Such arrays are the
    step and counters.

    Args:
      tree: a tree of arrays, or of other objects that have a shape.
      mesh: the devices.

    Returns:
      A tree of the same structure with a NamedSharding for each array.
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
    """Returns the partition spec of a parameter, for one layer of the array in the training state.

    Args:
      path: the path of the parameter, such as "blocks/attention/qkv/kernel".
      shape: the shape of the parameter, without the axis of the layers.
      mesh: the devices.

    Returns:
      The mesh axis of each array axis. None means that the array axis is not sharded, because it
      has no mesh axis, or the mesh axis has one device or does not divide the array axis.

    Raises:
      KeyError: there is no such parameter.
    """
    axes = parameters.PARAMETERS[path].mesh_axes
    axes = axes + (None,) * (len(shape) - len(axes))
    axes = tuple(axis if axis is not None and mesh.shape[axis] > 1 else None for axis in axes)
    return _divisible(axes, shape, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, whose rows are sharded over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array, which every device holds completely."""
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
    """Returns bool [rows]: whether a device of this process holds the row of a batch."""
    found = np.zeros(rows, bool)
    for index in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values():
        found[index] = True
    return found


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """Copies rows of a batch to the devices of this process. Each device gets only its own rows.

    The rows of the devices of other processes are not read.
    """
    sharding = batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    # JAX regards this transfer as implicit, and the transfer guard would reject it. It is intended.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(place, batch)


def describe_machine() -> str:
    """Returns the hardware and the versions of Python and JAX, to be noted with a measurement.

    An example is "2 x Intel(R) Xeon(R) ..., Python 3.11.7, jax 0.10.2". On a CPU the settings of
    the C library's memory allocator are included.
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
