"""Consequences of the end of a rank, or of the loss of a node: pure functions."""

import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainer.resilience.signals import SIGNALS

MISTAKE, STALLED = 2, os.EX_TEMPFAIL
"""Exit codes of a rank that has met a user's mistake, and of one that leaves a hanging run (see `watchdog`)."""


@dataclass(frozen=True)
class Failure:
    """End of a rank before the training had ended, or the loss of its node."""

    node: int
    """Number of the node."""
    name: str
    """Name of the node; empty where it is the only one."""
    rank: int = -1
    """Number of the rank; -1 where the whole node is lost."""
    code: int = 1
    """Exit code, negative for a signal."""

    @property
    def lost(self) -> bool:
        """True for the loss of a whole node."""
        return self.rank < 0

    def __str__(self) -> str:
        where = f" on {self.name}" if self.name else ""
        if self.lost:
            return f"node {self.name} is lost"
        if self.code == STALLED:
            return f"rank {self.rank}{where} found that nothing moves"
        if self.code < 0:
            return f"rank {self.rank}{where} was ended by {signal.Signals(-self.code).name}"
        return f"rank {self.rank}{where} ended with exit code {self.code}"

    @property
    def exit_code(self) -> int:
        """Exit code as a shell gives it: 128 + N for signal N."""
        return 128 - self.code if self.code < 0 else self.code

    @property
    def asked(self) -> bool:
        """True where the rank has saved and ended because a signal asked for it."""
        return not self.lost and (-self.code in SIGNALS or self.code - 128 in SIGNALS)  # Python answers SIGINT with 130


def first_cause(failures: Iterable[Failure]) -> Failure:
    """Choose the cause among failures of one moment: the ranks that lose their connections to it fail as well.

    A mistake comes first, since no restart mends it, then what comes from outside.
    """

    def order(failure: Failure) -> int:
        causes = (failure.code == MISTAKE, failure.lost, failure.code < 0, failure.code == STALLED)
        return causes.index(True) if True in causes else len(causes)

    return min(failures, key=order)


def may_restart(cause: Failure, restarts: int, limit: int) -> bool:
    """Return True where the ranks are started again after `cause`, when it has been done `restarts` times already."""
    return cause.code != MISTAKE and not cause.asked and restarts < limit


def choose_nodes(failures: Mapping[int, int], wanted: int) -> list[int] | None:
    """Choose the nodes to train on, by the number of failures on each that is there; the others are spares.

    None where there are too few.
    """
    chosen = sorted(failures, key=lambda node: (failures[node], node))[:wanted]
    return sorted(chosen) if len(chosen) == wanted else None
