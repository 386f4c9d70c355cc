"""python -m launch status [FOLDER], logs [-f] RUN, cancel RUN: runs submitted to SLURM, and their state.

All is read from the run folders and from the controller's queue; no accounting is needed.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_pipeline.common.cli import parse_plain, plain_parser
from data_pipeline.common.errors import UserError, printable
from launch.slurm.commands import Queued, queue, run_slurm
from launch.slurm.slow_nodes import slow_ranks
from launch.slurm.submission import Submission, find, newest
from launch.supervisor.record import recorded_restarts
from trainer.checkpoint.run_folder import read_job
from trainer.tracking.json_lines import METRICS, read_lines

POLL_S = 0.5
ETA_ROWS, GAP_S = 50, 600.0
"""Rows of metrics that an estimate rests on, and the longest time between two of them without an interruption."""

REASONS = {
    "Resources": "no free nodes yet",
    "Priority": "others come first",
    "JobArrayTaskLimit": "as many of its sweep run as may",
    "Dependency": "waits for another job",
    "BeginTime": "starts again in a moment",
    "JobHeldUser": "held; scontrol release lets it go",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "Reservation": "waits for its reservation",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is down",
    "PartitionNodeLimit": "more nodes than the partition allows",
    "PartitionTimeLimit": "more time than the partition allows",
    "NodeDown": "a node is down",
    "launch failed requeued held": "a node failed to start it, and it is held; scontrol release lets it go",
}
"""Reason for waiting, as SLURM names it, and its meaning in words."""


class Row(NamedTuple):
    """A run in the table of `status`."""

    name: str
    state: str
    nodes: str
    restarts: int
    """Those by SLURM, and those within the allocation."""
    epoch: float | None
    left_s: float | None
    """Seconds until the run has trained all its epochs; None unless it is training."""
    images_per_s: float | None
    best_top1_pct: float | None
    slow: str
    """Ranks that hold up the others, as "rank 3 on gpu07 (data, 41 %)"; empty without any."""
    best_map_pct: float | None
    """In place of top-1 where images have several classes."""


def status(arguments: list[str]) -> None:
    """Print a table of the runs in a folder, runs/ if not given. Raises `UserError`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    parser = plain_parser(
        "python -m launch status", "A table of the runs that SLURM has, or has had, and of how far they are."
    )
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="Of run folders. Default: runs.")
    folder = Path(parse_plain(parser, arguments).folder)
    rows = table(folder, queue(), time.time())
    if not rows:
        raise UserError(f"{folder}: no run in it was submitted; `python -m launch submit` does that")
    # A pipe gets whole names, however long: a script may read them.
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "nodes", "restarts", "epoch", "eta", "img/s", "best top-1 %"):
        shown.add_column(name, no_wrap=True, justify="left" if name in ("run", "state", "nodes") else "right")
    slow = any(row.slow for row in rows)
    if slow:
        shown.add_column("slow ranks", no_wrap=True)
    for row in rows:
        eta = "" if row.left_s is None else str(timedelta(seconds=round(row.left_s)))
        best = _figure(row.best_top1_pct, ".2f") if row.best_map_pct is None else f"{row.best_map_pct:.2f} mAP"
        figures = (_figure(row.epoch, ".2f"), eta, _figure(row.images_per_s, ".0f"), best)
        words = (row.name, row.state, row.nodes, str(row.restarts), *figures, *([row.slow] if slow else []))
        shown.add_row(*(Text(printable(word)) for word in words))
    wide = None if sys.stdout.isatty() else 10_000
    Console(width=wide, highlight=False).print(shown)


def table(folder: Path, jobs: dict[str, Queued], now_s: float) -> list[Row]:
    """Rows for the runs in `folder`, and in its sweeps, that SLURM has or had, by name, at `now_s` (Unix seconds)."""
    folders = sorted([*folder.glob("*/"), *folder.glob("*/*/")])
    return [row for run in folders if (row := _row(str(run.relative_to(folder)), run, jobs, now_s))]


def _row(name: str, run: Path, jobs: dict[str, Queued], now_s: float) -> Row | None:
    submission, plain = newest(run), read_job(run)
    if not (submission or plain):
        return None
    known = jobs.get(submission.job.id or "" if submission else plain)
    lines = list(read_lines(run / METRICS))
    rows = [line for line in lines if "alert" not in line]
    last: dict[str, Any] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if value is not None}
    state = state_of(submission, known) if submission else _plain_state(run, known)
    within = recorded_restarts(run)
    return Row(
        name,
        f"{state}; last restart: {within.cause}" if within.cause and state == "running" else state,
        known.nodes if known else "",
        max(submission.restarts if submission else 0, known.restarts if known else 0) + within.number,
        last.get("epoch"),
        _seconds_left(run, rows, now_s) if known and known.state == "RUNNING" else None,
        last.get("perf/images_per_s"),
        last.get("val/best_top1_pct"),
        "; ".join(
            f"rank {one['rank']} on {one['node']} ({one['phase']}, {one['slower_pct']:.0f} %)"
            for one in slow_ranks(lines)
        ),
        last.get("val/best_map_pct"),
    )


def state_of(submission: Submission, known: Queued | None) -> str:
    """SLURM's word while it has the job, with the reason for waiting; afterwards the state that the job itself recorded."""
    if known and known.active:
        return _state_in_words(known)
    return submission.end or (known.state.lower() if known else "gone")


def _state_in_words(job: Queued) -> str:
    """Word a state, such as "pending: no free nodes yet (Resources)"."""
    if job.state != "PENDING" or job.reason in ("", "None"):
        return job.state.lower()
    why = next((words for reason, words in REASONS.items() if job.reason.startswith(reason)), None)
    limit = "a limit on what may run at once" if job.reason.startswith(("QOS", "Assoc", "MaxJobs")) else None
    return f"pending: {why or limit} ({job.reason})" if why or limit else f"pending ({job.reason})"


def _plain_state(run: Path, known: Queued | None) -> str:
    """State of a run that `sbatch` alone has submitted: only the run folder records its end."""
    if known and known.active:
        return _state_in_words(known)
    try:
        finished = json.loads((run / "checkpoints/last/progress.json").read_text())["finished"]
    except (OSError, ValueError, KeyError, TypeError):
        finished = False
    return "finished" if finished else known.state.lower() if known else "stopped"


def _seconds_left(run: Path, rows: list[dict[str, Any]], now_s: float) -> float | None:
    """Estimate from the speed of the last rows, leaving out gaps in which the job did not run."""
    try:
        epochs = float(yaml.safe_load((run / "config.yaml").read_text())["run"]["epochs"])
        points = [(float(row["time"]), float(row["epoch"])) for row in rows[-ETA_ROWS:]]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    gaps = [n for n in range(1, len(points)) if points[n][0] - points[n - 1][0] > GAP_S]
    points = points[gaps[-1] :] if gaps else points
    if len(points) < 2 or points[-1][1] <= points[0][1]:
        return None
    (start_s, start), (end_s, end) = points[0], points[-1]
    return max(0.0, (epochs - end) * (end_s - start_s) / (end - start) - (now_s - end_s))


def _figure(value: float | None, layout: str) -> str:
    return "" if value is None else format(value, layout)


def logs(arguments: list[str]) -> None:
    """Print the output of a run's rank 0; with -f, until the job has ended. Raises `UserError`."""
    parser = plain_parser(
        "python -m launch logs", "What rank 0 of a submitted run says; every rank has a file, in RUN/slurm/."
    )
    parser.add_argument("run", metavar="RUN", help="Name of a run in runs/, or its folder.")
    parser.add_argument("-f", "--follow", action="store_true", help="Go on until the job has ended.")
    args = parse_plain(parser, arguments)
    follow = args.follow
    _, submission = find(args.run)
    job = submission.job.id or ""
    texts = (submission.script_log, submission.node_log(0), submission.rank_log(0))
    for text in tail(texts, lambda: follow and (known := queue().get(job)) is not None and known.active):
        print(text, end="", flush=True)


def tail(files: tuple[Path, ...], goes_on: Callable[[], bool]) -> Iterator[str]:
    """Yield the text of `files`, and text added to them while `goes_on()`; whole lines, those of one file together."""
    read = dict.fromkeys(files, 0)
    more = True
    while more:
        more = goes_on()  # asked first, so that what was written before the end is still read
        for path in files:
            if path.exists():
                with path.open("rb") as file:
                    file.seek(read[path])
                    text = file.read()
                whole = text[: text.rfind(b"\n") + 1] if more else text
                read[path] += len(whole)
                if whole:
                    yield whole.decode(errors="replace")
        if more:
            time.sleep(POLL_S)


def cancel(arguments: list[str]) -> None:
    """End a run's job for good; if it is running, it saves first. Raises `UserError`."""
    parser = plain_parser("python -m launch cancel", "End a run's job for good; where it trains, it saves first.")
    parser.add_argument("run", metavar="RUN", help="Name of a run in runs/, or its folder.")
    name = parse_plain(parser, arguments).run
    run, submission = find(name)
    job = submission.job.id or ""
    known = queue().get(job)
    if known is None or not known.active:
        raise UserError(f"{name}: its job {job} has ended already: {state_of(submission, known)}")
    run_slurm("scancel", job)
    submission.write_restarts(crashes=submission.crashes, restarts=known.restarts, end="cancelled")
    print(f"job {job} of {printable(str(run))} is being ended; python -m launch resubmit goes on where it saved")
