"""Read the options, metrics and progress of runs from their folders.

Only config.yaml, metrics.jsonl and checkpoints/last are read, so the weights may be elsewhere.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import yaml

from data_pipeline.common.errors import UserError, printable, require

RUNNING_S = 600.0
"""Seconds after its last row of metrics for which an unfinished run counts as running."""


LONGEST_BYTES = 1 << 29  # some millions of rows
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions that reading another program's file may raise."""


Score = Literal["top1_pct", "map_pct"]
SCORES: dict[Score, str] = {"top1_pct": "top-1", "map_pct": "mAP"}
"""Words for the scores that runs are ranked by."""


@dataclass(frozen=True)
class Run:
    """A run as its folder records it."""

    folder: Path
    options: dict[str, Any]
    """Dotted option -> value, as in config.yaml."""
    rows: list[dict[str, float]]
    """Rows of metrics.jsonl, in order; a figure that was not finite is NaN."""
    saved_step: int
    """Step of the last checkpoint; 0 where there is none."""
    finished: bool

    @property
    def name(self) -> str:
        return printable(str(self.options.get("run.name") or self.folder.name))

    @property
    def epochs(self) -> float:
        """Epochs trained so far."""
        return self.rows[-1]["epoch"] if self.rows else 0.0

    @property
    def score(self) -> Score:
        """Score of the run's kind of images: mAP where they have several classes, else top-1, also before any validation."""
        return "map_pct" if any("val/map_pct" in row for row in self.rows) else "top1_pct"

    @property
    def best_pct(self) -> float:
        """Best validation `score`; NaN before the first validation."""
        return max((value for _, value in self.curve(f"val/{self.score}") if math.isfinite(value)), default=math.nan)

    @property
    def minutes(self) -> list[float]:
        """Minutes of training at each row, without evaluation, checkpoints and interruptions."""
        return list(accumulate((row.get("perf/train_min", 0.0) for row in self.rows), max))

    def state(self, now_s: float) -> str:
        """Word the run's state at `now_s`, in Unix seconds."""
        if self.finished:
            return "finished"
        if not self.rows:
            return "no figures yet"
        if self.saved_step and self.saved_step == self.options.get("run.max_steps"):
            return f"stopped at run.max_steps {self.saved_step}"
        if now_s - self.rows[-1]["time"] < RUNNING_S:
            return "running"
        return f"stopped, saved at step {self.saved_step}" if self.saved_step else "stopped, nothing saved"

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """List (epoch, value) of each row that has it. Rows of whole epochs repeat what rows within them say in detail."""
        rows = [row for row in self.rows if metric in row]
        detailed = [row for row in rows if "train/lr" in row]
        return [(row["epoch"], row[metric]) for row in detailed or rows]


def find_runs(places: Iterable[Path]) -> list[Path]:
    """List the run folders among `places` and below them, each once. Raises `UserError` where a place has none."""
    found: dict[Path, Path] = {}
    for place in places:
        require(place.is_dir(), f"RUNS: {place} is not a folder; give run folders, or one of them such as runs")
        runs = list(_below(place))
        require(bool(runs), f"RUNS: {place} holds no run, that is no config.yaml; give run folders, or one of them")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _below(place: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(place):
        subfolders.sort()
        if "config.yaml" in files:
            subfolders.clear()  # wandb keeps files of that name in a run folder
            yield Path(folder)


def read_run(folder: Path) -> Run:
    """Read the run in a folder, finished or not. Raises `UserError` for files of another program."""
    file = folder / "config.yaml"
    try:
        options = _flat(_plain_yaml(_text(file)))
        file = folder / "checkpoints/last/progress.json"
        progress = json.loads(_text(file)) if file.exists() else {}
        saved_step, finished = int(progress.get("step", 0)), bool(progress.get("finished", False))
        file = folder / "metrics.jsonl"
        rows = _rows(_text(file) if file.exists() else "")
    except (*UNREADABLE, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"RUNS: {file} cannot be read ({why}); mend it, or leave this run out") from None
    return Run(folder, options, rows, saved_step, finished)


def _text(file: Path) -> str:
    """Read a text file, if it is not so long that it fills the memory."""
    if not file.is_file():
        raise ValueError("it is no file")  # a pipe would be waited for
    if file.stat().st_size > LONGEST_BYTES:
        raise ValueError(f"it has {file.stat().st_size:,} bytes")
    return file.read_text()


def _plain_yaml(text: str) -> Any:
    """Parse a configuration of ours, without references: with them a short text may stand for an endless table."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise ValueError("it has references (*name), which no run writes")
    return yaml.safe_load(text)


def _rows(text: str) -> list[dict[str, float]]:
    """Parse the complete lines of metrics.jsonl, but for alerts: the last may be half written."""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [_figures(row) for row in rows if "alert" not in row]


def _figures(row: dict[str, Any]) -> dict[str, float]:
    names = dict.fromkeys(("step", "epoch", "time", *row))  # a row without one of the three is foreign
    return {name: math.nan if row[name] is None else float(row[name]) for name in names}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """List for each run its values of the options in which not all runs agree, beside their names and folders."""
    keys = dict.fromkeys(key for run in runs for key in run.options if key not in ("run.name", "run.dir"))
    differing = [key for key in keys if any(run.options.get(key) != runs[0].options.get(key) for run in runs)]
    return [{key: run.options[key] for key in differing if key in run.options} for run in runs]
