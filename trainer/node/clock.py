"""Clock of the device that a process computes on, and the time in which the process waits for others."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Span(NamedTuple):
    """Two marks of a clock."""

    start: Any
    end: Any


class HostClock:
    """Clock of a device that has done its work when a call returns: the CPU."""

    def mark(self) -> Any:
        """Mark this moment: everything started until now comes before it."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return float(end - start)

    def settle(self, mark: Any) -> None:
        """Wait until the device is past `mark`. Only then `seconds` may be asked for."""


class GpuClock(HostClock):
    """Clock of a GPU, which works behind the host: marks lie between its kernels.

    The host runs ahead until a queue is full, so its own clock would count as a wait for data what is a wait for the GPU.
    """

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def settle(self, mark: Any) -> None:
        mark.synchronize()


def clock_of(device: torch.device) -> HostClock:
    """Return the clock of a device: of the host for the CPU."""
    return GpuClock() if device.type == "cuda" else HostClock()


class WaitTimer:
    """Times in which a process has done its part of an exchange, and waits for the others and for the exchange itself."""

    def __init__(self, clock: HostClock) -> None:
        self._clock = clock
        self._done: Any = None
        self._spans: list[Span] = []

    def part_done(self, *_: object) -> None:
        """Mark that this process's own part is done. May be a hook of autograd."""
        self._done = self._clock.mark()

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Count as waiting what lies between the last `part_done` in this context and its end; nothing without one."""
        self._done = None
        yield
        if self._done is not None:
            self._spans.append(Span(self._done, self._clock.mark()))

    def take(self) -> list[Span]:
        """Return the times since the last call."""
        spans, self._spans = self._spans, []
        return spans
