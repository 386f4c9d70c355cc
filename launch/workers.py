"""Run the processes of a training on this machine, and again after a failure."""

import sys
from pathlib import Path

from launch.supervisor.ranks import NodeRanks, python
from launch.supervisor.record import record_restart
from launch.supervisor.supervisor import Supervisor
from trainer.checkpoint.snapshot_home import forget


def run_workers(ranks: int, module: str, arguments: list[str], run: Path, restarts: int = 0) -> int:
    """Run `python -m module arguments` in every process, again at most `restarts` times; `run` is the run folder.

    Returns 0, the exit code of the process that failed first, or 128 + N for signal N.
    """
    try:
        with NodeRanks(0, "", ranks, python(module, *arguments)) as own:
            end = Supervisor(own, restarts=restarts, told=lambda restart: record_restart(run, restart)).run()
    finally:
        forget(run)
    if end.code > 128 and not own.signalled:
        print(f"error: {end.cause}", file=sys.stderr)
    return end.code
