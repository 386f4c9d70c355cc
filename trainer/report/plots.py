"""Pictures of an evaluation report, as PNG files for a screen or a printed page."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.common.errors import printable
from data_pipeline.show import cli as show
from data_pipeline.sources.catalog import Catalog

_ACROSS = 6  # images in a row of the contact sheet
SHEET = 24
"""Most images on the contact sheet."""

_NUMBERED = 30  # classes up to which each cell of the matrix shows its number
_NAMED = 60  # classes up to which each has its name beside the matrix
_LONGEST = 24  # characters of a name on an axis


def confusion_matrix(matrix: NDArray[np.int64], classes: list[str], title: str) -> bytes:
    """Plot numbers of images [C, C], by class (rows) and prediction; the darker, the larger the share of its row."""
    from matplotlib.figure import Figure

    count = len(classes)
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(4.5 + 0.3 * count, 16.0)
    with _plain_text():
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        figure.colorbar(drawn, ax=axes, label="share of the class's images (%)", shrink=0.8)
        axes.set(title=f"Confusion matrix\n{title}", xlabel="predicted class", ylabel="true class")
        if count <= _NAMED:
            names = [_cut(name) for name in classes]
            axes.set_xticks(range(count), names, rotation=90)
            axes.set_yticks(range(count), names)
        if count <= _NUMBERED:
            for row, column in np.argwhere(matrix):
                colour = "white" if shares[row, column] > 50 else "black"
                axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
        return _png(figure)


def reliability(bins: pd.DataFrame, error_pct: float, title: str) -> bytes:
    """Plot accuracy over confidence (Guo et al. 2017, fig. 1), and below it the number of images in each bin."""
    from matplotlib.figure import Figure

    filled = bins[bins.images > 0]
    width, middle = 100 / len(bins), (bins.above_pct + bins.up_to_pct) / 2
    with _plain_text():
        figure = Figure(figsize=(6, 6.5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.bar(middle, bins.accuracy_pct.fillna(0), width, color="#6da7d9", edgecolor="black", label="accuracy")
        upper.plot(filled.confidence_pct, filled.accuracy_pct, "ko", markersize=4, label="mean confidence of the bin")
        upper.plot([0, 100], [0, 100], "k--", linewidth=1, label="perfect calibration")
        upper.set(
            title=f"Reliability: expected calibration error {error_pct:.2f} %\n{title}",
            ylabel="accuracy (%)",
            xlim=(0, 100),
            ylim=(0, 100),
        )
        upper.legend(loc="upper left")
        lower.bar(middle, bins.images, width, color="#bbbbbb", edgecolor="black")
        lower.set(xlabel="confidence of the prediction (%)", ylabel="images")
        return _png(figure)


def contact_sheet(catalog: Catalog, rows: list[int], captions: list[list[str]]) -> bytes:
    """Draw the images in these rows of the catalog, each above its lines of text."""
    cells = [show.whole(catalog, row, caption) for row, caption in zip(rows, captions, strict=True)]
    stream = io.BytesIO()
    show.grid([cells[at : at + _ACROSS] for at in range(0, len(cells), _ACROSS)]).save(stream, "PNG")
    return stream.getvalue()


@contextmanager
def _plain_text() -> Iterator[None]:
    """Show class names unchanged: no formula between two dollar signs, no warning of a letter that the font lacks."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings(action="ignore"):
        yield


def _cut(name: str) -> str:
    name = " ".join(printable(name).split())
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _png(figure: object) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)  # type: ignore[attr-defined]
    return stream.getvalue()
