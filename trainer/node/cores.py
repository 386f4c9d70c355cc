"""Processor cores of each process of a node, near its GPU."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

SYSTEM = Path("/sys/devices/system")


def in_order(cpus: Iterable[int], system: Path = SYSTEM) -> list[int]:
    """Sort processors by NUMA node and physical core, so that neighbours share caches and memory."""
    node_of = {
        cpu: int(folder.name[4:])
        for folder in (system / "node").glob("node[0-9]*")
        for cpu in _parsed(_read(folder / "cpulist"))
    }

    def place(cpu: int) -> tuple[int, int, int]:
        siblings = _parsed(_read(system / f"cpu/cpu{cpu}/topology/thread_siblings_list"))
        return node_of.get(cpu, 0), min(siblings, default=cpu), cpu

    return sorted(cpus, key=place)


def share(ordered: Sequence[int], near: Sequence[int], local_rank: int) -> list[int]:
    """Cut `ordered` processors into equal parts, one a process; `near` has each one's NUMA node by local rank, or -1.

    Processes take the parts in the order of their NUMA nodes, so each gets cores of its own node where GPUs are spread
    evenly. Empty where there are fewer processors than processes.
    """
    size = len(ordered) // len(near)
    turn = sorted(range(len(near)), key=lambda rank: (near[rank], rank)).index(local_rank)
    return list(ordered[turn * size : (turn + 1) * size])


def numa_node(pci_address: str, devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """NUMA node of a device such as 0000:3b:00.0; -1 where the machine does not say."""
    text = _read(devices / pci_address / "numa_node").strip()
    return int(text) if re.fullmatch(r"\d+", text) else -1


def bind(cpus: Iterable[int]) -> None:
    """Keep this process, with the threads that it has and will have, on `cpus`."""
    chosen = set(cpus)
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), chosen)
        except ProcessLookupError:  # it has just ended
            continue


def _parsed(text: str) -> list[int]:
    """Numbers of a list such as 0-3,8."""
    spans = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [cpu for first, last in spans for cpu in range(int(first), int(last or first) + 1)]


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
