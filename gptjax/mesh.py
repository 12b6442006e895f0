"""The mesh, and one table of rules that says how every array is laid out on it."""

import contextlib
import math
import os
import platform as host_platform
import re
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.batch import Batch
from gptjax.config.schema import MeshConfig
from gptjax.errors import require

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Path of an array (the optimizer's copies end in the parameter's own path) -> its axes' mesh axes.
_RULES: tuple[tuple[str, P], ...] = (
    ("token_embedding", P("tensor", "fsdp")),
    ("(position|segment)_embedding", P()),
    ("lm_head/kernel", P("tensor", "fsdp")),
    ("lm_head/bias", P("tensor")),
    ("qkv/kernel", P(None, "fsdp", None, "tensor", None)),
    ("qkv/bias", P(None, None, "tensor", None)),
    ("attention/out/kernel", P(None, "tensor", None, "fsdp")),
    ("ffn_in/kernel", P(None, "fsdp", "tensor")),
    ("ffn_in/bias", P(None, "tensor")),
    ("ffn_out/kernel", P(None, "tensor", "fsdp")),
    ("", P()),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh ('data', 'fsdp', 'tensor'); a size of -1 takes the devices that are left.

    Devices of several TPU slices are laid out so that the data axis goes over the slices.

    Raises:
      UserError: the sizes do not fit the devices.
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
    # An axis may be a part of a torus's axis: 4 x 4 chips are 2 x 4 x 2 too.
    if outer == [1, 1, 1]:
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=types)


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0)


def slice_devices(mesh: Mesh) -> list[jax.Device]:
    """Returns the devices of the first slice, as a program counts them: in the mesh's order."""
    devices = list(mesh.devices.flat)
    return [device for device in devices if _slice(device) == _slice(devices[0])]


def _over_slices(sizes: list[int], slices: int) -> list[int]:
    """Returns how many parts of each axis lie in different slices.

    Between slices is a data centre's network, a hundred times slower than the links of one. The
    data axis needs it least: it sums gradients once a step. Where the axis is too short for the
    slices, fsdp takes the rest.

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


def several(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Returns whether there is more than one device."""
    return mesh is not None and mesh.size > 1


def platform(mesh: Mesh | None) -> str:
    """Returns what the devices are: cpu, gpu or tpu; without a mesh, JAX's first device."""
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def compute_capability(mesh: Mesh | None) -> float:
    """Returns what an NVIDIA GPU of the mesh is (7.5 Turing, 8.0 Ampere, 9.0 Hopper); else 0."""
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    found = re.fullmatch(r"\d+\.\d+", str(getattr(device, "compute_capability", "")))
    return float(found[0]) if found else 0.0


def batch_divisor(mesh: Mesh) -> int:
    """Returns what the number of rows of a batch must be a multiple of."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _rule(name: str) -> P:
    return next(spec for pattern, spec in _RULES if re.search(pattern, name))


def _fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Drops the mesh axes that do not divide their dimension (a vocabulary of odd size)."""
    entries = [
        axis if axis is not None and shape[i] % mesh.shape[axis] == 0 else None
        for i, axis in enumerate(spec)
    ]
    return P(*entries)


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for every array (or shape) of a state or parameter tree."""

    def rule(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = _rule(_path(path))
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh) if leaf.ndim >= len(spec) else P())

    return jax.tree_util.tree_map_with_path(rule, tree)


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the layout of a parameter, of a single layer where layers are stacked.

    Args:
      name: its path, "blocks/attention/qkv/kernel".
      shape: of the parameter, without the axis of the layers.
      mesh: the devices. Axes of one device are left out, as are those that do not divide.

    Returns:
      An entry for each axis.
    """
    spec = tuple(_rule(name))
    spec = spec[1:] if len(spec) > len(shape) else spec
    spec = spec + (None,) * (len(shape) - len(spec))
    wide = (axis if axis is not None and mesh.shape[axis] > 1 else None for axis in spec)
    return _fit(P(*wide), shape, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Returns bool [rows]: which rows of a batch lie on devices of this process."""
    found = np.zeros(rows, bool)
    for index in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values():
        found[index] = True
    return found


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """Places a batch on the mesh, each device its rows; those of other processes are not read."""
    sharding = batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, batch)


def describe_machine() -> str:
    """Returns what a measurement was made on: "2 x Intel(R) Xeon(R) ..., jax 0.10.2".

    With what the C library was told about its memory, by the launcher or by the user.
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


Params = dict[str, Any]
