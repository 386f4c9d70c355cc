"""Model of the links between a run's processes: the time of an all-reduce, and the link that a measurement shows."""

import math
import time
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from trainer.distributed import DistContext

_FLOAT = 4  # bytes
_SIZES = [4 << 10, 32 << 10, 256 << 10, 2 << 20, 16 << 20]  # bytes: of a bias to of a bucket of gradients
_ENOUGH_S = 0.2  # an all-reduce that takes longer measures a slow link well enough
_ROUNDS, _LEAST_ROUNDS, _BUDGET_S = 15, 3, 2.0


class Link(NamedTuple):
    """Link from one process to the next."""

    latency_s: float
    """Seconds until the first byte of a message arrives."""
    bytes_per_s: float
    """Bytes a second in one direction, with full load in the other."""


def ring_seconds(link: Link, ranks: int, size_bytes: float) -> float:
    """Seconds of an all-reduce of `size_bytes` around a ring of `ranks`, each step of it over `link`.

    2 (p - 1) steps, each with a p-th of the bytes (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for
    clusters of workstations"; latency and bandwidth as in Thakur et al. 2005). The additions are part of the bandwidth.
    """
    return 2 * (ranks - 1) * (link.latency_s + size_bytes / ranks / link.bytes_per_s)


def tree_seconds(bytes_per_s: float, depth_s: float, size_bytes: float) -> float:
    """Seconds of an all-reduce up and down two trees, each for half of the bytes, in the best number of segments.

    `depth_s` is the latency from a leaf to the root. Since a process that is a leaf in one tree is an inner node of the
    other, both directions of its link are full, and k segments pass in (k + depth) steps in the way up and as many down
    (Sanders, Speck and Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan").
    """
    return 2 * (math.sqrt(size_bytes / bytes_per_s) + math.sqrt(depth_s)) ** 2


def measure_link(ctx: DistContext) -> Link:
    """Find the link that explains the time of all-reduces between the ranks, of a few sizes and as rings. Collective.

    Takes about a second, up to about ten on a link of 1 Mbit/s. Needs at least two ranks.
    """
    sizes, once_s = [], []
    for size in _SIZES:
        sizes.append(size)
        once_s.append(min(all_reduce_seconds(ctx, size, 2)))
        if once_s[-1] > _ENOUGH_S:
            break
    rounds = min(_ROUNDS, max(_LEAST_ROUNDS, int(_BUDGET_S / sum(once_s))))
    taken = [[all_reduce_seconds(ctx, size, 1)[0] for size in sizes] for _ in range(rounds)]
    return fit_ring(sizes, [median(column) for column in zip(*taken, strict=True)], ctx.world)


def all_reduce_seconds(ctx: DistContext, size_bytes: int, rounds: int) -> list[float]:
    """Measure each of `rounds` all-reduces of `size_bytes` as float32, in seconds, the same on all ranks. Collective."""
    values = torch.zeros(max(1, size_bytes // _FLOAT), device=ctx.device)
    taken_s = []
    for _ in range(rounds):
        ctx.barrier()
        start = time.perf_counter()
        ctx.sum(values)[0].item()  # waits for a GPU
        taken_s.append(time.perf_counter() - start)
    # The ranks leave the barrier one after another: the last one waits for nobody.
    by_rank = ctx.gather(torch.tensor(taken_s, dtype=torch.float64, device=ctx.device))
    seconds: list[float] = by_rank.amin(dim=0).tolist()
    return seconds


def host_seconds_per_byte(ctx: DistContext) -> float:
    """Measure the seconds that all threads of this process compute for each byte of an all-reduce: 0 on a GPU. Collective."""
    if ctx.device.type == "cuda":
        return 0.0
    start = time.process_time()
    all_reduce_seconds(ctx, _SIZES[-2], _ROUNDS)
    return (time.process_time() - start) / (_ROUNDS * _SIZES[-2])


def fit_ring(sizes_bytes: list[int], seconds: list[float], ranks: int) -> Link:
    """Fit a link so that `ring_seconds` comes closest to `seconds`, by least squares, and equal for the first size.

    The sizes rise. The first shows the latency; an error of the longest times would be a multiple of it.
    """
    size, taken_s = np.array(sizes_bytes, float), np.array(seconds)
    more, longer_s = size[1:] - size[0], taken_s[1:] - taken_s[0]
    s_per_byte = float((more * longer_s).sum() / (more * more).sum())
    steps = 2 * (ranks - 1)
    latency_s = (taken_s[0] - s_per_byte * size[0]) / steps
    return Link(max(0.0, float(latency_s)), steps / ranks / s_per_byte)
