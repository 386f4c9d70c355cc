"""Processes of this machine, as Linux tells of them."""

from contextlib import suppress
from pathlib import Path


def children(pid: int | str) -> list[int]:
    """List the processes that a process, or "self", has started and not yet waited for; [] where it has ended."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            found += [int(child) for child in file.read_text().split()]
    return found
