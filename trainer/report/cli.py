"""Show the strong and weak classes of a run: python -m trainer.report RUN [--data.path FOLDER] [--out DIR]

DIR, RUN/report if not given, then holds

predictions.csv    image, label, predicted, confidence: one row for each validation image
probabilities.csv  image, and the probability of each class
classes.csv        precision, recall and F1 of each class
confusion.csv/.png images by their class, in rows, and by the predicted class, in columns
mistakes.png       the wrong predictions with the highest confidence
calibration.csv, reliability.png   share of right predictions for each confidence
scores.json        accuracy, loss and calibration error

For images of several classes: see `label_report`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.common.worker_pool import progress
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import Catalog
from trainer.class_table import class_scores, print_classes
from trainer.config import Config
from trainer.distributed import open_dist_context
from trainer.multi_label import predict_split, score
from trainer.predict.class_columns import with_classes
from trainer.predict.cli import View, csv, predict_all
from trainer.report import label_report, plots
from trainer.scoring import open_scored, open_trained, scored_on
from trainer.tracking.meter import Scores

BINS = 15
"""Ranges of confidence, of equal width (Guo et al. 2017, sec. 4)."""

PREDICTIONS = "predictions.csv"


def confusion(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Count [C, C] images by label (rows) and by prediction (columns); `labels` and `predicted` are [N]."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def calibration(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> pd.DataFrame:
    """Compute the share of right predictions in each of BINS ranges of confidence, without their lower end (ibid., eq. 1).

    `confidence` [N] in 0..1 and `right` [N] are of the predicted classes. Accuracy and confidence of a bin without images
    are NaN.
    """
    edges = np.linspace(0, 1, BINS + 1)
    bins = np.clip(np.searchsorted(edges, confidence.astype(np.float64), side="left") - 1, 0, BINS - 1)
    images = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        sure = 100 * np.bincount(bins, weights=confidence, minlength=BINS) / images
        accurate = 100 * np.bincount(bins, weights=right, minlength=BINS) / images
    ends = {"above_pct": 100 * edges[:-1], "up_to_pct": 100 * edges[1:]}
    return pd.DataFrame({**ends, "images": images, "confidence_pct": sure, "accuracy_pct": accurate})


def calibration_error_pct(bins: pd.DataFrame) -> float:
    """Compute the expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3) in percent, from `calibration`."""
    gaps = (bins.accuracy_pct - bins.confidence_pct).abs() * bins.images
    return float(gaps.sum() / bins.images.sum())


class Report:
    """Evaluation of N counted images with their `labels` [N], by the logarithms [N, C] of their probabilities."""

    def __init__(
        self, images: list[str], labels: NDArray[np.int64], log_probabilities: NDArray[np.float32], classes: list[str]
    ) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.log_probabilities, self.probabilities = log_probabilities, np.exp(log_probabilities)
        self.predicted = self.probabilities.argmax(axis=1)
        self.confidence = self.probabilities.max(axis=1)
        self.right = self.predicted == labels
        self.matrix = confusion(labels, self.predicted, len(classes))
        self.by_class = class_scores(np.diag(self.matrix), self.matrix.sum(axis=1), self.matrix.sum(axis=0), classes)
        self.bins = calibration(self.confidence, self.right)

    def total(self) -> Scores:
        # Of logarithms, as float32 has probabilities of at most 1e-45 as 0.
        losses = -self.log_probabilities[np.arange(len(self.labels)), self.labels].astype(np.float64)
        top5 = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :5] == self.labels[:, None]
        hits = self.right.mean(), top5.any(axis=1).mean()
        return Scores(float(losses.mean()), 100 * float(hits[0]), 100 * float(hits[1]), len(self.labels))

    def scores(self) -> dict[str, float]:
        means = self.by_class[["precision_pct", "recall_pct", "f1_pct"]].mean()
        return {
            "images": len(self.labels),
            **self.total().figures(len(self.classes)),
            "expected_calibration_error_pct": calibration_error_pct(self.bins),
            "mean_confidence_pct": 100 * float(self.confidence.mean(dtype=np.float64)),
            **{f"mean_{name}": float(value) for name, value in means.items()},
        }

    def surest_mistakes(self, most: int) -> NDArray[np.int64]:
        """Rows of the wrong predictions, the most confident first."""
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:most]

    def tables(self) -> dict[str, pd.DataFrame]:
        """The CSV files by their names."""
        classes, images = list(map(printable, self.classes)), list(map(printable, self.images))
        names = np.array(classes, object)
        predictions = {
            "image": images,
            "label": names[self.labels],
            "predicted": names[self.predicted],
            "confidence": self.confidence,
        }
        return {
            "probabilities.csv": with_classes(pd.DataFrame({"image": images}), self.probabilities, classes),
            "classes.csv": self.by_class.assign(**{self.by_class.columns[0]: classes}),
            "confusion.csv": with_classes(pd.DataFrame({"label": classes}), self.matrix, classes),
            "calibration.csv": self.bins,
            PREDICTIONS: pd.DataFrame(predictions),
        }


def write(report: Report, catalog: Catalog, rows: NDArray[np.int64], title: str, out: Path) -> None:
    """Write all files of the report; PREDICTIONS comes last, when the others exist. Raises `UserError`.

    `rows` [N] are the images of the report in `catalog`.
    """
    scores = report.scores()
    files = {
        "scores.json": (json.dumps(scores, indent=1) + "\n").encode(),
        "confusion.png": plots.confusion_matrix(report.matrix, report.classes, title),
        "reliability.png": plots.reliability(report.bins, scores["expected_calibration_error_pct"], title),
    }

    # A sheet of the mistakes that the network was surest of, if it made any.
    wrong = report.surest_mistakes(plots.SHEET)
    if len(wrong):
        captions = [
            [
                Path(report.images[row]).name,
                f"is {report.classes[report.labels[row]]}",
                f"{report.confidence[row]:.1%} {report.classes[report.predicted[row]]}",
            ]
            for row in wrong
        ]
        files["mistakes.png"] = plots.contact_sheet(catalog, rows[wrong].tolist(), captions)
    files |= {name: csv(table) for name, table in report.tables().items()}

    # What an earlier report left must not stand beside this one's files.
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PREDICTIONS).unlink(missing_ok=True)
        (out / "mistakes.png").unlink(missing_ok=True)
        for name, content in files.items():
            replace_file(out / name, content)
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); give another folder") from None


def print_report(report: Report, title: str, out: Path) -> None:
    """Print the scores of all classes as a table, then those of the whole."""
    print_classes(report.by_class)
    scores = report.scores()
    print(
        f"{title}: {report.total().words(len(report.classes))}  "
        f"expected calibration error {scores['expected_calibration_error_pct']:.2f} % "
        f"(mean confidence {scores['mean_confidence_pct']:.2f} %)\n{printable(str(out))}: the report"
    )


def report_run(folder: Path, cfg: Config, out: Path) -> None:
    """Score the run in `folder` and write its report to `out`. Collective. Raises `UserError`."""
    with (
        progress("opening the run"),
        open_dist_context(device=cfg.engine.device, bind_cores=cfg.engine.bind_cores) as ctx,
    ):
        trained = ctx.raise_together(lambda: open_trained(folder, cfg, ctx))
        classes = trained.classes
        catalog = ctx.raise_together(lambda: open_scored(folder, cfg.data, trained))
        if ctx.primary:
            for path, why in catalog.bad.items():
                print(f"left out {printable(str(catalog.root / path))}: {why}", file=sys.stderr)
        if trained.multi_label:
            several = predict_split(trained.predict, Loader(cfg.data, catalog, ctx, training=False), ctx)
            score(several)  # it raises where there is nothing to score
            ctx.run_on_rank0(lambda: label_report.write(several, catalog, trained, out))
            if ctx.primary:
                title = printable(f"{trained.checkpoint} on {scored_on(catalog, len(several.rows))}")
                label_report.print_report(several, trained, title, out)
            return

        def log_probabilities(shown: Tensor) -> Tensor:
            return trained.predict(shown).log_softmax(dim=1)

        found = predict_all(log_probabilities, len(classes), catalog, cfg.data, ctx, View())
        rows = np.flatnonzero(found.readable)
        require(len(rows) > 0, "data.path: none of the validation images could be read")
        images = [catalog.paths[row] for row in rows]
        report = Report(images, catalog.labels[rows], found.probabilities[rows], classes)
        title = printable(f"{trained.checkpoint} on {scored_on(catalog, len(rows))}")
        with progress("drawing the report"):
            ctx.run_on_rank0(lambda: write(report, catalog, rows, _short_title(folder, len(rows)), out))
    if ctx.primary:
        print_report(report, title, out)


def _short_title(folder: Path, images: int) -> str:
    return f"{printable(folder.resolve().name)}, {images} validation images"
