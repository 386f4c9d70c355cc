"""Precision, recall and F1 of each class, as a table."""

import sys

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.common.errors import printable


def class_scores(
    hits: NDArray[np.int64], images: NDArray[np.int64], predicted: NDArray[np.int64], classes: list[str]
) -> pd.DataFrame:
    """Compute precision, recall and F1 of each class in percent, from its numbers [C] of hits, images and predictions.

    NaN where zero is divided by zero: the precision of a class never predicted, the recall of one without images.
    """
    with np.errstate(invalid="ignore"):
        rates = {
            "precision_pct": 100 * hits / predicted,
            "recall_pct": 100 * hits / images,
            "f1_pct": 200 * hits / (images + predicted),
        }
    return pd.DataFrame({"class": classes, **rates, "support": images, "predicted": predicted})


def print_classes(scores: pd.DataFrame, most: int | None = None) -> None:
    """Print the scores of all classes, or of the `most` with the lowest recall, and their means over all classes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    titles = {"precision_pct": "precision %", "recall_pct": "recall %", "f1_pct": "F1 %", "ap_pct": "AP %"}
    figures_of = [name for name in scores if name in titles]
    table = Table("class", *(titles[name] for name in figures_of), "images", "predicted", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    shown = scores if most is None or len(scores) <= most else scores.nsmallest(most, "recall_pct")
    for name, *rates, support, predicted in shown.itertuples(index=False):
        figures = ["-" if np.isnan(rate) else f"{rate:.2f}" for rate in rates]
        table.add_row(Text(printable(name)), *figures, str(support), str(predicted))
    means = [f"{mean:.2f}" for mean in scores[figures_of].mean()]
    total = f"{scores.support.sum()}", f"{scores.predicted.sum()}"
    left = (
        f" (those of {len(scores) - len(shown)} with a higher recall are not shown)" if len(shown) < len(scores) else ""
    )
    table.add_row(Text(f"mean of the classes{left}"), *means, *total, style="bold")
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
