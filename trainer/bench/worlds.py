"""Several numbers of processes in turn, each measured by the benchmark under torchrun."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from data_pipeline.bench.budget import rounds_within
from data_pipeline.common.errors import UserError
from data_pipeline.common.processes import children
from data_pipeline.common.worker_pool import progress
from trainer.bench.turns import Measured

REPEATS = 3  # times that each number of processes is started

_PR_SET_CHILD_SUBREAPER = 36


def measure_worlds(worlds: list[int], options: list[str], minutes: float, into: Measured) -> None:
    """Measure with each number of processes in turn, REPEATS times or less, by this command under torchrun.

    Raises `UserError`, that of a process where one raised it.
    """
    deadline_s = time.monotonic() + 60 * minutes
    starts = REPEATS * len(worlds)
    with progress("measuring", starts, unit="starts") as advance:
        for repeat in rounds_within(REPEATS, deadline_s):
            for world in worlds:
                left_s = max(deadline_s - time.monotonic(), 1.0)
                _measure_world(world, repeat, [*options, "--minutes", f"{left_s / starts / 60:.2f}"], into)
                starts -= 1
                advance(1)
    if starts:
        short = f"each was started {repeat + 1} of {REPEATS} times, as more did not fit into {minutes:g} minutes"
        print(f"{short}: give more --minutes", file=sys.stderr)


def _measure_world(world: int, repeat: int, options: list[str], into: Measured) -> None:
    with TemporaryDirectory(prefix="sluice-bench-") as folder:
        try:
            _torchrun(world, [*options, "--out", folder])
        finally:  # its results until it was broken off count as well
            file = Path(folder) / "bench.json"
            if file.exists():
                measured = json.loads(file.read_text())
                into.rows += [row | {"repeat": repeat} for row in measured["rounds"]]
                into.facts[world] = measured["facts"][0]


def _torchrun(world: int, options: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    with TemporaryFile("w+") as file:
        with _no_orphans():
            process = subprocess.Popen(
                [*command, "-m", "trainer.bench", *options], stdout=subprocess.DEVNULL, stderr=file
            )
            try:
                process.wait()
            except BaseException:
                process.terminate()  # its ranks then write their results
                process.wait()
                raise
        file.seek(0)
        said = file.read()
    if process.returncode:
        for line in said.splitlines():
            if line.startswith("error: "):
                raise UserError(line.removeprefix("error: "))
        print(said, file=sys.stderr)
        processes = f"{world} process" + "es" * (world > 1)
        raise UserError(f"--worlds: {processes} ended with exit code {process.returncode}, as said above")


@contextmanager
def _no_orphans() -> Iterator[None]:
    """Kill at the end what was started within: torchrun leaves ranks behind if it is killed, or stopped while it starts one.

    Linux only.
    """
    _adopt_orphans(True)
    before = set(children("self"))
    try:
        yield
    finally:
        # Those that a killed process leaves behind come next.
        while left := set(children("self")) - before:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            for pid in left:
                os.waitpid(pid, 0)
        _adopt_orphans(False)


def _adopt_orphans(wanted: bool) -> None:
    """Have the kernel make this process, in place of the first one, the parent of those below it whose parent has ended."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted))
