"""Restarts of a run without the queue, as its folder records them: RUN/restarts.jsonl, one a line."""

import json
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from data_pipeline.common.errors import printable
from launch.supervisor.supervisor import Restart

FILE = "restarts.jsonl"
_PATIENCE_S = 5.0


class Recorded(NamedTuple):
    """Restarts of a run so far."""

    number: int
    cause: str
    """Of the last one."""


def record_restart(run: Path, restart: Restart) -> None:
    """Print a restart, and add it to the run's file, if the run has a folder and the disk takes it.

    Waits for the disk only a moment: the other nodes would take a silent supervisor for lost.
    """
    writer = Thread(target=_write, args=(run, restart), daemon=True)
    writer.start()
    writer.join(_PATIENCE_S)


def _write(run: Path, restart: Restart) -> None:
    where = f" on {', '.join(restart.nodes)}" if any(restart.nodes) else ""
    print(printable(f"restart {restart.number}{where}: {restart.cause}"), flush=True)
    row = {"time": time.time(), "restart": restart.number, "cause": restart.cause, "nodes": list(restart.nodes)}
    with suppress(OSError), (run / FILE).open("a") as file:
        file.write(json.dumps(row) + "\n")


def recorded_restarts(run: Path) -> Recorded:
    """Read how often a run was restarted, and why last."""
    causes = []
    with suppress(OSError):
        for line in (run / FILE).read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # torn by a full disk
                causes.append(str(json.loads(line)["cause"]))
    return Recorded(len(causes), causes[-1] if causes else "")
