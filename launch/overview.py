"""All runs on one page, for people without W&B: python -m launch overview RUNS... [--out overview.html]

RUNS are run folders, or folders of them such as `runs`. The page is one HTML file that needs no network and runs no script:
a table (state, best accuracy, speed, in which options the runs differ) and curves over epochs. It shows what
config.yaml, metrics.jsonl and checkpoints/last hold, so the weights themselves may be elsewhere.
"""

import html
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from data_pipeline.command import run_command
from data_pipeline.config import require
from data_pipeline.errors import UserError
from data_pipeline.faults import printable
from data_pipeline.files import replace_file
from launch.curves import Curve, chart, style, swatch

CHARTS = (
    ("Validation top-1", "%", "val/top1_pct", False),
    ("Validation loss", "nats", "val/loss", True),
    ("Training loss", "nats", "train/loss", True),
    ("Learning rate", "per update", "train/lr", True),
    ("Throughput", "images/s", "perf/images_per_s", True),
    ("Data wait", "% of the training time", "perf/data_wait_pct", True),
)
"""Title, unit, metric, and whether the values begin at zero."""

RUNNING_S = 600.0
"""A run that has not finished counts as running for so long after its last row of metrics."""

_CSS = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#5b6570;--rule:#dde2e8;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--ground:#14171c;--ink:#e6e9ee;--soft:#9aa5b1;--rule:#2d343d;--bad:#ff9b8f}}
body{margin:2rem auto;max-width:1440px;padding:0 1.5rem;background:var(--ground);color:var(--ink);
font:14px/1.5 system-ui,"DejaVu Sans",sans-serif}
h1{font-size:1.4rem;margin:0}
p{color:var(--soft);margin:.2rem 0 1.2rem}
.table{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{padding:.45rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:600;white-space:nowrap}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td svg{vertical-align:middle;margin-right:.4rem}
small{color:var(--soft);display:block;overflow-wrap:anywhere}
.name{min-width:14rem}
.name,code{overflow-wrap:anywhere}
code{font:12px/1.6 ui-monospace,"DejaVu Sans Mono",monospace;display:block}
.bad{color:var(--bad)}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.2rem;margin-top:2rem}
.chart{width:100%;height:auto}
.chart text{font-size:11px;fill:var(--soft)}
.chart .title{font-size:13px;font-weight:600;fill:var(--ink)}
.chart tspan{font-weight:400;fill:var(--soft)}
.chart circle{fill:currentColor}
.grid{stroke:var(--rule)}
"""


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    folder: Path
    options: dict[str, Any]
    """Dotted option -> value, as in config.yaml."""
    rows: list[dict[str, float]]
    """Of metrics.jsonl, in order; a figure that was not finite is NaN."""
    saved_step: int
    """Of the last checkpoint; 0 where there is none."""
    finished: bool

    @property
    def name(self) -> str:
        return printable(str(self.options.get("run.name") or self.folder.name))

    @property
    def epochs(self) -> float:
        """Epochs trained so far."""
        return self.rows[-1]["epoch"] if self.rows else 0.0

    @property
    def best_top1_pct(self) -> float:
        """NaN before the first validation."""
        return max((top1 for _, top1 in self.curve("val/top1_pct") if math.isfinite(top1)), default=math.nan)

    def state(self, now_s: float) -> str:
        """What the run does at `now_s`, in Unix seconds."""
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
        """(epoch, value) of each row that has it. Rows of whole epochs repeat what rows within them say in detail."""
        rows = [row for row in self.rows if metric in row]
        detailed = [row for row in rows if "train/lr" in row]
        return [(row["epoch"], row[metric]) for row in detailed or rows]


def find_runs(places: Iterable[Path]) -> list[Path]:
    """The run folders among `places` and below them, each once. Raises `UserError` where a place has none."""
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
    """The run in a folder, finished or under way. Raises `UserError` for files that are none of ours."""
    file = folder / "config.yaml"
    try:
        options = _flat(yaml.safe_load(file.read_text()))
        file = folder / "checkpoints/last/progress.json"
        progress = json.loads(file.read_text()) if file.exists() else {}
        saved_step, finished = progress.get("step", 0), progress.get("finished", False)
        file = folder / "metrics.jsonl"
        rows = _rows(file.read_text() if file.exists() else "")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"RUNS: {file} cannot be read ({why}); mend it, or leave this run out") from None
    return Run(folder, options, rows, saved_step, finished)


def _rows(text: str) -> list[dict[str, float]]:
    """Whole lines of metrics.jsonl: the last may be half written."""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [_figures(json.loads(line)) for line in lines]


def _figures(row: dict[str, Any]) -> dict[str, float]:
    names = dict.fromkeys(("step", "epoch", "time", *row))  # a row without one of the three is none of ours
    return {name: math.nan if row[name] is None else float(row[name]) for name in names}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """For each run, its values of the options in which not all runs agree, beside their names and folders."""
    keys = dict.fromkeys(key for run in runs for key in run.options if key not in ("run.name", "run.dir"))
    differing = [key for key in keys if any(run.options.get(key) != runs[0].options.get(key) for run in runs)]
    return [{key: run.options[key] for key in differing if key in run.options} for run in runs]


def page(runs: list[Run], now_s: float) -> str:
    """The HTML page about the runs at `now_s` (Unix seconds), the best first."""
    runs = sorted(runs, key=lambda run: (-run.best_top1_pct if run.best_top1_pct >= 0 else 1, run.name, run.folder))
    heads = "".join(
        f"<th{' class=number' * number}>{head}</th>"
        for head, number in (
            ("run", False),
            ("state", False),
            ("epoch", True),
            ("best top-1, %", True),
            ("images/s", True),
            ("data wait, %", True),
            ("options that differ", False),
        )
    )
    body = "".join(
        _row(number, run, own, now_s) for number, (run, own) in enumerate(zip(runs, differences(runs), strict=True))
    )
    charts = "".join(
        chart(title, unit, [Curve(n, run.name, run.curve(metric)) for n, run in enumerate(runs)], from_zero=from_zero)
        for title, unit, metric, from_zero in CHARTS
    )
    stamp = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Training runs</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_CSS}{style()}</style></head><body><h1>Training runs</h1>"
        f"<p>{_count(runs)} as of {stamp}, the best first; images/s and data wait are medians over a run's rows.</p>"
        f'<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<main>{charts}</main></body></html>\n"
    )


def _row(number: int, run: Run, own: dict[str, Any], now_s: float) -> str:
    lost = next((row["step"] for row in run.rows if math.isnan(row.get("train/loss", 0.0))), None)
    fault = "" if lost is None else f'<small class="bad">loss is not finite at step {lost:.0f}</small>'
    figures = (
        f"{round(run.epochs, 2):g} / {run.options.get('run.epochs', '?')}",
        _figure(run.best_top1_pct, ".2f"),
        _figure(_median(run, "perf/images_per_s"), ",.0f"),
        _figure(_median(run, "perf/data_wait_pct"), ".1f"),
    )
    options = "".join(
        f"<code>{_text(key)} {_text(json.dumps(value, ensure_ascii=False, default=str))}</code>"
        for key, value in own.items()
    )
    return (
        f'<tr><td class="name">{swatch(number)}<bdi>{_text(run.name)}</bdi><small>{_text(run.folder)}</small></td>'
        f"<td>{run.state(now_s)}{fault}</td>"
        + "".join(f'<td class="number">{_text(figure)}</td>' for figure in figures)
        + f"<td>{options}</td></tr>"
    )


def _count(runs: list[Run]) -> str:
    return f"{len(runs)} run" + "s" * (len(runs) != 1)


def _median(run: Run, metric: str) -> float:
    values = [value for _, value in run.curve(metric) if math.isfinite(value)]
    return statistics.median(values) if values else math.nan


def _figure(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m launch overview",
        description="Write one HTML page about runs.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="Run folders, or folders of them such as runs.")
    parser.add_argument("--out", default="overview.html", help="The page to write.")
    parser.add_argument("--force", action="store_true", help="Replace it if it exists.")
    try:
        args = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(f"{' '.join(str(error).split())}; see {parser.prog} --help") from None
    out = Path(args.out)
    require(args.force or not out.exists(), f"--out: {out} exists; give another file, or --force to replace it")
    require(out.parent.is_dir(), f"--out: {out.parent} is not a folder; make it, or give another file")
    runs = [read_run(folder) for folder in find_runs(map(Path, args.runs))]
    try:
        replace_file(out, page(runs, time.time()).encode())
    except OSError as error:
        raise UserError(f"--out: cannot write {out} ({error.strerror}); give another file") from None
    print(f"{printable(str(out))}: {_count(runs)}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
