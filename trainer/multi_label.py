"""Scores of images of several classes: average precision, F1, and the threshold of each class."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from data_pipeline.batch import IGNORE_LABEL
from data_pipeline.common.errors import UserError
from data_pipeline.cursor import Cursor
from data_pipeline.loader import Loader
from trainer.checkpoint.progress import BestBy
from trainer.distributed import DistContext

UNKNOWN = 0.5
"""Threshold of a class for which none could be found: no scored image is of it."""


class LabelScores(NamedTuple):
    """Scores of a model on images of several classes."""

    loss: float
    """Mean binary cross-entropy over images and classes in nats, without smoothing and weights."""
    map_pct: float
    """Mean of the average precision of the classes that some image is of."""
    macro_f1_pct: float
    """Mean of the F1 of these classes, at `thresholds`."""
    images: int
    thresholds: NDArray[np.float64]
    """[C] probability from which on an image is said to be of the class."""

    def by(self, name: BestBy) -> float:
        """Return the score that chooses the best weights."""
        return {"map": self.map_pct, "macro_f1": self.macro_f1_pct, "loss": self.loss}[name]

    def words(self) -> str:
        """The scores for people."""
        return f"loss {self.loss:.4f}  mAP {self.map_pct:.2f} %  macro F1 {self.macro_f1_pct:.2f} %"

    def figures(self) -> dict[str, float]:
        """The scores by their names."""
        return {"loss": self.loss, "map_pct": self.map_pct, "macro_f1_pct": self.macro_f1_pct}


class ClassCounts(NamedTuple):
    """Numbers [C] of each class over the scored images."""

    hits: NDArray[np.int64]
    images: NDArray[np.int64]
    predicted: NDArray[np.int64]


class Found(NamedTuple):
    """Predictions for the N images of a split that could be read, in its order, the same on all ranks."""

    rows: NDArray[np.int64]
    """[N] row of each image in the catalog."""
    probabilities: NDArray[np.float32]
    """[N, C] of each class by itself."""
    present: NDArray[np.bool_]
    """[N, C] True for the classes of an image."""
    losses: NDArray[np.float64]
    """[N] binary cross-entropy of each image, the mean over classes."""


class ClassCurve(NamedTuple):
    """Scores of one class."""

    average_precision: float
    """Sum of the precision at each recall, by the recall gained there, without interpolation; NaN for a class without images."""
    threshold: float
    """Probability with the largest F1, halfway between the last image that is taken and the first that is not."""


def class_curve(scores: NDArray[np.float32], present: NDArray[np.bool_]) -> ClassCurve:
    """Rank images by their `scores` [N] for a class that they are of where `present` [N]; equal scores are one rank."""
    if not present.any():
        return ClassCurve(math.nan, UNKNOWN)
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order].astype(np.float64), present[order].cumsum()
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # last image of each rank
    taken, found, images = ends + 1, hits[ends], hits[-1]
    precision = float((found / taken * np.diff(found, prepend=0)).sum() / images)
    best = int((2 * found / (taken + images)).argmax())  # of equal ones the highest threshold
    below = ranked[taken[best]] if taken[best] < len(ranked) else 0.0
    return ClassCurve(precision, float(ranked[ends[best]] + below) / 2)


def counts(found: Found, thresholds: NDArray[np.float64]) -> ClassCounts:
    """Count the images that are rightly said to be of each class, that are of it, and that are said to be."""
    said = found.probabilities >= thresholds
    return ClassCounts((said & found.present).sum(axis=0), found.present.sum(axis=0), said.sum(axis=0))


def score(found: Found, thresholds: NDArray[np.float64] | None = None) -> LabelScores:
    """Score predictions, with F1 at these thresholds, or at the best ones for these very images. Raises `UserError`."""
    if not len(found.rows):
        raise UserError("data.path: none of the validation images could be read")
    if not found.present.any():
        raise UserError(
            "data.path: none of the validation images has a class, so there is nothing to score; give others"
        )
    curves = _curves(found)
    used = np.array([curve.threshold for curve in curves]) if thresholds is None else thresholds
    hits, images, said = counts(found, used)
    there = images > 0
    f1 = 2 * hits[there] / (images + said)[there]
    precisions = np.array([curve.average_precision for curve in curves])[there]
    return LabelScores(
        float(found.losses.mean()), 100 * float(precisions.mean()), 100 * float(f1.mean()), len(found.rows), used
    )


def average_precisions(found: Found) -> NDArray[np.float64]:
    """Compute [C] the average precision of each class; NaN for one without images."""
    return np.array([curve.average_precision for curve in _curves(found)])


def _curves(found: Found) -> list[ClassCurve]:
    return [class_curve(*columns) for columns in zip(found.probabilities.T, found.present.T, strict=True)]


def predict_split(predict: Callable[[Tensor], Tensor], loader: Loader, ctx: DistContext) -> Found:
    """Apply `predict` (images to logits [B, C]) to everything that `loader` holds, and gather it. Collective."""
    ids, rows = [], []
    loader.seek(Cursor())
    for batch in loader:
        assert batch.targets is not None, "images have several classes"
        logits = predict(batch.images)
        losses = functional.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none").mean(dim=1)
        rows.append(torch.cat([logits.sigmoid(), losses[:, None]], dim=1))
        ids.append(torch.where(batch.labels != IGNORE_LABEL, batch.ids.to(ctx.device), -1))
    # Every rank has as many rows. Padding, and images that could not be read, drop out; the rest is put in order.
    sample = ctx.gather(torch.cat(ids)).flatten().numpy()
    figures = ctx.gather(torch.cat(rows)).flatten(0, 1).numpy()
    places = np.argsort(sample, kind="stable")[(sample < 0).sum() :]
    sample, figures = sample[places], figures[places]
    present = loader.catalog.targets_of(loader.catalog.labels[sample]) > 0
    return Found(sample, figures[:, :-1], present, figures[:, -1].astype(np.float64))
