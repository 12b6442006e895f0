"""Published performance figures of TPU chips, and the least times that follow from them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of one chip."""

    flops_per_second: float
    """Peak rate of matrix products in bfloat16. On a TPU the same rate holds for float32 at JAX's
    default precision."""
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
    """If the length of a side of a slice is a multiple of this number, the chips along the side
    form a ring. Otherwise they form a line."""
    source: str
    """Address of the page with these figures."""


_GIB = 2**30
_PAGE = "https://cloud.google.com/tpu/docs/"

# The figures follow from the pages in this way:
# - Links: the pages give the sum over both directions of all links of a chip. It is 400 GBps over 4
#   ports (v5e), 800 over 4 (v6e) and 1200 over 6 (v5p). The figure of v4 is from the paper of its
#   makers: six links of 50 GB/s (Jouppi et al. 2023, arXiv:2304.01433).
# - Rings: the page of v5p calls slices of 4x4x4 and more a torus. A pod of v5e or v6e is 16x16, and
#   only its full sides are rings.
# - Network: the pages give 6.4 Tbps (v5e) and 25.6 Tbps (v6e) for a pod of 256 chips, and 50 Gbps
#   for a chip (v5p).
# - Memory: GB on the pages means GiB. The page of v5e has said 819 GBps and 800 GiBps (859e9) at
#   different times. The table has the lower figure.
CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1200e9, 50e9, None, 4, f"{_PAGE}v4"),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 50e9, 6.4e12 / 8 / 256, 16, f"{_PAGE}v5e"),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 100e9, 50e9 / 8, 4, f"{_PAGE}v5p"),
    "v6e": Chip(918e12, 32 * _GIB, 1638e9, 100e9, 25.6e12 / 8 / 256, 16, f"{_PAGE}v6e"),
}
"""Name of a chip, such as "v5e" in the topology "v5e:4x4" -> the figures of the chip."""


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a step, from the peak rate of matrix products and the memory bandwidth.

    Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
    multicore architectures", CACM 52(4), 2009.
    """

    compute_seconds: float
    memory_seconds: float
    communication_seconds: float
    exposed_communication_seconds: float
    """Time of the communication that does not run at the same time as computation."""

    @property
    def step_seconds(self) -> float:
        """The longer of compute and memory time, which overlap, plus the exposed communication."""
        longer = max(self.compute_seconds, self.memory_seconds)
        return longer + self.exposed_communication_seconds


def roofline(
    chip: Chip, flops: float, traffic: float, communication: float = 0.0, exposed: float = 0.0
) -> Roofline:
    """Returns the least time of a step on a chip.

    Args:
      chip: the figures of the chip.
      flops: floating-point operations of the step.
      traffic: bytes to and from main memory.
      communication: seconds of all communication.
      exposed: seconds of the communication that does not run at the same time as computation.

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

    The devices of a group use the links along the dimensions of the torus in which their
    coordinates differ. A dimension adds two links if the group fills a ring in it, otherwise one.
    For an array of N bytes and a group of n devices, each device receives (n - 1) / n * N bytes in
    an all-gather or a reduce-scatter, and twice as much in an all-reduce. In an all-to-all, a
    byte travels over L / 4 links on average, the mean distance in a ring of L devices, where L is
    the group's largest extent. If the devices of a group are not neighbours, they share links with
    other groups, and the collective takes longer than this.

    Args:
      kind: an HLO opcode, such as all-reduce.
      size: bytes of a device's input. For an all-gather, bytes of a device's output.
      places: coordinates of the group's devices in the torus.
      sides: lengths of the slice's sides in chips.
      chip: the figures of the devices.

    >>> line = [(0, 0), (1, 0)]
    >>> collective_seconds("all-gather", 100e9, line, (2, 1), CHIPS["v5e"])
    1.0
    >>> ring = [(i, 0) for i in range(16)]
    >>> collective_seconds("all-reduce", 100e9, ring, (16, 1), CHIPS["v5e"])
    1.875
    """
    if kind == "collective-permute":  # uses only the one link to a neighbour
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
    """Returns the least time of a collective between slices, in seconds.

    It is assumed that all chips send at the same time, so each chip has only its share of the
    network.

    Args:
      kind: an HLO opcode, such as all-reduce.
      size: bytes of a device's input. For an all-gather, bytes of a device's output.
      slices: the number of slices. A group has one device in each slice.
      chip: the figures of the devices.

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
