"""Images of several classes: a label is then the row of a set of classes in a matrix, and not a class.

So everything that carries labels, such as an order, a padding or a batch, is the same for one class and for several.
"""

import numpy as np
from numpy.typing import NDArray

LabelSets = NDArray[np.bool_]
"""[S, C] different sets of classes that images have, True where a set has the class; [0, 0] where each image has one class."""
NO_SETS: LabelSets = np.empty((0, 0), np.bool_)


def as_sets(rows: list[list[int]], classes: int) -> tuple[list[int], LabelSets]:
    """Number the different sets among `rows`, the classes of each image; returns each image's number, and the sets."""
    different = sorted({tuple(sorted(row)) for row in rows})
    numbers = {its: number for number, its in enumerate(different)}
    sets = np.zeros((len(different), classes), np.bool_)
    for number, its in enumerate(different):
        sets[number, list(its)] = True
    return [numbers[tuple(sorted(row))] for row in rows], sets


def targets_of(labels: NDArray[np.int64], sets: LabelSets, classes: int) -> NDArray[np.float32]:
    """Look up [B, C] 1 for each class of an image, 0 for the others and where its label is negative. `labels` [B]."""
    targets = np.zeros((len(labels), classes), np.float32)
    counted = np.flatnonzero(labels >= 0)
    if len(sets):
        targets[counted] = sets[labels[counted]]
    else:
        targets[counted, labels[counted]] = 1
    return targets


def class_counts(labels: NDArray[np.int64], sets: LabelSets, classes: int) -> NDArray[np.int64]:
    """Count [C] the images of each class."""
    if not len(sets):
        return np.bincount(labels, minlength=classes)
    return np.bincount(labels, minlength=len(sets)) @ sets.astype(np.int64)


def strata(labels: NDArray[np.int64], sets: LabelSets, classes: int) -> NDArray[np.int64]:
    """Choose [N] one class for each image, to divide images by: of several the rarest; `classes` where it has none."""
    if not len(sets):
        return labels
    rarity = class_counts(labels, sets, classes).argsort(kind="stable")
    in_order = sets[:, rarity]
    rarest = np.where(in_order.any(axis=1), rarity[in_order.argmax(axis=1)], classes)
    return rarest[labels]
