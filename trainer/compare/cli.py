"""Compare runs side by side: python -m trainer.compare RUN RUN... [--out comparison] [--targets 75,84.2,90] [--force]

Runs that differ only in their seed are one setting, shown as mean and spread. --out is a folder, which then holds

report.html           everything below on one page that needs nothing else
runs.csv              a row for each run: epochs, best top-1, last losses and training accuracy, images/s, minutes
settings.csv          a row for each setting: mean and standard deviation of the same figures over its runs
targets.csv           epochs and minutes until validation top-1 first reaches each target
options.csv           the options in which the settings differ
epochs.csv            the data of the curves, a row for each epoch and validation of a run
classes.csv           the first setting against each other one, class by class, where both have predictions
curves-epochs.png, curves-minutes.png, classes.png
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.cli import parse_plain, plain_parser
from data_pipeline.common.errors import UserError, printable, require
from trainer.compare import page
from trainer.compare.mcnemar import PREDICTIONS, per_class, read_predictions
from trainer.report.run_reader import Run, read_run

SAME = ("run.name", "run.dir", "run.seed")
"""Options in which runs of one setting may differ."""
TARGETS_PCT = (50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0, 97.0, 99.0)
METRICS = ("val/top1_pct", "train/top1_pct", "val/loss", "train/loss", "train/lr", "perf/images_per_s")
FIGURES = ("epochs", "best_top1_pct", "val_loss", "train_loss", "train_top1_pct", "images_per_s", "minutes")
"""Columns of `run_table`, each a figure of a run."""
LABEL_METRICS = ("val/map_pct", "val/macro_f1_pct", *METRICS[2:])
LABEL_FIGURES = ("epochs", "best_map_pct", "val_loss", "train_loss", "val_macro_f1_pct", "images_per_s", "minutes")
"""The same where images have several classes, of which there is no training accuracy."""


def metrics_of(run: Run) -> tuple[str, ...]:
    return LABEL_METRICS if run.score == "map_pct" else METRICS


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in their seed."""

    name: str
    runs: list[Run]
    """At least one."""


def settings_of(runs: list[Run]) -> list[Setting]:
    """Group the runs by setting, both in the order given; a setting's name is the common beginning of its runs' names."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [printable(str(run.folder)) for run in runs]
    groups: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        key = repr(sorted((option, value) for option, value in run.options.items() if option not in SAME))
        groups.setdefault(key, []).append(number)
    shared = [_shared([names[number] for number in members]) for members in groups.values()]
    if len(set(shared)) < len(shared):  # as where runs are named only by their seeds
        shared = [names[members[0]] for members in groups.values()]
    return [
        Setting(name, [runs[number] for number in members])
        for name, members in zip(shared, groups.values(), strict=True)
    ]


def _shared(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    start = os.path.commonprefix(names)  # noqa: RUF071, names are no paths
    joints = "-_./ =,"
    return start.rstrip(joints).removesuffix("seed").rstrip(joints) or names[0]


def run_table(settings: list[Setting]) -> pd.DataFrame:
    """Make a row for each run: `setting`, `run`, `seed` and FIGURES.

    Losses in nats and accuracies in % are those of the last epoch; `images_per_s` is the median over its epochs, and
    `minutes` are of training alone, without evaluation, checkpoints and interruptions.
    """
    rows = []
    for setting in settings:
        for run in setting.runs:
            epochs = epoch_table(run)
            several = run.score == "map_pct"
            last = {metric: _last(epochs, metric) for metric in metrics_of(run)}
            figures = (
                run.epochs,
                run.best_pct,
                last["val/loss"],
                last["train/loss"],
                last["val/macro_f1_pct" if several else "train/top1_pct"],
                epochs["perf/images_per_s"].median(),
                run.minutes[-1] if run.rows else math.nan,
            )
            identity = {"setting": setting.name, "run": run.name, "seed": str(run.options.get("run.seed", ""))}
            rows.append({**identity, **dict(zip(LABEL_FIGURES if several else FIGURES, figures, strict=True))})
    return pd.DataFrame(rows)


def _last(epochs: pd.DataFrame, metric: str) -> float:
    values = epochs[metric].dropna().to_numpy()
    return float(values[-1]) if len(values) else math.nan


def epoch_table(run: Run) -> pd.DataFrame:
    """Make a row for each epoch and evaluation of a run: `epoch`, `minutes`, and `metrics_of` it, NaN where a row has none.

    The learning rate is that of the last optimizer step reported before it, as rows of whole epochs have none.
    """
    table = pd.DataFrame(run.rows, columns=["epoch", "time", *metrics_of(run)], dtype=float)
    table.insert(1, "minutes", run.minutes)
    table["train/lr"] = table["train/lr"].ffill()
    told = {f"val/{run.score}", "perf/epoch_s"}
    wanted = pd.Series([not told.isdisjoint(row) for row in run.rows], dtype=bool)
    return table[wanted].drop(columns="time").drop_duplicates("epoch", keep="last").reset_index(drop=True)


def rate_table(run: Run) -> pd.DataFrame:
    """Make a row for each row of metrics that has the learning rate: `epoch`, `minutes`, `train/lr`."""
    table = pd.DataFrame(run.rows, columns=["epoch", "train/lr"], dtype=float)
    table.insert(1, "minutes", run.minutes)
    return table.dropna()


def _stacked(settings: list[Setting], table: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
    """Stack the tables of all runs, with the columns `setting`, `run` and `folder`."""
    parts = [
        table(run).assign(setting=setting.name, run=run.name, folder=printable(str(run.folder)))
        for setting in settings
        for run in setting.runs
    ]
    return pd.concat(parts, ignore_index=True)


def setting_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Make a row for each setting: `runs` (their number), then mean and standard deviation (of a sample) of each of FIGURES."""
    grouped = runs.groupby("setting", sort=False)
    table = pd.DataFrame({"runs": grouped.size()})
    for figure in (name for name in dict.fromkeys((*FIGURES, *LABEL_FIGURES)) if name in runs):
        table[f"{figure}_mean"], table[f"{figure}_std"] = grouped[figure].mean(), grouped[figure].std()
    return table.reset_index()


def target_table(settings: list[Setting], targets_pct: list[float]) -> pd.DataFrame:
    """Make a row for each run and target: epoch and minutes of the first evaluation that reaches it, NaN where none does."""
    rows = []
    for setting in settings:
        for run in setting.runs:
            epochs = epoch_table(run)
            for target in targets_pct:
                reached = epochs[epochs[f"val/{run.score}"] >= target].head(1)
                epoch, minutes = reached[["epoch", "minutes"]].to_numpy().flatten() if len(reached) else (math.nan,) * 2
                rows.append((setting.name, run.name, target, epoch, minutes))
    return pd.DataFrame(rows, columns=["setting", "run", "target_pct", "epoch", "minutes"])


def usual_targets(runs: pd.DataFrame) -> list[float]:
    """Choose targets: the lowest of the runs' bests, which all reach, and the highest round accuracies that any reaches."""
    bests = runs["best_map_pct" if "best_map_pct" in runs else "best_top1_pct"].dropna()
    if bests.empty:
        return []
    round_ones = [target for target in TARGETS_PCT if target <= bests.max()][-4:]
    return sorted({*round_ones, math.floor(bests.min() * 100) / 100})


def option_table(settings: list[Setting]) -> pd.DataFrame:
    """Make a row for each option in which the settings differ: `option`, then its value in each setting, "" where it has none."""
    columns = {setting.name: setting.runs[0].options for setting in settings}
    options = [key for key in dict.fromkeys(key for own in columns.values() for key in own) if key not in SAME]
    rows = [(key, *(_shown(own[key]) if key in own else "" for own in columns.values())) for key in options]
    return pd.DataFrame([row for row in rows if len(set(row[1:])) > 1], columns=["option", *columns])


def _shown(value: object) -> str:
    """Write a value as in YAML."""
    return printable(json.dumps(value, ensure_ascii=False, default=str).strip('"'))


def class_table(settings: list[Setting]) -> tuple[pd.DataFrame, list[str]]:
    """Run `per_class` on the first setting and each other one, with columns `first` and `second`; and say what is missing.

    Each setting is represented by its first run that has predictions: pooled over seeds, pairs would not be independent.
    """
    chosen, notes = [], []
    if settings[0].runs[0].score == "map_pct":
        return pd.DataFrame(), [
            "McNemar's test is for images of one class each; classes.csv of python -m trainer.report has AP and F1"
        ]
    for setting in settings:
        found = next(
            ((run, table) for run in setting.runs if (table := read_predictions(run.folder)) is not None), None
        )
        if found:
            chosen.append((setting.name, *found))
        elif saved := next((run for run in setting.runs if run.saved_step), None):
            folder = printable(str(saved.folder))
            notes.append(f"{setting.name} has no {PREDICTIONS}; to compare classes: python -m trainer.report {folder}")
        else:
            notes.append(f"{setting.name} has no {PREDICTIONS}, and no checkpoint to make it from")
    parts = []
    for name, _, predictions in chosen[1:]:
        compared = per_class(chosen[0][2], predictions)
        if compared.empty:
            notes.append(f"{chosen[0][0]} and {name} have no validation image in common")
        else:
            compared.insert(0, "second", name)
            compared.insert(0, "first", chosen[0][0])
            parts.append(compared)
            left = max(len(chosen[0][2]), len(predictions)) - int(compared.images.iloc[0])
            if left:
                notes.append(f"{left} images are not in the predictions of both {chosen[0][0]} and {name}")
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(), notes


def parse(arguments: list[str]) -> tuple[list[Run], Path, list[float], bool]:
    """Parse the runs, the output folder, the targets in % and if files may be replaced. Raises `UserError`."""
    parser = plain_parser("python -m trainer.compare", "Put runs side by side: tables, curves, a report.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run folders, two or more.")
    parser.add_argument("--out", default="comparison", help="The folder to write to.")
    parser.add_argument(
        "--targets", help="Validation top-1, or mAP, in %%, as 75,84.2,90; what the runs reach if not given."
    )
    parser.add_argument("--force", action="store_true", help="Replace an earlier comparison in --out.")
    args = parse_plain(parser, arguments)
    folders = list({Path(name).resolve(): Path(name) for name in args.runs}.values())
    require(len(folders) > 1, f"RUN: {args.runs[0]} is the only one; give two or more run folders")
    for folder in folders:
        require((folder / "config.yaml").is_file(), f"RUN: {folder} is no run folder; give one such as runs/builtin")
    try:
        targets = sorted({float(part) for part in args.targets.split(",")}) if args.targets else []
    except ValueError:
        targets = [math.nan]
    require(
        all(0 < target <= 100 for target in targets),
        f"--targets: {args.targets} are no percentages; give some as 75,84.2,90",
    )
    runs = [read_run(folder) for folder in folders]
    for first, second in combinations(runs, 2):
        require(
            not first.rows or first.rows != second.rows,
            f"RUN: {second.folder} is a copy of {first.folder}, by their metrics.jsonl, and would count twice; leave one out",
        )
    return runs, Path(args.out), targets, args.force


def main() -> None:
    runs, out, targets, force = parse(sys.argv[1:])
    if out.exists():
        require(out.is_dir(), f"--out: {out} is a file; give another folder")
        ours = (out / page.PAGE).exists()
        empty = not any(out.iterdir())
        require(empty or (force and ours), f"--out: {out} exists; give another folder" + ", or --force" * ours)

    kinds = {run.score for run in runs if run.rows}
    require(
        len(kinds) < 2, "RUN: images of some have several classes, those of others one; compare each kind for itself"
    )

    # Runs that differ in their seed alone are one setting.
    settings = settings_of(runs)
    table = run_table(settings)
    classes, notes = class_table(settings)
    comparison = page.Comparison(
        runs=table,
        settings=setting_table(table),
        targets=target_table(settings, targets or usual_targets(table)),
        options=option_table(settings),
        epochs=_stacked(settings, epoch_table),
        steps=_stacked(settings, rate_table),
        classes=classes,
        notes=notes,
    )

    # Files of an earlier comparison that this one does not have must not stand beside it.
    files = comparison.files()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in {*page.FILES} - files.keys():
            (out / stale).unlink(missing_ok=True)
        for name, content in files.items():
            replace_file(out / name, content)
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); give another folder") from None
    print(comparison.printed())
    print(f"written to {printable(str(out))}: {', '.join(files)}")
