"""Memory and energy that a process takes of its machine, as far as the machine tells."""

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

Counter = Callable[[], float]
"""Joules since some moment. Raises OSError where there is no answer."""


class Usage(NamedTuple):
    """Share of a machine that a process takes; NaN where that is not known."""

    gpu_gib: float
    """Memory that is taken of its GPU, by whomever."""
    host_gib: float
    """Memory of the process (resident set)."""
    gpu_j: float
    """Energy of its GPU since the counters were restarted."""
    cpu_j: float
    """Energy of its node's processors since then; 0 for all processes of a node but the first."""


def usage_figures(ranks: Sequence[Usage], elapsed_s: float, images: float) -> dict[str, float]:
    """Metrics of an interval from the shares of all ranks; one that some rank does not know is left out."""
    gpu_gib, host_gib, gpu_j, cpu_j = zip(*ranks, strict=True)
    figures = {
        "perf/gpu_mem_gib": max(gpu_gib, key=_nan_first),
        "perf/host_mem_gib": max(host_gib),
        "perf/gpu_watts": sum(gpu_j) / elapsed_s,
        "perf/cpu_watts": sum(cpu_j) / elapsed_s,
    }
    known_j = [joules for joules in (sum(gpu_j), sum(cpu_j)) if not math.isnan(joules)]
    if known_j and images:
        figures["perf/joules_per_image"] = sum(known_j) / images
    return {name: value for name, value in figures.items() if not math.isnan(value)}


class UsageMeter:
    """Reads the share that this process takes. `first_of_node` says that it speaks for its node's processors."""

    def __init__(self, device: torch.device, first_of_node: bool, powercap: Path = Path("/sys/class/powercap")) -> None:
        self._device = device
        self._gpu = Energy(nvml_counters(str(torch.cuda.get_device_properties(device).uuid)) if _is_gpu(device) else [])
        self._cpu = Energy(rapl_counters(powercap)) if first_of_node else None
        self.restart()

    def restart(self) -> None:
        """Count energy from now on."""
        for energy in (self._gpu, self._cpu):
            if energy:
                energy.restart()

    def read(self) -> Usage:
        cpu_j = self._cpu.joules() if self._cpu else 0.0
        return Usage(self._gpu_gib(), _resident_bytes() / 2**30, self._gpu.joules(), cpu_j)

    def _gpu_gib(self) -> float:
        if not _is_gpu(self._device):
            return math.nan
        free, total = torch.cuda.mem_get_info(self._device)
        return (total - free) / 2**30


class Energy:
    """Sum of counters since a moment."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self.restart()

    def restart(self) -> None:
        self._start_j = self._total()

    def joules(self) -> float:
        """Joules since the restart; NaN where there is no counter, or one does not answer."""
        return self._total() - self._start_j

    def _total(self) -> float:
        try:
            return sum(counter() for counter in self._counters) if self._counters else math.nan
        except OSError:
            return math.nan


def rapl_counters(powercap: Path) -> list[Counter]:
    """Counters of the processor packages, Intel's and AMD's (RAPL); none where the kernel does not let this user read them."""
    found: list[Counter] = []
    for domain in sorted(powercap.glob("intel-rapl:*")):
        try:
            if domain.name.count(":") == 1 and (domain / "name").read_text().startswith("package-"):
                found.append(_Rapl(domain))  # others are parts of a package
        except (OSError, ValueError):
            return []  # a sum without one of them would be no sum
    return found


class _Rapl:
    """Counter of one package, which begins anew at a limit: after some minutes of a hot processor."""

    def __init__(self, domain: Path) -> None:
        self._file = domain / "energy_uj"
        self._limit = int((domain / "max_energy_range_uj").read_text())
        self._last, self._rounds = self._read(), 0

    def __call__(self) -> float:
        now = self._read()
        self._rounds += now < self._last
        self._last = now
        return (now + self._rounds * self._limit) / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())


def nvml_counters(uuid: str, library: str = "libnvidia-ml.so.1") -> list[Counter]:
    """Counter of an NVIDIA GPU (Volta or later), from the library that its driver brings; none where that does not tell."""
    try:
        nvml = ctypes.CDLL(library)
        device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()

        def ask(function: str, *arguments: object) -> None:
            status = getattr(nvml, function)(*arguments)
            if status:
                raise OSError(f"{function}: {status}")

        def joules() -> float:
            ask("nvmlDeviceGetTotalEnergyConsumption", device, ctypes.byref(millijoules))
            return millijoules.value / 1e3

        ask("nvmlInit_v2")
        ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid.removeprefix('GPU-')}".encode(), ctypes.byref(device))
        joules()
    except (OSError, AttributeError):  # no driver, no such function, no such counter
        return []
    return [joules]


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
