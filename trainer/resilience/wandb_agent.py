"""Runs that an agent of a W&B sweep (`wandb agent`) has started: which trial they are, and why they are asked to stop.

An agent ends a trial that W&B has stopped, by Hyperband or by hand, with SIGTERM to the command that it has started. Whoever
takes the machine away sends SIGTERM as well, but to the agent too. A trial of which the machine is taken W&B hands to the next
agent, under the same id; a stopped one must not come back.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self


class Trial(NamedTuple):
    """Run of a W&B sweep, as its agent names it in the environment."""

    id: str
    project: str | None
    entity: str | None


def trial_of(environment: Mapping[str, str]) -> Trial | None:
    """Return the trial that an environment is of; None outside of a W&B sweep."""
    run = environment.get("WANDB_RUN_ID")
    if not (run and environment.get("WANDB_SWEEP_ID")):
        return None
    return Trial(run, environment.get("WANDB_PROJECT") or None, environment.get("WANDB_ENTITY") or None)


class Agent(NamedTuple):
    """The agent that has started this process, or one above it, as it is seen at the start."""

    pid: int | None
    """None where none can be seen, as in a SLURM step or a container."""
    forwards: bool
    """True where it hands on every signal that it gets itself (`wandb agent --forward-signals`)."""

    @classmethod
    def above(cls) -> Self:
        """Find the agent among the processes above this one."""
        for pid in _ancestors(os.getpid()):
            words = _command(pid)
            if "agent" in words and any(Path(word).name in ("wandb", "wb") for word in words[: words.index("agent")]):
                return cls(pid, not {"-f", "--forward-signals"}.isdisjoint(words))
        return cls(None, False)

    def took_away(self, number: int | None) -> bool:
        """Return True where the signal `number` (None: another rank's) says that the machine is taken away.

        An agent stops a trial by SIGTERM, and then is there itself.
        """
        gone = self.pid is not None and _stat(self.pid)[:1] in ("Z", "")
        return gone or self.forwards or number not in (signal.SIGTERM, None)


def _ancestors(pid: int) -> Iterator[int]:
    """Yield the processes above `pid`, the nearest first."""
    while (pid := int((_stat(pid) or "X 0").split()[1])) > 1:
        yield pid


def _stat(pid: int) -> str:
    """Read state, parent and more of a process; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except OSError:
        return ""


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
