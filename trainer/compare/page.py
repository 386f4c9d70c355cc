"""What a comparison of runs looks like: tables as text, CSV and HTML, curves and bars as PNG, for screen and print."""

import base64
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from data_pipeline.sources.quarantine import printable
from trainer.compare.mcnemar import ALL
from trainer.report.html_page import document, text

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
    "val_loss": ("val loss, nats", 3),
    "train_loss": ("train loss, nats", 3),
    "train_top1_pct": ("train top-1, %", 2),
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
PANELS = (
    ("Validation top-1", "%", "val/top1_pct"),
    ("Training top-1", "%", "train/top1_pct"),
    ("Validation loss", "nats", "val/loss"),
    ("Training loss", "nats", "train/loss"),
    ("Learning rate", "per update", "train/lr"),
    ("Throughput", "images/s", "perf/images_per_s"),
)
# Okabe and Ito's colours for every eye, darkest first; dashes and markers tell lines apart in greyscale.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
SIGNIFICANT = 0.05
SHOWN_CLASSES = 30
"""Of a pair of settings; classes.csv has all."""

CSS = """
h2{font-size:1.1rem;margin:2rem 0 .4rem}
img{display:block;width:100%;max-width:1000px;background:#fff}
table{width:auto}
td{max-width:24rem;overflow-wrap:break-word}
th,th.number{white-space:normal}
@media print{body{margin:0;max-width:none;font-size:11px}.table{overflow:visible}
th,td{padding:.25rem .5rem}img,tr{break-inside:avoid}h2{break-after:avoid}}
"""


@dataclass(frozen=True)
class Comparison:
    """The tables of a comparison, as `compare` and `paired` make them, and what was missing for more."""

    runs: pd.DataFrame
    settings: pd.DataFrame
    targets: pd.DataFrame
    options: pd.DataFrame
    epochs: pd.DataFrame
    updates: pd.DataFrame
    """What `epochs` cannot show, as it moves within an epoch: the learning rate, not as a file."""
    classes: pd.DataFrame
    notes: list[str]

    def files(self) -> dict[str, bytes]:
        """Name and content of every file, the page last; none for what there is nothing to show of."""
        tables = {name: getattr(self, name) for name in TABLES}
        files = {f"{name}.csv": table.to_csv(index=False).encode() for name, table in tables.items() if len(table)}
        if len(self.epochs):
            files["curves-epochs.png"] = curves(self.epochs, self.updates, "epoch")
            files["curves-minutes.png"] = curves(self.epochs, self.updates, "minutes")
        if len(self.classes):
            files["classes.png"] = class_bars(self.classes)
        return {**files, PAGE: self._page(files).encode()}

    def printed(self) -> str:
        """What a terminal shows."""
        parts = [shown(self.runs), *([shown(self.spread)] if self.repeated else []), shown(self.reached)]
        return "\n\n".join(printable(part.to_string(index=False)) for part in parts if len(part)) + "".join(
            f"\n{printable(note)}" for note in ["", *self.notes]
        )

    @property
    def repeated(self) -> bool:
        """Whether any setting has several runs."""
        return bool((self.settings.runs > 1).any())

    @property
    def spread(self) -> pd.DataFrame:
        """The settings for people: "mean ± standard deviation"."""
        table = self.settings[["setting", "runs"]].copy()
        for figure in HEADS:
            if f"{figure}_mean" in self.settings:
                pairs = zip(self.settings[f"{figure}_mean"], self.settings[f"{figure}_std"], strict=True)
                table[figure] = [_mean(mean, std, HEADS[figure][1]) for mean, std in pairs]
        return table

    @property
    def reached(self) -> pd.DataFrame:
        """The targets for people: "epoch / minutes" means over the runs of a setting, and how many of them got there."""
        rows: dict[str, dict[str, str]] = {}
        for (setting, target), group in self.targets.groupby(["setting", "target_pct"], sort=False):
            there = group.dropna()
            of = f" ({len(there)} of {len(group)})" if 0 < len(there) < len(group) else ""
            means = f"{there.epoch.mean():.3g} / {there.minutes.mean():.3g}{of}" if len(there) else "–"
            rows.setdefault(str(setting), {})[f"{target:g} %"] = means
        return pd.DataFrame([{"setting": setting, **row} for setting, row in rows.items()])

    def _page(self, files: dict[str, bytes]) -> str:
        parts = [
            "<p>Accuracy and losses are those on validation images unless training is named. Spreads are standard deviations "
            "over runs that differ in their seed alone.</p>",
            _section("Runs", table_html(self.runs), "Losses and training accuracy are those of the last epoch."),
        ]
        if self.repeated:
            parts.append(_section("Settings: mean ± standard deviation over n seeds", table_html(self.spread)))
        if len(self.targets):
            explained = (
                "Epochs / minutes of training until validation top-1 first reaches the target, means over seeds."
            )
            parts.append(_section("How soon", table_html(self.reached), explained))
        if len(self.options):
            parts.append(_section("Options that differ", table_html(self.options)))
        for name, title in (("curves-epochs.png", "Curves over epochs"), ("curves-minutes.png", "Curves over minutes")):
            if name in files:
                explained = "Bold: the mean of a setting's runs, as far as all have come; thin: its runs."
                parts.append(_section(title, picture(files[name], title), explained if self.repeated else ""))
        parts.append(self._classes(files))
        return document("Comparison of runs", CSS, "".join(parts))

    def _classes(self, files: dict[str, bytes]) -> str:
        parts = "".join(f"<p>{text(note)}</p>" for note in self.notes)
        if len(self.classes):
            parts += (
                "<p>McNemar's exact test on paired predictions, one run a setting; p of the classes is also given adjusted "
                f"after Holm for their number. At most {SHOWN_CLASSES} classes are shown, those of lowest p.</p>"
            )
            parts += picture(files["classes.png"], "Difference by class")
            for (first, second), table in self.classes.groupby(["first", "second"], sort=False):
                parts += f"<p>First: {text(first)}; second: {text(second)}</p>"
                parts += table_html(table.drop(columns=["first", "second"]).head(1 + SHOWN_CLASSES))
        return _section("Class by class", parts) if parts else ""


def _mean(mean: float, std: float, digits: int) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:,.{digits}f}" + ("" if math.isnan(std) else f" ± {std:,.{digits}f}")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table for people: columns by their titles, figures rounded, "–" where there is none."""
    rounded = table.astype(object)
    for column, (_, digits) in HEADS.items():
        if column in table and pd.api.types.is_numeric_dtype(table[column]):
            rounded[column] = [_mean(value, math.nan, digits) for value in table[column]]
    for column in {"p", "p_holm"} & set(table.columns):
        rounded[column] = [f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}" for p in table[column]]
    return rounded.rename(columns={column: head for column, (head, _) in HEADS.items()})


def table_html(table: pd.DataFrame) -> str:
    """The table as HTML, figures to the right."""
    readable = shown(table)
    kinds = [" class=number" if column in HEADS else "" for column in table.columns]
    heads = "".join(f"<th{kind}>{text(head)}</th>" for kind, head in zip(kinds, readable.columns, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{text(value)}</td>" for kind, value in zip(kinds, row, strict=True)) + "</tr>"
        for row in readable.itertuples(index=False)
    )
    return f'<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def picture(png: bytes, title: str) -> str:
    return f'<img alt="{text(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _section(title: str, body: str, explained: str = "") -> str:
    return f"<h2>{text(title)}</h2>" + (f"<p>{text(explained)}</p>" if explained else "") + body


def curves(epochs: pd.DataFrame, updates: pd.DataFrame, over: str) -> bytes:
    """PNG of PANELS against the column `over`, epoch or minutes: a style for each setting, its mean bold over its runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9.5), layout="constrained")
    panels = figure.subplots(3, 2).flatten()
    for axes, (title, unit, metric) in zip(panels, PANELS, strict=True):
        source = updates if metric in updates else epochs
        for number, (_, rows) in enumerate(source.groupby("setting", sort=False)):
            _lines(axes, rows, over, metric, number)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set(xlabel={"epoch": "epoch", "minutes": "minutes of training"}[over], ylabel=unit)
        axes.set_xlim(left=0)
        if metric in ("train/lr", "perf/images_per_s"):
            axes.set_ylim(bottom=0)
        axes.grid(color="#e4e4e4")
    handles = [line for line in panels[0].lines if not line.get_label().startswith("_")]
    names = [_short(name) for name in epochs.setting.unique()]
    legend = figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)), frameon=False)
    for label in legend.get_texts():
        label.set_parse_math(False)
    return _png(figure)


def _lines(axes: "Axes", rows: pd.DataFrame, over: str, metric: str, number: int) -> None:
    colour, runs = COLOURS[number % len(COLOURS)], list(rows.groupby("folder", sort=False))
    style: dict[str, Any] = {"color": colour, "linestyle": DASHES[number % len(DASHES)]}
    if len(runs) > 1:
        for _, run in runs:
            axes.plot(run[over], run[metric], label="_", linewidth=0.8, alpha=0.45, **style)
    by_epoch = rows.groupby("epoch")
    mean = by_epoch[[metric, "minutes"]].mean()[by_epoch.size() == len(runs)].reset_index()
    every = max(1, math.ceil(len(mean) / 8))
    marker = MARKERS[number % len(MARKERS)]
    axes.plot(
        mean[over],
        mean[metric],
        marker=marker,
        markevery=every,
        markersize=5,
        linewidth=1.8,
        label=str(number),
        **style,
    )


def class_bars(classes: pd.DataFrame) -> bytes:
    """PNG of the differences by class, largest gain on top: filled where they are significant after Holm, else hatched."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    pairs = [
        (names, table[table["class"] != ALL].head(SHOWN_CLASSES).sort_values("difference"))
        for names, table in classes.groupby(["first", "second"], sort=False)
    ]
    heights = [1.2 + 0.26 * len(table) for _, table in pairs]
    figure = Figure(figsize=(8, 0.6 + sum(heights)), layout="constrained")
    for axes, ((first, second), table) in zip(
        figure.subplots(len(pairs), squeeze=False, height_ratios=heights).flatten(), pairs, strict=True
    ):
        places = range(len(table))
        fills = [COLOURS[1] if p < SIGNIFICANT else "white" for p in table.p_holm]
        hatches = ["" if p < SIGNIFICANT else "////" for p in table.p_holm]
        axes.barh(places, table.difference, 0.7, color=fills, hatch=hatches, edgecolor=COLOURS[1])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(places, [_short(name) for name in table["class"]], parse_math=False)
        axes.set_title(
            f"{_short(str(second))} against {_short(str(first))}", loc="left", fontweight="bold", parse_math=False
        )
        axes.set_xlabel("difference of validation top-1, percentage points")
        axes.grid(axis="x", color="#e4e4e4")
        axes.set_axisbelow(True)
    patches = [
        Patch(facecolor=COLOURS[1], edgecolor=COLOURS[1], label=f"p < {SIGNIFICANT} (McNemar, Holm)"),
        Patch(facecolor="white", edgecolor=COLOURS[1], hatch="////", label="not significant"),
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)
    return _png(figure)


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:47]}…"


def _png(figure: "Figure") -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
