"""Results of a sweep: python -m launch summary SWEEP [--out FOLDER] [--force]

SWEEP is a folder in runs/, or a path. The results are printed, and written to the sweep's folder or to FOLDER:

summary.csv           a row for each run: its own options, state, epochs, best top-1 %, minutes, images/s
summary-seeds.csv     a row for each setting whose runs differ only in the seed: mean and spread of the finished ones
summary.png           best top-1 of each run, a line for each setting
"""

import io
import math
import sys
import time
from pathlib import Path

import pandas as pd

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.cli import parse_plain, plain_parser
from data_pipeline.common.errors import UserError, printable, printable_lines, require
from launch.runs import state_of
from launch.slurm.commands import Queued, queue
from launch.slurm.submission import newest
from launch.sweep.cli import Record, read_record
from launch.sweep.settings import label, shown
from trainer.report.run_reader import Run, read_run

BEST = {"best_map_pct": "mAP", "best_top1_pct": "top-1"}
"""Column of the best score, mAP where images have several classes, and its words."""
MINUTES, SPEED = "minutes", "images_per_s"
SEED = "run.seed"


def summarise(folder: Path, record: Record, jobs: dict[str, Queued], now_s: float) -> pd.DataFrame:
    """Make a row for each run of the sweep in `folder`, in the order of the record.

    Columns: `run`, the options in which the runs differ (as text, "" where a run does not set it), `state`, `done` (True
    where training reached its requested end), `epochs`, one of BEST, `minutes`, `images_per_s` (median over the rows
    of metrics). `minutes` are of training alone, without evaluation, checkpoints and interruptions. A run that cannot be read
    is left out, with a line on stderr. Raises `UserError` where no run can be read.
    """
    options = dict.fromkeys(key for setting in record.settings.values() for key in setting)
    rows, errors = [], []
    for name, setting in record.settings.items():
        own = {key: shown(setting[key]) if key in setting else "" for key in options}
        try:
            rows.append({"run": name, **own, **_figures(folder / name, record.failed.get(name), jobs, now_s)})
        except (UserError, OSError) as error:
            errors.append(error)
    if errors and not rows:
        raise UserError(str(errors[0]))
    # A run without any row of metrics does not know the kind of its images.
    several = "map_pct" in [row.pop("score") for row in rows]
    rows = [
        {"best_map_pct" if several and name == "best_top1_pct" else name: row[name] for name in row} for row in rows
    ]
    for why in errors:
        print(f"left out: {printable(str(why))}", file=sys.stderr)
    return pd.DataFrame(rows)


def _figures(folder: Path, exit_code: int | None, jobs: dict[str, Queued], now_s: float) -> dict[str, object]:
    run = read_run(folder) if (folder / "config.yaml").is_file() else Run(folder, {}, [], 0, False)
    speeds = [value for _, value in run.curve("perf/images_per_s") if math.isfinite(value)]
    return {
        "state": _state(run, exit_code, jobs, now_s),
        "done": run.finished or 0 < run.saved_step == run.options.get("run.max_steps"),
        "epochs": run.epochs,
        "best_top1_pct": run.best_pct,
        "score": run.score,
        MINUTES: run.minutes[-1] if run.rows else math.nan,
        SPEED: pd.Series(speeds, dtype=float).median(),
    }


def best_column(runs: pd.DataFrame) -> str:
    """Name the column of the runs' best score, one of BEST."""
    return next(name for name in BEST if name in runs)


def _state(run: Run, exit_code: int | None, jobs: dict[str, Queued], now_s: float) -> str:
    """Word the state: the checkpoint decides first, then SLURM, then the metrics."""
    submission = newest(run.folder)
    known = jobs.get(submission.job.id or "") if submission else None
    if run.finished:
        return "finished"
    if exit_code:
        return f"failed with exit code {exit_code}"
    if submission and (known or submission.end):
        return state_of(submission, known)
    return run.state(now_s) if run.options else "not begun"


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame | None:
    """Make a row for each setting, over its seeds and finished runs; None where no setting has several runs.

    Columns: the options, `runs`; of best top-1 `mean`, `std` (of a sample; NaN for one run), `min`, `max`, all in %; mean
    `minutes` and `images_per_s`.
    """
    keys = _options(runs)
    if not keys:
        runs, keys = runs.assign(setting="all"), ["setting"]
    if SEED not in runs or not runs.duplicated(keys).any():
        return None
    best = best_column(runs)
    score = best.removeprefix("best_")
    done = runs.assign(**{column: runs[column].where(runs.done) for column in (best, MINUTES, SPEED)})
    grouped = done.groupby(keys, sort=False)
    return grouped.agg(
        runs=(best, "count"),
        **{f"{name}_{score}": (best, name) for name in ("mean", "std", "min", "max")},
        minutes=(MINUTES, "mean"),
        images_per_s=(SPEED, "mean"),
    ).reset_index()


def _options(runs: pd.DataFrame) -> list[str]:
    """Names of the columns that are options, except the seed."""
    return [column for column in runs.columns if "." in column and column != SEED]


def plot(runs: pd.DataFrame, title: str) -> bytes:
    """Plot best top-1 of each run as a PNG: a line for each setting over its seeds, the best on top. Needs one finite value."""
    from matplotlib.figure import Figure
    # A setting is a line, the best on top.

    options = _options(runs)
    labels = [label({key.rpartition(".")[2]: row[key] for key in options if row[key]}) for _, row in runs.iterrows()]
    best = best_column(runs)
    labelled = runs.assign(label=labels).dropna(subset=[best])
    groups = {str(name): group for name, group in labelled.groupby("label", sort=False)}
    ranked = sorted(groups, key=lambda name: groups[name][best].mean())
    # Filled circles are finished runs, empty ones not; the bar is the mean of the finished.
    figure = Figure(figsize=(7.5, 1.6 + 0.32 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    for line, name in enumerate(ranked):
        group = groups[name]
        for done, face in ((True, "#0b6e99"), (False, "white")):
            values = group[group.done == done][best]
            axes.scatter(values, [line] * len(values), 42, facecolor=face, edgecolor="#0b6e99", zorder=3)
        axes.plot(
            [group[group.done][best].mean()] * 2,
            [line - 0.33, line + 0.33],
            color="black",
            linewidth=1.8,
            zorder=2,
            # Points outside the plot, for the legend.
        )
    axes.scatter([], [], 42, color="#0b6e99", label="a run")
    if not runs.dropna(subset=[best]).done.all():
        axes.scatter([], [], 42, facecolor="white", edgecolor="#0b6e99", label="a run that is not done")
    axes.plot([], [], color="black", linewidth=1.8, label="mean of those done")
    axes.set_yticks(range(len(ranked)), ranked, parse_math=False)
    axes.set(
        xlabel=f"best validation {BEST[best]}, %",
        ylim=(-0.7, len(ranked) - 0.3),
    )
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_title(title, parse_math=False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def _csv(table: pd.DataFrame) -> bytes:
    return table.map(lambda cell: printable(cell) if isinstance(cell, str) else cell).to_csv(index=False).encode()


def text_of(table: pd.DataFrame) -> str:
    """Format a table for people: rounded figures, and an empty cell where there is no figure."""
    rounded = table.drop(columns="done", errors="ignore").copy()
    for column in rounded.select_dtypes("number"):
        digits = 0 if column in (SPEED, "runs") else 2
        rounded[column] = [f"{value:.{digits}f}" if math.isfinite(value) else "" for value in rounded[column]]
    return printable_lines(rounded.to_string(index=False))


def jobs_if_any() -> dict[str, Queued]:
    """SLURM's jobs; none on a machine without SLURM, as the folders record the rest."""
    try:
        return queue()
    except UserError:
        return {}


def main(arguments: list[str]) -> None:
    parser = plain_parser("python -m launch summary", "Print and write what a sweep has found.")
    parser.add_argument("sweep", metavar="SWEEP", help="The sweep's folder, or its name in runs/.")
    parser.add_argument("--out", help="The folder to write to; the sweep's own if not given.")
    parser.add_argument("--force", action="store_true", help="Replace the files if they exist.")
    args = parse_plain(parser, arguments)
    folder = next(
        (path for path in (Path("runs") / args.sweep, Path(args.sweep)) if read_record(path)), Path(args.sweep)
    )
    record = read_record(folder)
    if record is None:
        raise UserError(f"SWEEP: {folder} holds no sweep; python -m launch sweep makes one in runs/")
    # Refuse to replace files before anything is computed.
    out = Path(args.out) if args.out else folder
    require(out.is_dir(), f"--out: {out} is not a folder; make it, or give another")
    for name in ("summary.csv", "summary-seeds.csv", "summary.png"):
        require(args.force or not (out / name).exists(), f"--out: {out / name} exists; give --force to replace it")

    # People read rounded figures on the screen; the files keep all digits.
    runs = summarise(folder, record, jobs_if_any(), time.time())
    seeds = over_seeds(runs)
    for table in (runs, seeds):
        if table is not None:
            print(text_of(table), end="\n\n")
    files = {"summary.csv": _csv(runs.drop(columns="done"))}
    if seeds is not None:
        files["summary-seeds.csv"] = _csv(seeds)
    best = best_column(runs)
    if runs[best].notna().any():
        files["summary.png"] = plot(
            runs,
            f"{folder.resolve().name}: best {BEST[best]} of each setting",
        )
    for name, content in files.items():
        try:
            replace_file(out / name, content)
        except OSError as error:
            raise UserError(f"--out: cannot write {out / name} ({error.strerror}); give another folder") from None
    print(f"written to {printable(str(out))}: {', '.join(files)}")
