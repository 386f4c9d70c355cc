"""What a command says at its start of the data that it took."""

import numpy as np

from data_pipeline.config import DataConfig, require
from data_pipeline.sources.catalog import Catalog
from data_pipeline.sources.quarantine import printable

_SMALL = 100  # validation images below which their number is worth a line
_SHOWN = 5  # classes that are named


def refuse_single_class(train: Catalog) -> None:
    """Raise `UserError` where there is nothing to tell a class from."""
    there = {train.classes[label] for label in np.unique(train.labels)}
    require(
        len(there) > 1,
        f"data.path: {train.root} has images of one class only, {', '.join(there)}, and nothing to tell it from; give the "
        "folder above it, or add another class",
    )


def summary(cfg: DataConfig, train: Catalog, val: Catalog) -> list[str]:
    """Two lines on the layout, the images of each split and the classes; then one on each thing that is odd."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    small, large = int(counts.argmin()), int(counts.argmax())
    names = [printable(name) for name in train.classes]
    notes = list(dict.fromkeys([*train.taken.notes, *val.taken.notes]))
    for catalog, what in ((train, "training"), (val, "validation")):
        empty = sorted(set(range(len(names))) - set(catalog.labels.tolist()))
        if empty:
            notes.append(
                f"{len(empty)} of {len(names)} classes have no {what} images: {_few([names[n] for n in empty])}"
            )
    if len(val) < _SMALL:
        notes.append(f"only {len(val)} validation images: a single one is {100 / max(len(val), 1):.1f} % of top-1")
    sizes = f"{counts[small]:,} ({names[small]}) to {counts[large]:,} ({names[large]}) training images"
    each = f"{counts[small]:,} training images each" if counts[small] == counts[large] else sizes
    return [
        f"data: {printable(cfg.path)} ({train.taken.layout}): {len(train):,} images to train on, {len(val):,} to validate "
        f"on ({val.taken.val_from})",
        f"{len(names)} classes of {each}: {_few(names)}",
        *(f"data: {printable(note)}" for note in notes),
    ]


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", …" * (len(names) > _SHOWN)


def print_summary(cfg: DataConfig, train: Catalog, val: Catalog) -> None:
    """The same on stdout."""
    for line in summary(cfg, train, val):
        print(line, flush=True)
