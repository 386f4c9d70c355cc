"""Sharding of an epoch over ranks and micro-batches: pure functions of positions in the epoch's order.

An epoch is cut into optimizer steps, a step into micro-batches. In a micro-batch the ranks take turns, with one image
each, or with a pair where images are mixed in pairs. So a step has the same images at any number of ranks.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class RankInfo:
    """One of `world` processes that share an epoch, and its device; by default the only one, on the CPU."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """This process's share of its node's processor cores."""


class BatchSharding(NamedTuple):
    """One rank's share of an optimizer step."""

    local_positions: Positions
    """[B] positions of this rank's rows in a micro-batch of all ranks, ascending."""
    micro_batch: int
    """Images in a micro-batch, over all ranks."""
    step: int
    """Images in a step, over all its micro-batches and ranks."""

    @property
    def rows(self) -> int:
        """Images of this rank in a micro-batch."""
        return len(self.local_positions)


class MicroBatch(NamedTuple):
    """One rank's share of a micro-batch, as positions in the epoch."""

    positions: Positions
    """[B] ascending; those from `end` on are padding."""
    start: int
    """Position of the first image of its step."""
    end: int
    """Position behind the last image of its step."""

    @property
    def num_real(self) -> int:
        """Rows that are not padding; they come first."""
        return int((self.positions < self.end).sum())


def check_batch(batch: int, world: int, micro_batches: int, *, pairs: bool) -> None:
    """Raise `UserError` where a step of `batch` images, or of pairs of images, cannot be shared evenly."""
    shares = world * micro_batches * (2 if pairs else 1)
    if batch % shares:
        how = " in pairs, as mixup and cutmix need" if pairs else ""
        raise UserError(
            f"data.batch: {batch} images cannot be shared{how} by {world} ranks x {micro_batches} micro-batches; "
            f"choose a multiple of {shares}"
        )


def shard_batch(batch: int, rank: int, world: int, *, micro_batches: int = 1, pairs: bool = False) -> BatchSharding:
    """Compute the share of `rank` in a step of `batch` images, each share rounded up to the same size."""
    turn = 2 if pairs else 1
    rows = -(-batch // (world * micro_batches * turn)) * turn
    local_positions = np.arange(rows * world).reshape(-1, world, turn)[:, rank].ravel()
    return BatchSharding(local_positions, rows * world, rows * world * micro_batches)


def steps_per_epoch(sharding: BatchSharding, count: int) -> int:
    """Count the optimizer steps in an epoch of `count` images; the last one may be shorter."""
    return -(-count // sharding.step)


def micro_batches(sharding: BatchSharding, start: int, count: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a rank from position `start` to the end of an epoch of `count` images, in order.

    Every rank gets the same number of micro-batches and of rows: positions behind the end are padding.
    """
    for first in range(start, count, sharding.step):
        for offset in range(0, sharding.step, sharding.micro_batch):
            positions = first + offset + sharding.local_positions
            yield MicroBatch(positions, first, min(first + sharding.step, count))


def positions_of_rank(sharding: BatchSharding, start: int, count: int) -> Positions:
    """Compute [N] the positions that a rank reads from `start` to the end of an epoch of `count` images, without padding."""
    firsts = np.arange(start, count, sharding.micro_batch)
    positions = (firsts[:, None] + sharding.local_positions).ravel()
    return positions[positions < count]
