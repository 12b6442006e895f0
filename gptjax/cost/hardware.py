"""What a chip can do at best, as its maker publishes it: the roof of every estimate."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip."""

    flops_per_second: float
    """Peak of bfloat16 products; on a TPU also of float32 ones at JAX's default precision."""
    memory_bytes: int
    """High-bandwidth memory (HBM)."""
    bytes_per_second: float
    """Of that memory."""
    link_bytes_per_second: float
    """Of one link of the interconnect (ICI) to a neighbouring chip, in one direction."""
    network_bytes_per_second: float | None
    """A chip's share of its pod's network to other slices (DCN), in one direction; None: not
    published."""
    torus: int
    """Links close to a ring along the sides of a slice that are a multiple of this."""
    source: str
    """Page with these figures."""


_GIB = 2**30
_PAGE = "https://cloud.google.com/tpu/docs/"

# Of the interconnect the pages give both directions of all links of a chip: 400 GBps over 4 ports
# (v5e), 800 over 4 (v6e), 1200 over 6 (v5p); v4's page gives none, its makers' paper six links of
# 50 GB/s (Jouppi et al. 2023, arXiv:2304.01433). v5p's page: slices from 4x4x4 on are a torus. A
# pod of v5e or v6e is 16x16, and only its full sides are rings.
# Of the network, 6.4 and 25.6 Tbps a pod of 256 (v5e, v6e), 50 Gbps a chip (v5p).
# What the pages call GB of memory is GiB. v5e's bandwidth is 819 GBps on one state of its page and
# 800 GiBps (859e9) on another: the lower one is taken.
CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1200e9, 50e9, None, 4, f"{_PAGE}v4"),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 50e9, 6.4e12 / 8 / 256, 16, f"{_PAGE}v5e"),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 100e9, 50e9 / 8, 4, f"{_PAGE}v5p"),
    "v6e": Chip(918e12, 32 * _GIB, 1638e9, 100e9, 25.6e12 / 8 / 256, 16, f"{_PAGE}v6e"),
}
"""The name in front of a topology ("v5e" of "v5e:4x4") -> its chip."""


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a step: its products at the peak, its memory traffic at the bandwidth.

    Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
    multicore architectures", CACM 52(4), 2009.
    """

    compute_seconds: float
    memory_seconds: float
    exposed_seconds: float = 0.0
    """Communication that no computation hides."""

    @property
    def step_seconds(self) -> float:
        """The longer of the first two, which overlap; then what is left of the third."""
        return max(self.compute_seconds, self.memory_seconds) + self.exposed_seconds


def roofline(
    chip: Chip, flops: float, bytes_accessed: float, exposed_seconds: float = 0.0
) -> Roofline:
    """Returns the least time on `chip` of so many operations and bytes of its memory.

    >>> roofline(CHIPS["v5e"], 197e12, 819e9).step_seconds
    1.0
    >>> roofline(CHIPS["v5e"], 197e12, 819e9, 0.5).step_seconds
    1.5
    """
    compute, memory = flops / chip.flops_per_second, bytes_accessed / chip.bytes_per_second
    return Roofline(compute, memory, exposed_seconds)


def collective_seconds(
    kind: str, size: float, places: list[tuple[int, ...]], sides: tuple[int, ...], chip: Chip
) -> float:
    """Returns the least time of a collective among neighbouring chips.

    The devices of a group send over the links along the dimensions of the torus in which they
    differ: two links for a dimension that is a ring, one for a line. Of an array of N bytes and a
    group of n, a chip gets (n - 1) / n N bytes in an all-gather or a reduce-scatter, and twice that
    in an all-reduce; of an all-to-all each byte passes a quarter of a side on average. Groups whose
    members are no neighbours share links, and take longer than this.

    Args:
      kind: an HLO opcode, such as all-reduce.
      size: bytes that a device puts in (of an all-gather: gets out).
      places: of the group's devices in the torus.
      sides: of the slice, in chips.
      chip: whose links.

    >>> line = [(0, 0), (1, 0)]
    >>> collective_seconds("all-gather", 100e9, line, (2, 1), CHIPS["v5e"])
    1.0
    >>> ring = [(i, 0) for i in range(16)]
    >>> collective_seconds("all-reduce", 100e9, ring, (16, 1), CHIPS["v5e"])
    1.875
    """
    members = len(places)
    if members < 2 and kind != "collective-permute":
        return 0.0
    if kind == "collective-permute":  # to one neighbour, one link
        return size / chip.link_bytes_per_second
    links, longest = 0, 1
    for axis, side in enumerate(sides):
        spread = len({place[axis] for place in places})
        if spread > 1:
            ring = spread == side and side % chip.torus == 0
            links += 2 if ring else 1
            longest = max(longest, spread)
    share = (members - 1) / members
    factor = {"all-reduce": 2 * share, "all-to-all": max(share, longest / 4)}.get(kind, share)
    return size * factor / (max(links, 1) * chip.link_bytes_per_second)


def network_seconds(kind: str, size: float, slices: int, chip: Chip) -> float:
    """Returns the least time of a collective between slices, all chips of which send at once.

    Args:
      kind: as of `collective_seconds`.
      size: bytes that a device puts in (of an all-gather: gets out).
      slices: in which the members of a group lie, one in each.
      chip: whose share of the network.

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
