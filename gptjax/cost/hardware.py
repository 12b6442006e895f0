"""Published figures of chips, and the least times that follow from them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of one chip."""

    flops_per_second: float
    """Peak rate of matrix products in bfloat16, and on a TPU also in float32 at JAX's default
    precision."""
    memory_bytes: int
    """Size of the high-bandwidth memory (HBM)."""
    bytes_per_second: float
    """Bandwidth of the HBM."""
    link_bytes_per_second: float
    """Bandwidth of one link of the interconnect (ICI) to a neighbouring chip, in one direction."""
    network_bytes_per_second: float | None
    """A chip's share of the bandwidth between slices (DCN), in one direction. None means that no
    figure is published."""
    torus: int
    """A side of a slice is a ring of chips if its length is a multiple of this, else a line."""
    source: str
    """Page with these figures."""


_GIB = 2**30
_PAGE = "https://cloud.google.com/tpu/docs/"

# How the figures follow from the pages:
# - Links: the pages give the sum over both directions of all links of a chip, 400 GBps over 4 ports
#   (v5e), 800 over 4 (v6e), 1200 over 6 (v5p). For v4 the figure is from its makers' paper, six
#   links of 50 GB/s (Jouppi et al. 2023, arXiv:2304.01433).
# - Rings: v5p's page calls slices of 4x4x4 and more a torus. A pod of v5e or v6e is 16x16, and only
#   its full sides are rings.
# - Network: 6.4 and 25.6 Tbps for a pod of 256 chips (v5e, v6e), 50 Gbps for a chip (v5p).
# - Memory: GB on the pages is GiB. v5e's page has said 819 GBps and 800 GiBps (859e9) at different
#   times; the table has the lower figure.
CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1200e9, 50e9, None, 4, f"{_PAGE}v4"),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 50e9, 6.4e12 / 8 / 256, 16, f"{_PAGE}v5e"),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 100e9, 50e9 / 8, 4, f"{_PAGE}v5p"),
    "v6e": Chip(918e12, 32 * _GIB, 1638e9, 100e9, 25.6e12 / 8 / 256, 16, f"{_PAGE}v6e"),
}
"""Name of a chip, as at the start of a topology ("v5e:4x4") -> its figures."""


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a step: matrix products at the peak rate, memory traffic at the bandwidth.

    Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
    multicore architectures", CACM 52(4), 2009.
    """

    compute_seconds: float
    memory_seconds: float
    communication_seconds: float
    exposed_communication_seconds: float
    """Time of the communication that does not run beside computation."""

    @property
    def step_seconds(self) -> float:
        """The longer of computation and memory traffic, which overlap, plus the communication."""
        longer = max(self.compute_seconds, self.memory_seconds)
        return longer + self.exposed_communication_seconds


def roofline(
    chip: Chip, flops: float, traffic: float, communication: float = 0.0, exposed: float = 0.0
) -> Roofline:
    """Returns the least time of a step on a chip.

    Args:
      chip: its kind.
      flops: operations of the step.
      traffic: bytes to and from the memory.
      communication: seconds of all communication.
      exposed: seconds of the communication that does not run beside computation.

    >>> roofline(CHIPS["v5e"], 197e12, 819e9).step_seconds
    1.0
    >>> roofline(CHIPS["v5e"], 197e12, 819e9, 0.75, 0.5).step_seconds
    1.5
    """
    compute, memory = flops / chip.flops_per_second, traffic / chip.bytes_per_second
    return Roofline(compute, memory, communication, exposed)


def collective_seconds(
    kind: str, size: float, places: list[tuple[int, ...]], sides: tuple[int, ...], chip: Chip
) -> float:
    """Returns the least time of a collective among neighbouring chips, in seconds.

    The devices of a group use the links along the dimensions of the torus in which their places
    differ: two links in a dimension that is a ring, one in a line. For an array of N bytes and a
    group of n devices, each device receives (n - 1) / n * N bytes in an all-gather or a
    reduce-scatter, and twice as much in an all-reduce. In an all-to-all, each byte passes a quarter
    of a side on average. A group whose members are not neighbours shares links with other groups
    and takes longer than this.

    Args:
      kind: an HLO opcode, such as all-reduce.
      size: bytes of a device's input, or of its output in an all-gather.
      places: coordinates of the group's devices in the torus.
      sides: lengths of the slice's sides in chips.
      chip: the kind of the devices.

    >>> line = [(0, 0), (1, 0)]
    >>> collective_seconds("all-gather", 100e9, line, (2, 1), CHIPS["v5e"])
    1.0
    >>> ring = [(i, 0) for i in range(16)]
    >>> collective_seconds("all-reduce", 100e9, ring, (16, 1), CHIPS["v5e"])
    1.875
    """
    if kind == "collective-permute":  # over the one link to a neighbour
        return size / chip.link_bytes_per_second
    if len(places) < 2:
        return 0.0
    links, longest = 0, 1
    for axis, side in enumerate(sides):
        spread = len({place[axis] for place in places})
        if spread > 1:
            links += 2 if spread == side and side % chip.torus == 0 else 1
            longest = max(longest, spread)
    share = (len(places) - 1) / len(places)
    factor = {"all-reduce": 2 * share, "all-to-all": max(share, longest / 4)}.get(kind, share)
    return size * factor / (max(links, 1) * chip.link_bytes_per_second)


def network_seconds(kind: str, size: float, slices: int, chip: Chip) -> float:
    """Returns the least time of a collective between slices, in seconds; all chips send at once.

    Args:
      kind: as in `collective_seconds`.
      size: bytes of a device's input, or of its output in an all-gather.
      slices: number of slices of a group, which has one device in each.
      chip: the kind of the devices.

    >>> network_seconds("all-reduce", 12.5e9, 2, CHIPS["v6e"])
    1.0
    >>> network_seconds("collective-permute", 12.5e9, 2, CHIPS["v6e"])
    1.0
    """
    assert chip.network_bytes_per_second
    factor = 1.0 if kind == "collective-permute" else (slices - 1) / slices
    if kind == "all-reduce":
        factor *= 2
    return size * factor / chip.network_bytes_per_second
