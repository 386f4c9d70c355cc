"""Alerts for people who are not looking: a fall of throughput."""

import statistics
from collections.abc import Iterator, Mapping

FALL = 0.5
"""Images/s below this share of the epoch's earlier speed are a fall."""
_BEFORE, _NOW = 10, 3  # rows: the least to compare with, and those compared; one slow row is no fall


class Alarms:
    """Looks at each row of metrics, and reports a fall once, and again after it has recovered."""

    def __init__(self) -> None:
        self._speeds: list[float] = []
        self._fallen = False

    def row(self, scalars: Mapping[str, float], step: int) -> Iterator[tuple[str, str]]:
        """Yield title and text of each alert that a row at an interval causes."""
        if "perf/images_per_s" in scalars:
            yield from self._speed(scalars["perf/images_per_s"], step)

    def new_epoch(self) -> None:
        """Forget the speed so far: another epoch may train on larger images."""
        self._speeds = []

    def _speed(self, images_per_s: float, step: int) -> Iterator[tuple[str, str]]:
        self._speeds.append(images_per_s)
        before, now = self._speeds[:-_NOW], self._speeds[-_NOW:]
        if len(before) < _BEFORE:
            return
        was, now_per_s = statistics.median(before), statistics.median(now)
        fallen, self._fallen = self._fallen, now_per_s < FALL * was
        if self._fallen and not fallen:
            yield "throughput fell", f"from {was:.0f} to {now_per_s:.0f} images/s at step {step}"
