"""Charts of curves by matplotlib: PNG files, and inline SVG in the colours of its page, by day and by night.

For a page, matplotlib draws with the colours of the day; variables of the page's style sheet then replace them, and a
curve shows its name under the pointer.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from data_pipeline.common.errors import printable
from trainer.report.html_page import INK, RULE, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    ("#0b62c4", "#6db1ff"),
    ("#c2410c", "#ff9d5c"),
    ("#0f7b3f", "#54d08a"),
    ("#a21caf", "#ea8bf5"),
    ("#8a6500", "#e3bd45"),
    ("#b4123b", "#ff8ba7"),
    ("#0e7490", "#4fd3e8"),
    ("#57534e", "#c9c4bd"),
)
"""Colours of the first, second, ... series: on white and on black."""
DASHES = ("", "6 3", "2 3", "8 3 2 3", "5 1 1 1")
"""Lengths of dashes and gaps, in points; "" for none."""
_POINTS = 200
"""Most points of a curve: of a longer one each stands for the mean of its stretch."""
_FEW = 12
"""Points up to which each is a dot on its line."""
_OUTLIER, _DECADES = 5.0, 100.0
"""With a loss so many times the median the axis is logarithmic, as it would flatten the rest; so many times, and it is cut."""


class Panel(NamedTuple):
    """Contents of one chart."""

    title: str
    unit: str
    metric: str
    kind: Literal["share", "loss", "rate"]
    """A loss has a logarithmic axis where an outlier would flatten the rest. A rate begins at zero, and its peaks are cut."""


VAL_TOP1 = Panel("Validation top-1", "%", "val/top1_pct", "share")
TRAIN_TOP1 = Panel("Training top-1", "%", "train/top1_pct", "share")
VAL_MAP = Panel("Validation mAP", "%", "val/map_pct", "share")
VAL_F1 = Panel("Validation macro F1", "%", "val/macro_f1_pct", "share")
VAL_LOSS = Panel("Validation loss", "nats", "val/loss", "loss")
TRAIN_LOSS = Panel("Training loss", "nats", "train/loss", "loss")
RATE = Panel("Learning rate", "per optimizer step", "train/lr", "rate")
SPEED = Panel("Throughput", "images/s", "perf/images_per_s", "rate")
DATA_WAIT = Panel("Data wait", "% of the training time", "perf/data_wait_pct", "rate")


class Curve(NamedTuple):
    """One line of a chart."""

    name: str
    points: list[tuple[float, float]]
    """x ascending; a y that is NaN leaves a gap."""
    colour: int
    dashes: int = 0
    thin: bool = False
    """True for one of several lines whose mean is another line."""


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw(axes: "Axes", panel: Panel, curves: list[Curve], over: str) -> None:
    """Draw the curves over "epoch" or "minutes"."""
    curves = [curve._replace(points=thinned(curve.points)) for curve in curves]
    values = np.array([y for curve in curves for _, y in curve.points])
    bottom, top, logarithmic, note = limits(values[np.isfinite(values)], panel.kind)

    # A thin line is one of several seeds. By its id a curve shows its name under the pointer.
    for number, curve in enumerate(curves):
        x, y = np.array(curve.points or [(0.0, math.nan)]).T
        (line,) = axes.plot(x, np.clip(y, bottom, top), color=colour(curve.colour), linestyle=linestyle(curve.dashes))
        line.set(linewidth=0.8 if curve.thin else 1.8, alpha=0.45 if curve.thin else 1, clip_on=False)
        if not curve.thin:
            line.set(marker="o", markersize=4, markevery=_dotted(y))
        line.set_gid(f"curve{number}")

    # Titles, and axes that begin at nought unless they are logarithmic.
    axes.set_title(panel.title, loc="left", fontweight="bold", color=INK)
    axes.set_title(panel.unit + note, loc="right", color=SOFT)
    axes.set_xlabel({"epoch": "epoch", "minutes": "minutes of training"}[over])
    last = max([x for curve in curves for x, _ in curve.points], default=0.0)
    axes.set_xlim(0, max(math.ceil(last), 1) if over == "epoch" else last or 1.0)
    if logarithmic:
        axes.set_yscale("log")
        plain_numbers(axes)
    elif panel.kind != "share":
        axes.set_ylim(bottom=0)
    if math.isfinite(top):
        axes.set_ylim(top=top)
    if over == "epoch":
        axes.locator_params("x", integer=True)
    if not len(values):
        axes.text(0.5, 0.5, "no figures yet", transform=axes.transAxes, ha="center", color=SOFT)
    axes.grid(axis="y", color=RULE)


def colour(number: int) -> str:
    """Colour of a series, by day."""
    return COLOURS[number % len(COLOURS)][0]


def linestyle(number: int) -> Any:
    """DASHES in matplotlib's form."""
    lengths = [float(length) for length in DASHES[number % len(DASHES)].split()]
    return (0, lengths) if lengths else "-"


def limits(values: NDArray[np.float64], kind: str) -> tuple[float, float, bool, str]:
    """Compute the range to draw, if the axis is logarithmic, and an addition to the title. `values` [N] are finite."""
    if kind == "loss" and (values > 0).any():
        middle = float(np.median(values[values > 0]))
        if values.max() > _OUTLIER * middle:
            cut = values.max() > _DECADES * middle
            bottom = max(float(values[values > 0].min()), middle / _DECADES)
            return bottom, _DECADES * middle if cut else math.inf, True, ", log" + "; peaks cut" * bool(cut)
    if kind == "rate" and len(values):
        usual = 3 * float(np.quantile(values, 0.95))
        if 0 < usual < values.max():
            return -math.inf, usual, False, "; peaks cut"
    return -math.inf, math.inf, False, ""


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Thin a curve to at most 200 points: means of stretches of equal width in x, NaN where one holds a NaN."""
    if len(points) <= _POINTS:
        return points
    x, y = np.array(points).T
    stretch = np.minimum(((x - x[0]) / (x[-1] - x[0] or 1) * _POINTS).astype(int), _POINTS - 1)
    count = np.bincount(stretch)
    filled = count > 0
    means = (np.bincount(stretch, weights=values)[filled] / count[filled] for values in (x, y))
    return list(zip(*(mean.tolist() for mean in means), strict=True))


def _dotted(y: NDArray[np.float64]) -> list[int]:
    """Rows of the points that are dots: all where there are few, else those between two gaps, which no line shows."""
    there = np.isfinite(y)
    if len(y) <= _FEW:
        return np.flatnonzero(there).tolist()
    padded = np.concatenate([[False], there, [False]])
    return np.flatnonzero(there & ~padded[:-2] & ~padded[2:]).tolist()


def plain_numbers(axes: "Axes") -> None:
    """Make a logarithmic y axis show 100 and 200 instead of powers, as its range is often less than one of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@contextmanager
def styled() -> Iterator[None]:
    """Apply matplotlib's settings for making and saving a figure: names are no formulas, text in SVG stays text."""
    import matplotlib

    settings = {
        "axes.edgecolor": RULE,
        "axes.labelcolor": SOFT,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "the same each time",
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
    }
    with matplotlib.rc_context(settings):
        yield


# ---- in a page ------------------------------------------------------------------------------------------------------


def style() -> str:
    """CSS of the charts, for a page that shows the colours of the night where its reader prefers them."""

    def colours(night: int) -> str:
        return "".join(f"--c{number}:{pair[night]};" for number, pair in enumerate(COLOURS))

    return (
        f":root{{{colours(0)}}}@media(prefers-color-scheme:dark){{:root{{{colours(1)}}}}}"
        ".charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.2rem}"
        ".chart{width:100%;height:auto}.chart text{font-family:inherit!important}"
    )


def chart(panel: Panel, curves: list[Curve], over: str = "epoch") -> Markup:
    """The curves as an SVG element of a page."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        draw(figure.subplots(), panel, curves, over)
        return inline(figure, panel.title, {f"curve{number}": curve.name for number, curve in enumerate(curves)})


def inline(figure: "Figure", title: str, names: Mapping[str, str] | None = None) -> Markup:
    """Draw a figure as an SVG element called `title`; elements with the ids in `names` show these names. Within `styled`."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    drawn = stream.getvalue()
    box = re.search(r'viewBox="[^"]*"', drawn)
    drawn = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]  # without a header that has addresses and a size
    # Nothing lies outside the axes, and a clipping path needs ids that several charts would share.
    drawn = re.sub(r'<clipPath.*?</clipPath>| clip-path="[^"]*"', "", drawn, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    for name, said in (names or {}).items():
        drawn = drawn.replace(f'<g id="{name}">', f"<g><title>{escape(printable(said))}</title>")
    wanted = {*re.findall(r'#(\w+)[")]', drawn)}
    drawn = re.sub(r' id="(\w+)"', lambda found: found[0] if found[1] in wanted else "", drawn)
    drawn = re.sub(r"\s*\n\s*", "\n", re.sub(r"<defs>\s*</defs>", "", drawn))
    return Markup(f'<svg class="chart" {box[0] if box else ""} role="img" aria-label="{escape(title)}">{drawn}')


_VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", **{day: f"c{n}" for n, (day, _) in enumerate(COLOURS)}}


def swatch(colour: int, dashes: int = 0) -> Markup:
    """A short piece of a series' line, for a legend."""
    return Markup(
        '<svg width="28" height="10" aria-hidden="true"><line x1="1" x2="27" y1="5" y2="5" stroke-width="1.8" '
        f'stroke="var(--c{colour % len(COLOURS)})" stroke-dasharray="{DASHES[dashes % len(DASHES)]}"/></svg>'
    )
