"""Output of a comparison of runs: tables as text, CSV and HTML, curves and bars as PNG, for screen and print."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from data_pipeline.common.errors import printable, printable_lines
from trainer.compare.mcnemar import ALL
from trainer.report import charts, html_page
from trainer.report.charts import Curve, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = "report.html"
TABLES = ("runs", "settings", "targets", "options", "epochs", "classes")
PICTURES = ("curves-epochs.png", "curves-minutes.png", "classes.png")
FILES = (*(f"{name}.csv" for name in TABLES), *PICTURES, PAGE)

HEADS = {
    "epochs": ("epochs", 1),
    "best_top1_pct": ("best top-1, %", 2),
    "best_map_pct": ("best mAP, %", 2),
    "val_loss": ("val loss, nats", 3),
    "train_loss": ("train loss, nats", 3),
    "train_top1_pct": ("train top-1, %", 2),
    "val_macro_f1_pct": ("val macro F1, %", 2),
    "images_per_s": ("images/s", 0),
    "minutes": ("minutes", 1),
    "runs": ("n", 0),
    "images": ("images", 0),
    "first_pct": ("first right, %", 1),
    "second_pct": ("second right, %", 1),
    "difference": ("difference, points", 1),
    "only_first": ("only first right", 0),
    "only_second": ("only second right", 0),
    "p": ("p", 4),
    "p_holm": ("p, Holm", 4),
}
"""Title of a column of figures, and its digits behind the point."""
PANELS = (charts.VAL_TOP1, charts.TRAIN_TOP1, charts.VAL_LOSS, charts.TRAIN_LOSS, charts.RATE, charts.SPEED)
LABEL_PANELS = (charts.VAL_MAP, charts.VAL_F1, *PANELS[2:])
"""The same for images of several classes."""
BAR = charts.COLOURS[0][0]
SIGNIFICANT = 0.05
SHOWN_CLASSES = 30
"""Most classes shown for a pair of settings; classes.csv has all."""

_BODY = """
<p>Accuracy and losses are those on validation images unless training is named. Spreads are standard deviations over runs \
that differ in their seed alone.</p>
<h2>Runs</h2><p>Losses and training accuracy are those of the last epoch.</p>
{{ table(*tables.runs) }}
{% if tables.spread %}
<h2>Settings: mean ± standard deviation over n seeds</h2>{{ table(*tables.spread) }}
{% endif %}
{% if tables.reached %}
<h2>How soon</h2>
<p>Epochs / minutes of training until validation {{ score }} first reaches the target, means over seeds.</p>
{{ table(*tables.reached) }}
{% endif %}
{% if tables.options %}
<h2>Options that differ</h2>{{ table(*tables.options) }}
{% endif %}
{% for title, drawn in curves %}
<h2>{{ title }}</h2>
{% if repeated %}<p>Bold: the mean of a setting's runs, as far as all have come; thin: its runs.</p>{% endif %}
<ul class="legend">{% for line, setting in legend %}<li>{{ line }} {{ setting }}</li>{% endfor %}</ul>
<div class="charts">{% for chart in drawn %}{{ chart }}{% endfor %}</div>
{% endfor %}
{% if notes or pairs %}<h2>Class by class</h2>{% endif %}
{% for note in notes %}<p>{{ note }}</p>{% endfor %}
{% if pairs %}
<p>McNemar's exact test on paired predictions, one run a setting; p of the classes is also given adjusted after Holm for \
their number. At most {{ shown_classes }} classes are shown, those of lowest p. Filled bars: p &lt; {{ significant }} after \
Holm; hatched: not significant.</p>
{% endif %}
{% for first, second, bars, classes in pairs %}
<p>First: {{ first }}; second: {{ second }}</p>
<div class="bars">{{ bars }}</div>
{{ table(*classes) }}
{% endfor %}
"""
_CSS = """
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.5rem}
.bars{max-width:640px}
"""


@dataclass(frozen=True)
class Comparison:
    """Tables of a comparison, as `compare` and `mcnemar` make them, and a note of what is missing."""

    runs: pd.DataFrame
    settings: pd.DataFrame
    targets: pd.DataFrame
    options: pd.DataFrame
    epochs: pd.DataFrame
    steps: pd.DataFrame
    """Learning rates, which change within an epoch, so `epochs` cannot show them; not written to a file."""
    classes: pd.DataFrame
    notes: list[str]

    def files(self) -> dict[str, bytes]:
        """Name and content of every file, the page last; none for empty tables."""
        tables = {name: getattr(self, name) for name in TABLES}
        files = {f"{name}.csv": table.to_csv(index=False).encode() for name, table in tables.items() if len(table)}
        if len(self.epochs):
            files["curves-epochs.png"] = curves_png(self.epochs, self.steps, "epoch")
            files["curves-minutes.png"] = curves_png(self.epochs, self.steps, "minutes")
        if len(self.classes):
            files["classes.png"] = classes_png(self.classes)
        return {**files, PAGE: self._page().encode()}

    def printed(self) -> str:
        """Text for a terminal."""
        parts = [shown(self.runs), *([shown(self.spread)] if self.repeated else []), shown(self.reached)]
        return "\n\n".join(printable_lines(part.to_string(index=False)) for part in parts if len(part)) + "".join(
            f"\n{printable(note)}" for note in ["", *self.notes]
        )

    @property
    def repeated(self) -> bool:
        """True where a setting has several runs."""
        return bool((self.settings.runs > 1).any())

    @property
    def spread(self) -> pd.DataFrame:
        """Settings for people: "mean ± standard deviation"."""
        table = self.settings[["setting", "runs"]].copy()
        for figure in HEADS:
            if f"{figure}_mean" in self.settings:
                pairs = zip(self.settings[f"{figure}_mean"], self.settings[f"{figure}_std"], strict=True)
                table[figure] = [_mean(mean, std, HEADS[figure][1]) for mean, std in pairs]
        return table

    @property
    def reached(self) -> pd.DataFrame:
        """Targets for people: mean "epoch / minutes" over the runs of a setting, and how many of them reached it."""
        rows: dict[str, dict[str, str]] = {}
        for (setting, target), group in self.targets.groupby(["setting", "target_pct"], sort=False):
            there = group.dropna()
            of = f" ({len(there)} of {len(group)})" if 0 < len(there) < len(group) else ""
            means = f"{there.epoch.mean():.3g} / {there.minutes.mean():.3g}{of}" if len(there) else "–"
            rows.setdefault(str(setting), {})[f"{target:g} %"] = means
        return pd.DataFrame([{"setting": setting, **row} for setting, row in rows.items()])

    def _page(self) -> str:
        # Settings that were each trained once have no spread, and so no table of it.
        tables = {
            "runs": self.runs,
            "spread": self.spread if self.repeated else self.runs[:0],
            "reached": self.reached,
            "options": self.options,
        }
        drawn = [
            (
                title,
                [
                    charts.chart(panel, lines(panel, self.epochs, self.steps, over), over)
                    for panel in panels_of(self.epochs)
                ],
            )
            for over, title in (("epoch", "Curves over epochs"), ("minutes", "Curves over minutes"))
            if len(self.epochs)
        ]
        return html_page.page(
            "Comparison of runs",
            _BODY,
            charts.style() + _CSS,
            tables={name: table_of(table) if len(table) else None for name, table in tables.items()},
            curves=drawn,
            repeated=self.repeated,
            score="mAP" if panels_of(self.epochs) == LABEL_PANELS else "top-1",
            legend=[(charts.swatch(n, n), name) for n, name in enumerate(_settings(self.epochs))],
            notes=self.notes,
            pairs=[
                (first, second, _bars_svg(table), table_of(table.head(1 + SHOWN_CLASSES)))
                for (first, second), table in self._pairs()
            ],
            shown_classes=SHOWN_CLASSES,
            significant=SIGNIFICANT,
        )

    def _pairs(self) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
        if len(self.classes):
            for (first, second), table in self.classes.groupby(["first", "second"], sort=False):
                yield (str(first), str(second)), table.drop(columns=["first", "second"])


def _mean(mean: float, std: float, digits: int) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:,.{digits}f}" + ("" if math.isnan(std) else f" ± {std:,.{digits}f}")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Format the table for people: columns by their titles, figures rounded, "–" where there is none."""
    rounded = table.astype(object)
    for column, (_, digits) in HEADS.items():
        if column in table and pd.api.types.is_numeric_dtype(table[column]):
            rounded[column] = [_mean(value, math.nan, digits) for value in table[column]]
    for column in {"p", "p_holm"} & set(table.columns):
        rounded[column] = [f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}" for p in table[column]]
    return rounded.rename(columns={column: head for column, (head, _) in HEADS.items()})


def table_of(table: pd.DataFrame) -> tuple[list[tuple[str, bool]], list[list[object]]]:
    """Return heads and rows in the form of `html_page`."""
    readable = shown(table)
    heads = [(str(head), column in HEADS) for head, column in zip(readable.columns, table.columns, strict=True)]
    return heads, readable.to_numpy().tolist()


def panels_of(epochs: pd.DataFrame) -> tuple[Panel, ...]:
    return LABEL_PANELS if charts.VAL_MAP.metric in epochs else PANELS


def _settings(epochs: pd.DataFrame) -> list[str]:
    return [str(name) for name in epochs.setting.unique()] if len(epochs) else []


def lines(panel: Panel, epochs: pd.DataFrame, steps: pd.DataFrame, over: str) -> list[Curve]:
    """Draw a line for each setting over "epoch" or "minutes": the mean of its runs as far as all have come, over the runs."""
    source = steps if panel.metric in steps else epochs
    found = []
    for number, (setting, rows) in enumerate(source.dropna(subset=panel.metric).groupby("setting", sort=False)):
        runs = list(rows.groupby("folder", sort=False))
        curve = Curve(str(setting), [], number, number)
        if len(runs) > 1:
            found += [
                curve._replace(name=str(folder), points=_points(run, over, panel.metric), thin=True)
                for folder, run in runs
            ]
        by_epoch = rows.groupby("epoch")
        mean = by_epoch[[panel.metric, "minutes"]].mean()[by_epoch.size() == len(runs)].reset_index()
        found.append(curve._replace(points=_points(mean, over, panel.metric)))
    return found


def _points(rows: pd.DataFrame, over: str, metric: str) -> list[tuple[float, float]]:
    return list(zip(rows[over].astype(float).tolist(), rows[metric].astype(float).tolist(), strict=True))


def curves_png(epochs: pd.DataFrame, steps: pd.DataFrame, over: str) -> bytes:
    """Plot all panels over "epoch" or "minutes", each setting by colour and dashes, so that a print tells them apart too."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    with charts.styled():
        figure = Figure(figsize=(10, 9.5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        for axes, panel in zip(figure.subplots(3, 2).flatten(), panels_of(epochs), strict=True):
            charts.draw(axes, panel, lines(panel, epochs, steps, over), over)
        names = _settings(epochs)
        handles = [
            Line2D([], [], color=charts.colour(n), linestyle=charts.linestyle(n), linewidth=1.8)
            for n in range(len(names))
        ]
        short = [_short(name) for name in names]
        figure.legend(handles, short, loc="outside lower center", ncols=min(3, len(names)), frameon=False)
        return _png(figure)


def classes_png(classes: pd.DataFrame) -> bytes:
    """Plot the differences by class for each pair of settings: filled where they are significant after Holm, else hatched."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    pairs = list(classes.groupby(["first", "second"], sort=False))
    heights = [_height(table) for _, table in pairs]
    with charts.styled():
        figure = Figure(figsize=(8, 0.6 + sum(heights)), layout="constrained")
        panels = figure.subplots(len(pairs), squeeze=False, height_ratios=heights).flatten()
        for axes, ((first, second), table) in zip(panels, pairs, strict=True):
            _bars(axes, table)
            title = f"{_short(str(second))} against {_short(str(first))}"
            axes.set_title(title, loc="left", fontweight="bold")
        patches = [
            Patch(facecolor=BAR, edgecolor=BAR, label=f"p < {SIGNIFICANT} (McNemar, Holm)"),
            Patch(facecolor="none", edgecolor=BAR, hatch="////", label="not significant"),
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)
        return _png(figure)


def _bars_svg(table: pd.DataFrame) -> Markup:
    from matplotlib.figure import Figure

    with charts.styled():
        figure = Figure(figsize=(5.2, _height(table)), layout="constrained")
        _bars(figure.subplots(), table)
        return charts.inline(figure, "Difference by class")


def _height(table: pd.DataFrame) -> float:
    return 1.2 + 0.26 * min(len(table), SHOWN_CLASSES)


def _bars(axes: "Axes", table: pd.DataFrame) -> None:
    """Draw one bar for each class, the largest gain on top."""
    table = table[table["class"] != ALL].head(SHOWN_CLASSES).sort_values("difference")
    places = range(len(table))
    for sure in (True, False):
        rows = [place for place, p in zip(places, table.p_holm, strict=True) if (p < SIGNIFICANT) == sure]
        look: dict[str, Any] = {"color": BAR} if sure else {"facecolor": "none", "hatch": "////", "edgecolor": BAR}
        axes.barh(rows, table.difference.iloc[rows], 0.7, **look)
    axes.axvline(0, color=html_page.INK, linewidth=0.8)
    axes.set_yticks(places, [_short(printable(name)) for name in table["class"]])
    axes.set_ylim(-0.6, len(table) - 0.4)
    axes.set_xlabel("difference of validation top-1, points")
    axes.grid(axis="x", color=html_page.RULE)
    axes.set_axisbelow(True)


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:47]}…"


def _png(figure: "Figure") -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
