"""Report on images of several classes: scores and threshold of each class, and what each image is said to be."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, printable
from data_pipeline.sources.catalog import Catalog
from trainer.class_table import class_scores, print_classes
from trainer.multi_label import Found, average_precisions, counts, score
from trainer.predict.class_columns import with_classes
from trainer.predict.cli import csv
from trainer.predict.several_classes import as_lists, separator_of
from trainer.scoring import Trained

PREDICTIONS, SCORES = "predictions.csv", "scores.json"
_ONLY_SINGLE = ("confusion.csv", "confusion.png", "mistakes.png", "calibration.csv", "reliability.png")
"""Files of a report on images of one class each."""


def class_table(found: Found, trained: Trained) -> pd.DataFrame:
    """Make a row for each class, as `class_scores`, with its average precision; what is said follows the run's thresholds."""
    table = class_scores(*counts(found, trained.thresholds), trained.classes)
    table.insert(4, "ap_pct", 100 * average_precisions(found))
    return table


def tables(found: Found, catalog: Catalog, trained: Trained) -> dict[str, pd.DataFrame]:
    """The CSV files by their names."""
    classes = list(map(printable, trained.classes))
    images = [printable(catalog.paths[row]) for row in found.rows]
    mark, said = separator_of(trained.labels, classes), found.probabilities >= trained.thresholds
    by_class = class_table(found, trained).assign(threshold=trained.thresholds)
    predictions = {
        "image": images,
        "label": as_lists(found.present, classes, mark),
        "predicted": as_lists(said, classes, mark),
    }
    return {
        "probabilities.csv": with_classes(pd.DataFrame({"image": images}), found.probabilities, classes),
        "classes.csv": by_class.assign(**{by_class.columns[0]: classes}),
        PREDICTIONS: pd.DataFrame(predictions),
    }


def write(found: Found, catalog: Catalog, trained: Trained, out: Path) -> None:
    """Write all files of the report. Raises `UserError`."""
    by_class, scores = class_table(found, trained), score(found, trained.thresholds)
    exact = ((found.probabilities >= trained.thresholds) == found.present).all(axis=1)
    means = by_class[["precision_pct", "recall_pct"]].mean()
    figures = {
        "images": len(found.rows),
        **scores.figures(),
        "all_classes_right_pct": 100 * float(np.mean(exact)),
        **{f"mean_{name}": float(value) for name, value in means.items()},
    }
    files = {SCORES: (json.dumps(figures, indent=1) + "\n").encode()}
    files |= {name: csv(table) for name, table in tables(found, catalog, trained).items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (PREDICTIONS, *_ONLY_SINGLE):
            (out / name).unlink(missing_ok=True)
        for name, content in files.items():
            replace_file(out / name, content)
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); give another folder") from None


def print_report(found: Found, trained: Trained, title: str, out: Path) -> None:
    """Print the scores of all classes as a table, then those of the whole."""
    print_classes(class_table(found, trained))
    print(f"{title}: {score(found, trained.thresholds).words()}\n{printable(str(out))}: the report", file=sys.stdout)
