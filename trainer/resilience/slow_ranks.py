"""Find the ranks that hold up the others, from the time that each one works on a step without waiting for any other.

The time of an optimizer step on a rank has three parts, by the clock of its device:

data       it waits for its next batch: its loader is slow, or its disk
wait       its gradients are there, and it waits for those of the others and for the sum over all of them
compute    all the rest: forward and backward pass, update, and what the host does between two steps

Data and compute are a rank's own work, and ranks are compared by its time for an image. A sum needs all ranks, so the wait of
the slowest one is the time of the exchange itself, as far as the backward pass does not hide it; a slow connection is in every
rank's wait, and not found here. Where ranks meet in the middle of a pass (batch norm over all ranks, DeepSpeed from stage 1
on), these waits are in the compute of all, and only slow loading shows.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import mean, median_low
from typing import Literal, NamedTuple

from trainer.node.arrival import Place

INTERVALS = 5
"""Logging intervals in a row in which a rank must be slow to be named, and then must not be to be forgotten."""


class RankTimes(NamedTuple):
    """Seconds of one rank for a step, as a mean over an interval."""

    data_s: float
    compute_s: float
    wait_s: float
    images: float = 1.0
    """Images of the rank: in the last step of an epoch not all ranks have as many."""

    @property
    def own_s(self) -> float:
        return self.data_s + self.compute_s

    @property
    def pace_s(self) -> float:
        """Seconds of its own work for an image."""
        return self.own_s / self.images if self.images else 0.0


class SlowRank(NamedTuple):
    """A rank that holds up the others."""

    rank: int
    node: str
    gpu: str
    """UUID as nvidia-smi prints it; empty for the CPU."""
    phase: Literal["data", "compute"]
    """Part of its work in which it loses most."""
    slower_pct: float
    """Time of its own work for an image beyond the median's."""


def slower_pct(times: Sequence[RankTimes]) -> list[float]:
    """Time of each rank's own work for an image beyond the median's, in percent; of an even number the lower median counts."""
    usual_s = median_low(one.pace_s for one in times)
    return [100 * (one.pace_s / usual_s - 1) if usual_s > 0 else 0.0 for one in times]


def rank_figures(times: Sequence[RankTimes]) -> dict[str, float]:
    """Metrics of an interval about several ranks."""
    exchange_s = min(one.wait_s for one in times)
    step_s = mean(one.own_s + one.wait_s for one in times)
    return {
        "perf/compute_ms": 1e3 * median_low(one.compute_s for one in times),
        "perf/comm_ms": 1e3 * exchange_s,
        "perf/rank_wait_pct": 100 * (mean(one.wait_s for one in times) - exchange_s) / step_s,
        "perf/slowest_pct": max(slower_pct(times)),
    }


class SlowRanks:
    """Names a rank once its own work has taken more than `limit_pct` % longer than the median's for INTERVALS; 0: never."""

    def __init__(self, limit_pct: float, places: Sequence[Place]) -> None:
        self._limit_pct, self._places = limit_pct, places
        self.named: dict[int, SlowRank] = {}
        """Ranks that are slow at present."""
        self._streak: Counter[int] = Counter()  # intervals in a row that speak against what is known of a rank

    def look(self, times: Sequence[RankTimes]) -> Iterator[tuple[str, str, SlowRank]]:
        """Yield title, text and facts of each alert that an interval with these `times` of all ranks causes."""
        if len(times) < 2 or not self._limit_pct:
            return
        for rank, pct in enumerate(slower_pct(times)):
            changed = (pct > self._limit_pct) != (rank in self.named)
            self._streak[rank] = self._streak[rank] + 1 if changed else 0
            if self._streak[rank] < INTERVALS:
                continue
            self._streak[rank] = 0
            if rank in self.named:
                found = self.named.pop(rank)
                yield "rank no longer slow", f"rank {rank} on {self._places[rank]}", found._replace(slower_pct=pct)
            else:
                found = self.named[rank] = self._describe(rank, times, pct)
                yield "slow rank", self._text(found, times), found

    def _describe(self, rank: int, times: Sequence[RankTimes], pct: float) -> SlowRank:
        lost = times[rank]
        data_s = lost.data_s - median_low(one.data_s for one in times)
        compute_s = lost.compute_s - median_low(one.compute_s for one in times)
        return SlowRank(rank, *self._places[rank], "data" if data_s > compute_s else "compute", pct)

    def _text(self, found: SlowRank, times: Sequence[RankTimes]) -> str:
        def beside(part: Literal["data_s", "compute_s"]) -> str:
            usual_s = median_low(getattr(one, part) for one in times)
            return f"{1e3 * getattr(times[found.rank], part):.1f} ms, median {1e3 * usual_s:.1f}"

        return (
            f"rank {found.rank} on {self._places[found.rank]}: its own work on an image takes {found.slower_pct:.0f} % longer "
            f"than the median of all ranks, {INTERVALS} intervals in a row, mostly in {found.phase} (a step: data "
            f"{beside('data_s')}; compute {beside('compute_s')}); the others wait for it"
        )
