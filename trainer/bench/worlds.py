"""Several numbers of processes in turn, each measured by the benchmark under torchrun."""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipeline.bench.budget import rounds_within
from data_pipeline.common.errors import UserError
from data_pipeline.common.worker_pool import progress
from trainer.bench.turns import Measured

REPEATS = 3  # times that each number of processes is started


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
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "-m", "trainer.bench", *options], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            _, said = process.communicate()
        except BaseException:
            process.terminate()  # it ends its own processes, which a kill would not
            process.communicate()
            raise
    if process.returncode:
        for line in said.splitlines():
            if line.startswith("error: "):
                raise UserError(line.removeprefix("error: "))
        print(said, file=sys.stderr)
        processes = f"{world} process" + "es" * (world > 1)
        raise UserError(f"--worlds: {processes} ended with exit code {process.returncode}, as said above")
