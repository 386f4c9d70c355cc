"""This process's place among those that a launcher started. Read here alone, and without torch."""

import os
import sys


def launched_rank() -> int:
    """Rank as the launcher says in RANK; 0 without one."""
    return int(os.environ.get("RANK", 0))


def warn_on_rank0(line: str) -> None:
    """Print a line on stderr, once for all ranks."""
    if launched_rank() == 0:
        print(line, file=sys.stderr, flush=True)


_leaves_alone = False


def leave_alone() -> None:
    """Note that this process ends for a reason that the other ranks do not know of, who may wait for it."""
    global _leaves_alone
    _leaves_alone = True


def leaves_alone() -> bool:
    """Return True once `leave_alone` was called: this process must speak for itself, and wait for nobody."""
    return _leaves_alone
