"""Start wandb's background process where the signals that a job gets do not reach it.

SLURM signals all descendants of a job's tasks (all but those in the cgroup of a cluster that has no
SignalChildrenProcesses), and wandb-core answers SIGTERM by leaving at once, with up to fifteen seconds of rows. So it gets
another parent, by a process in between that ends. It is told to leave by itself when nobody is connected any more, after
it has written and sent what it has; wandb's own way, to leave when its parent has gone, loses rows where that is killed.
"""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

try:
    from wandb.sdk.lib.service import service_process
except ImportError:  # another version of wandb: its process stays in its place
    service_process = None  # type: ignore[assignment]

IDLE_S = 30
"""Seconds without a connection after which the process ends: its training was killed."""
END_S = 60.0
"""Longest wait for it to end when it has been told to."""

_IN_BETWEEN = "import os, sys\nif os.fork() == 0: os.execv(sys.argv[1], sys.argv[1:])"


class _Apart(subprocess.Popen[bytes]):
    """wandb-core as wandb sees it: `poll` and `wait` ask about it, and not about the process in between."""

    def __init__(self, command: list[str], **options: Any) -> None:
        ended, open_while_it_lives = os.pipe()
        core = [*command, "--detached", "--idle-timeout", f"{IDLE_S}s"]
        super().__init__([sys.executable, "-ISc", _IN_BETWEEN, *core], pass_fds=(open_while_it_lives,), **options)
        os.close(open_while_it_lives)
        self._ended = os.fdopen(ended, "rb")
        super().wait()

    def poll(self) -> int | None:
        return 0 if select.select([self._ended], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> int:
        select.select([self._ended], [], [], END_S if timeout is None else timeout)
        return 0


@contextmanager
def started_apart() -> Iterator[None]:
    """Keep everything that wandb starts within it out of reach of signals to this process and its descendants."""
    if service_process is None:
        yield
        return
    plain = service_process.subprocess
    service_process.subprocess = SimpleNamespace(Popen=_Apart, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    try:
        yield
    finally:
        service_process.subprocess = plain
