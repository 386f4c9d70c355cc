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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.cli import parse_plain, plain_parser
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError, printable, require
from trainer.report import charts, html_page
from trainer.report.charts import Curve
from trainer.report.run_reader import SCORES, Run, Score, differences, find_runs, read_run

CHARTS = (
    charts.VAL_TOP1,
    charts.VAL_LOSS,
    charts.TRAIN_LOSS,
    charts.RATE,
    charts.SPEED,
    charts.DATA_WAIT,
)
_BODY = """
<p>{{ count }} as of {{ stamp }}, the best first; images/s and data wait are medians over a run's rows.</p>
{{ table(heads, rows) }}
<h2>Curves over epochs</h2>
<div class="charts">{% for chart in charts %}{{ chart }}{% endfor %}</div>
"""


def page(runs: list[Run], now_s: float) -> str:
    """Render the HTML page about the runs at `now_s` (Unix seconds), the best first."""
    runs = sorted(runs, key=lambda run: (-run.best_pct if run.best_pct >= 0 else 1, run.name, run.folder))
    scores = sorted({run.score for run in runs if run.rows}, reverse=True) or ["top1_pct"]
    shown = [charts.VAL_MAP] * ("map_pct" in scores) + [*CHARTS[scores == ["map_pct"] :]]
    return html_page.page(
        "Training runs",
        _BODY,
        charts.style(),
        count=_count(runs),
        stamp=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s)),
        heads=_heads(scores),
        rows=[_row(n, run, own, now_s) for n, (run, own) in enumerate(zip(runs, differences(runs), strict=True))],
        charts=[
            charts.chart(panel, [Curve(run.name, run.curve(panel.metric), n, _dashes(n)) for n, run in enumerate(runs)])
            for panel in shown
        ],
    )


def _heads(scores: Sequence[Score]) -> list[tuple[str, bool]]:
    """Titles of the columns, and True for those of figures."""
    best = f"best {' or '.join(SCORES[score] for score in scores)}, %"
    figures = (("epoch", True), (best, True), ("images/s", True), ("data wait, %", True))
    return [("run", False), ("state", False), *figures, ("options that differ", False)]


def _dashes(number: int) -> int:
    """Dash pattern of a run's line: dashed from the run on that has the first colour again."""
    return number // len(charts.COLOURS)


def _row(number: int, run: Run, own: dict[str, Any], now_s: float) -> list[object]:
    options = [
        Markup("<code>{} {}</code>").format(
            printable(key), printable(json.dumps(value, ensure_ascii=False, default=str))
        )
        for key, value in own.items()
    ]
    return [
        Markup("{}<bdi>{}</bdi><small>{}</small>").format(
            charts.swatch(number, _dashes(number)), printable(run.name), printable(str(run.folder))
        ),
        run.state(now_s),
        f"{round(run.epochs, 2):g} / {run.options.get('run.epochs', '?')}",
        _figure(run.best_pct, ".2f") + " mAP" * (run.score == "map_pct"),
        _figure(_median(run, "perf/images_per_s"), ",.0f"),
        _figure(_median(run, "perf/data_wait_pct"), ".1f"),
        Markup("").join(options),
    ]


def _count(runs: list[Run]) -> str:
    return f"{len(runs)} run" + "s" * (len(runs) != 1)


def _median(run: Run, metric: str) -> float:
    values = [value for _, value in run.curve(metric) if math.isfinite(value)]
    return statistics.median(values) if values else math.nan


def _figure(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _readable(folders: list[Path]) -> list[Run]:
    """Read the runs that can be read; each of the others is one line on stderr. Raises `UserError` where there are none."""
    runs, errors = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            errors.append(error)
    if not runs:
        raise errors[0]
    for why in errors:
        print(f"left out: {printable(str(why))}", file=sys.stderr)
    return runs


def main(arguments: list[str]) -> None:
    parser = plain_parser("python -m launch overview", "Write one HTML page about runs.")
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="Run folders, or folders of them such as runs.")
    parser.add_argument("--out", default="overview.html", help="The page to write.")
    parser.add_argument("--force", action="store_true", help="Replace it if it exists.")
    args = parse_plain(parser, arguments)
    out = Path(args.out)
    require(args.force or not out.exists(), f"--out: {out} exists; give another file, or --force to replace it")
    require(out.parent.is_dir(), f"--out: {out.parent} is not a folder; make it, or give another file")
    runs = _readable(find_runs(map(Path, args.runs)))
    try:
        replace_file(out, page(runs, time.time()).encode())
    except OSError as error:
        raise UserError(f"--out: cannot write {out} ({error.strerror}); give another file") from None
    print(f"{printable(str(out))}: {_count(runs)}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
