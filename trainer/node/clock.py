"""Clock of the device that a process computes on."""

import time
from typing import Any

import torch


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
