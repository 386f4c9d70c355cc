"""All runs on one page, for people without W&B: python -m launch overview RUNS... [--out overview.html]

RUNS are run folders, or folders of them such as `runs`. The page is one HTML file that needs no network and runs no script:
a table (state, best accuracy, speed, in which options the runs differ) and curves over epochs. It shows what
config.yaml, metrics.jsonl and checkpoints/last hold, so the weights themselves may be elsewhere.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.cli import parse_plain
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError
from data_pipeline.config import require
from data_pipeline.sources.quarantine import printable
from launch.pages.curves import Curve, chart, style, swatch
from trainer.report.html_page import document, text
from trainer.report.run_reader import Run, differences, find_runs, read_run

CHARTS = (
    ("Validation top-1", "%", "val/top1_pct", False),
    ("Validation loss", "nats", "val/loss", True),
    ("Training loss", "nats", "train/loss", True),
    ("Learning rate", "per update", "train/lr", True),
    ("Throughput", "images/s", "perf/images_per_s", True),
    ("Data wait", "% of the training time", "perf/data_wait_pct", True),
)
"""Title, unit, metric, and whether the values begin at zero."""

_CSS = """
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.2rem;margin-top:2rem}
.chart{width:100%;height:auto}
.chart text{font-size:11px;fill:var(--soft)}
.chart .title{font-size:13px;font-weight:600;fill:var(--ink)}
.chart tspan{font-weight:400;fill:var(--soft)}
.chart circle{fill:currentColor}
.grid{stroke:var(--rule)}
"""


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
    return document(
        "Training runs",
        _CSS + style(),
        f"<p>{_count(runs)} as of {stamp}, the best first; images/s and data wait are medians over a run's rows.</p>"
        f'<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<main>{charts}</main>",
    )


def _row(number: int, run: Run, own: dict[str, Any], now_s: float) -> str:
    figures = (
        f"{round(run.epochs, 2):g} / {run.options.get('run.epochs', '?')}",
        _figure(run.best_top1_pct, ".2f"),
        _figure(_median(run, "perf/images_per_s"), ",.0f"),
        _figure(_median(run, "perf/data_wait_pct"), ".1f"),
    )
    options = "".join(
        f"<code>{text(key)} {text(json.dumps(value, ensure_ascii=False, default=str))}</code>"
        for key, value in own.items()
    )
    return (
        f'<tr><td class="name">{swatch(number)}<bdi>{text(run.name)}</bdi><small>{text(run.folder)}</small></td>'
        f"<td>{run.state(now_s)}</td>"
        + "".join(f'<td class="number">{text(figure)}</td>' for figure in figures)
        + f"<td>{options}</td></tr>"
    )


def _count(runs: list[Run]) -> str:
    return f"{len(runs)} run" + "s" * (len(runs) != 1)


def _median(run: Run, metric: str) -> float:
    values = [value for _, value in run.curve(metric) if math.isfinite(value)]
    return statistics.median(values) if values else math.nan


def _figure(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


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
    args = parse_plain(parser, arguments)
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
