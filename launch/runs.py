"""python -m launch status [FOLDER], logs [-f] NAME, cancel NAME: runs that were submitted, and what became of them.

All is read from the run folders and from the controller's queue; no accounting is needed.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError
from launch.slurm.commands import Queued, queue, run_slurm
from launch.slurm.submission import Submission, find, newest

POLL_S = 0.5


class Row(NamedTuple):
    """A run in the table of `status`."""

    name: str
    state: str
    nodes: str
    restarts: int
    epoch: float | None
    images_per_s: float | None
    best_top1_pct: float | None


def status(arguments: list[str]) -> None:
    """Print a table of the runs in a folder, runs/ if not given. Raises `UserError`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    folder = Path("".join(arguments[:1]) or "runs")
    rows = table(folder, queue())
    if not rows:
        raise UserError(f"{folder}: no run in it was submitted; `python -m launch submit` does that")
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "nodes", "restarts", "epoch", "img/s", "best top-1 %"):
        shown.add_column(name, no_wrap=True, justify="left" if name in ("run", "state", "nodes") else "right")
    for row in rows:
        figures = (_figure(row.epoch, ".2f"), _figure(row.images_per_s, ".0f"), _figure(row.best_top1_pct, ".2f"))
        shown.add_row(*map(Text, (row.name, row.state, row.nodes, str(row.restarts), *figures)))
    wide = None if sys.stdout.isatty() else 10_000  # a file or a pipe takes whole names
    Console(width=wide, highlight=False).print(shown)


def table(folder: Path, jobs: dict[str, Queued]) -> list[Row]:
    """The submitted runs in `folder`, and those of the sweeps in it, by name."""
    folders = sorted([*folder.glob("*/"), *folder.glob("*/*/")])
    runs = [(run, newest(run)) for run in folders]
    return [_row(str(run.relative_to(folder)), run, submission, jobs) for run, submission in runs if submission]


def _row(name: str, run: Path, submission: Submission, jobs: dict[str, Queued]) -> Row:
    known = jobs.get(submission.job.id or "")
    last: dict[str, Any] = {}
    for row in _rows(run):
        last |= {name: value for name, value in row.items() if value is not None}
    return Row(
        name,
        state_of(submission, known),
        known.nodes if known else "",
        max(submission.restarts, known.restarts if known else 0),
        last.get("epoch"),
        last.get("perf/images_per_s"),
        last.get("val/best_top1_pct"),
    )


def state_of(submission: Submission, known: Queued | None) -> str:
    """SLURM's word while the job is in its hands, with the reason for waiting; then the job's own."""
    if known and known.active:
        waits = known.state == "PENDING" and known.reason not in ("", "None")
        return known.state.lower() + (f" ({known.reason})" if waits else "")
    return submission.end or (known.state.lower() if known else "gone")


def _rows(run: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of the run's metrics."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return
    yield from (json.loads(line) for line in lines if line.endswith("\n"))


def _figure(value: float | None, layout: str) -> str:
    return "" if value is None else format(value, layout)


def logs(arguments: list[str]) -> None:
    """Print what rank 0 of a run says; with -f, until the job has ended. Raises `UserError`."""
    follow, names = "-f" in arguments, [one for one in arguments if one != "-f"]
    if len(names) != 1:
        raise UserError("NAME: give the name of one run; call python -m launch logs [-f] NAME")
    _, submission = find(names[0])
    job = submission.job.id or ""
    texts = (submission.script_log, submission.rank_log(0))
    for text in tail(texts, lambda: follow and (known := queue().get(job)) is not None and known.active):
        print(text, end="", flush=True)


def tail(files: tuple[Path, ...], goes_on: Callable[[], bool]) -> Iterator[str]:
    """What is in `files`, and what is added to them while it goes on; whole lines, those of one file together."""
    read = dict.fromkeys(files, 0)
    more = True
    while more:
        more = goes_on()  # asked first: what came until then is still read
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
    """End a run's job for good; where it runs, it saves first. Raises `UserError`."""
    if len(arguments) != 1:
        raise UserError("NAME: give the name of one run; call python -m launch cancel NAME")
    run, submission = find(arguments[0])
    job = submission.job.id or ""
    known = queue().get(job)
    if known is None or not known.active:
        raise UserError(f"{arguments[0]}: its job {job} has ended already: {state_of(submission, known)}")
    run_slurm("scancel", job)
    submission.write_restarts(crashes=submission.crashes, restarts=known.restarts, end="cancelled")
    print(f"job {job} of {run} is being ended; python -m launch resubmit goes on where it saved")
