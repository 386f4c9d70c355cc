"""python -m tests.stress.soak [--minutes 60] [--out soak.csv]: train on small images for long, and see that nothing grows.

A run by two ranks of very many short epochs, each with an evaluation and checkpoints, is asked to stop after so many
minutes. Once a minute, of a shorter soak more often, the resident memory, open files and threads of each rank are appended
to a new file. The medians of its first and its last quarter are compared, after a warm-up. Exits with 1 where one has grown
by more than it may, or where the run does not end as it should.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from data_pipeline.common.cli import parse_plain
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import require
from tests.support.runs import QUICK, Job, dotted, ranks_of, render_images
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import Store

RANKS, TRAIN, VAL = 2, 240, 60
OPTIONS = QUICK | {"data.size_px": "32", "data.batch": "24", "run.epochs": "100000", "run.save_every": "5"}
WARM_UP = 0.1  # share of the rows in which pools of memory fill
LEAST_ROWS = 20  # of each rank
MAY_GROW = {"memory_mib": (0.03, 0.0), "files": (0.0, 1.0), "threads": (0.0, 1.0)}
"""By what share of the first quarter, or by how much beside it."""


class Usage(NamedTuple):
    """Resources that a rank takes at a moment."""

    minute: float
    rank: int
    step: int
    """Of the newest checkpoint."""
    memory_mib: float
    """Resident."""
    files: int
    """Open descriptors, those of sockets included."""
    threads: int


class Growth(NamedTuple):
    """Of one rank's memory, files or threads."""

    rank: int
    what: str
    first: float
    """Median of the first quarter of the rows."""
    last: float

    @property
    def too_much(self) -> bool:
        share, much = MAY_GROW[self.what]
        return self.last > self.first * (1 + share) + much


def usage_of(pid: int, rank: int, minute: float, step: int) -> Usage:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    memory_mib = int(status["VmRSS"].split()[0]) / 1024
    files, threads = len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
    return Usage(round(minute, 2), rank, step, round(memory_mib, 1), files, threads)


def watched(job: Job, run: Path, minutes: float, out: Path) -> list[Usage]:
    """The rows of `out`, as they were written. Raises `RuntimeError` where the run ends by itself."""
    usage: list[Usage] = []
    every_s = 60 * min(1, minutes / LEAST_ROWS)
    with out.open("x", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Usage._fields)
        while not Store(run).progress().step and job.process.poll() is None:
            time.sleep(1)
        begin_s = time.monotonic()
        for row in range(1, round(60 * minutes / every_s) + 1):
            time.sleep(max(begin_s + row * every_s - time.monotonic(), 0))
            if job.process.poll() is not None:
                raise RuntimeError(f"the run has ended\n{job.output()}")
            minute, step = (time.monotonic() - begin_s) / 60, Store(run).progress().step
            now = [usage_of(pid, rank, minute, step) for rank, pid in sorted(ranks_of(job).items())]
            writer.writerows(now)
            file.flush()
            usage += now
    return usage


def growths(usage: list[Usage]) -> list[Growth]:
    """First quarter against last, of each rank and column, the warm-up left out."""
    found = []
    for rank in range(RANKS):
        rows = [row for row in usage if row.rank == rank]
        rows = rows[int(WARM_UP * len(rows)) :]
        quarter = len(rows) // 4
        for what in MAY_GROW:
            first, last = (median(getattr(row, what) for row in part) for part in (rows[:quarter], rows[-quarter:]))
            found.append(Growth(rank, what, first, last))
    return found


def soak(folder: Path, minutes: float, out: Path) -> tuple[list[Usage], Progress]:
    """Train for so many minutes after the first checkpoint. Raises `RuntimeError` where the run ends otherwise."""
    run = folder / "run"
    options = OPTIONS | {"data.path": str(render_images(folder / "images", TRAIN, VAL)), "run.dir": str(run)}
    job = Job(RANKS, folder / "log", "trainer", *dotted(options), cold=True)
    try:
        usage = watched(job, run, minutes, out)
        job.terminate()
        job.wait()
    finally:
        job.kill()
    if "asked to stop: saved step" not in job.output():
        raise RuntimeError(f"the run was not saved when it was asked to stop\n{job.output()}")
    return usage, Store(run).progress()


def table_of(found: list[Growth]) -> Table:
    table = Table("rank", "what", "first quarter", "last quarter", "growth", "", box=None, pad_edge=False)
    for growth in found:
        change = growth.last / growth.first - 1
        cells = (str(growth.rank), growth.what, f"{growth.first:.0f}", f"{growth.last:.0f}", f"{change:+.2%}")
        table.add_row(*cells, "too much" if growth.too_much else "flat")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.soak", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=60, help="Minutes to train, from the first checkpoint on.")
    parser.add_argument("--out", type=Path, default=Path("soak.csv"), help="New file for what is measured.")
    args = parse_plain(parser, sys.argv[1:])
    require(args.minutes > 0, f"--minutes: {args.minutes} is not positive; give a number such as 60")
    require(not args.out.exists(), f"--out: {args.out} exists; give a new file")
    with tempfile.TemporaryDirectory(prefix="sluice-soak-") as folder:
        usage, progress = soak(Path(folder), args.minutes, args.out)
    found = growths(usage)
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table_of(found))
    print(f"{args.minutes:g} min, {progress.step} steps, {progress.cursor.epoch} epochs; each row is in {args.out}")
    sys.exit(int(any(growth.too_much for growth in found)))


if __name__ == "__main__":
    run_command(main)
