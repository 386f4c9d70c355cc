"""Processes of the items about communication: torchrun or SLURM starts `python -m trainer.check.ranks FILE VALUES` in each.

Rank 0 writes a JSON file: where each rank is, the bandwidth of an all-reduce of so many values by all ranks together, and that
of each pair on a node, and of each pair of nodes, which exchange as many: as an all-reduce of two does.
"""

import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import DistContext, open_dist_context

REPEATS = 5


@dataclass(frozen=True)
class Place:
    """Place of a rank."""

    rank: int
    node: str
    device: str
    """Model of the GPU, or "cpu"."""
    uuid: str
    """Of the GPU; empty on a CPU."""
    cores: int


def main(file: str, values: str) -> None:
    with open_dist_context() as ctx:
        places = ctx.gather_objects(place(ctx))
        tensor = torch.ones(int(values), device=ctx.device)
        together = all_reduce_gb_s(tensor, ctx) if ctx.world > 1 else None
        pairs = [found for row in ctx.gather_objects(measure_pairs(tensor, places, ctx)) for found in row]
        if ctx.primary:
            report = {
                "places": [asdict(one) for one in places],
                "megabytes": tensor.nbytes / 1e6,
                "together_gb_s": together,
                "pairs": pairs,
            }
            Path(file).write_text(json.dumps(report))


def place(ctx: DistContext) -> Place:
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    if ctx.device.type != "cuda":
        return Place(ctx.rank, node, "cpu", "", ctx.cores)
    gpu = torch.cuda.get_device_properties(ctx.device)
    return Place(ctx.rank, node, gpu.name, str(gpu.uuid), ctx.cores)


def measure_pairs(tensor: torch.Tensor, places: list[Place], ctx: DistContext) -> list[dict[str, Any]]:
    """Measure this rank's pairs: with each other rank of its node, and the first of each node with that of each other.

    Pairs without a rank in common are measured at the same time, as in training. Returns those in which it comes first.
    Collective.
    """
    on_node = defaultdict(list)
    for one in places:
        on_node[one.node].append(one.rank)
    found = []
    for ranks in (on_node[places[ctx.rank].node], [ranks[0] for ranks in on_node.values()]):
        for pair in _own_pairs(ranks, ctx.rank):
            gb_s = exchange_gb_s(tensor, pair[pair[0] == ctx.rank])
            if pair[0] == ctx.rank:
                found.append({"ranks": pair, "nodes": [places[rank].node for rank in pair], "gb_s": gb_s})
        ctx.barrier()
    return found


def _own_pairs(ranks: Sequence[int], rank: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of `rank`, one for each round of `rounds`."""
    for pairs in rounds(ranks):
        yield from (pair for pair in pairs if rank in pair)


def rounds(ranks: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of pairs, lower rank first, in which each rank meets every other once: the circle method of tournaments."""
    circle: list[int | None] = [*ranks, None] if len(ranks) % 2 else [*ranks]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def all_reduce_gb_s(tensor: torch.Tensor, ctx: DistContext) -> float:
    """Measure gigabytes a second that each link carries in an all-reduce, as NCCL's tests do (busbw). Collective."""
    return 2 * (ctx.world - 1) / ctx.world * _gb_s(tensor, lambda: ctx.sum(tensor))


def exchange_gb_s(tensor: torch.Tensor, peer: int) -> float:
    """Measure gigabytes a second that this rank and another send each other at the same time."""
    received = torch.empty_like(tensor)

    def exchange() -> None:
        both = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, received, peer)]
        for request in dist.batch_isend_irecv(both):
            request.wait()

    return _gb_s(tensor, exchange)


def _gb_s(tensor: torch.Tensor, move: Callable[[], object]) -> float:
    """Gigabytes of `tensor` a second, in the median of some rounds."""
    seconds = []
    for number in range(REPEATS + 1):
        start = time.perf_counter()
        move()
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        if number:  # the first connects
            seconds.append(time.perf_counter() - start)
    return tensor.nbytes / median(seconds) / 1e9


if __name__ == "__main__":
    main(*sys.argv[1:])
