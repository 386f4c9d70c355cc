"""Describe the data of a command in a few lines at its start, and check what only its classes and shards show."""

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.address import Address
from data_pipeline.common.class_names import doubts
from data_pipeline.common.errors import printable, require
from data_pipeline.common.launcher import warn_on_rank0
from data_pipeline.config import DataConfig
from data_pipeline.sampling import quotas
from data_pipeline.sources.catalog import Catalog
from data_pipeline.sources.image_headers import BadImage, digest
from data_pipeline.sources.listing import TABLE_OPTIONS, counted
from data_pipeline.sources.quarantine import relative_to_data

_SMALL = 100  # validation images below which their small number is worth a line
_SHOWN = 5  # classes that are named
_COMPARED = 100  # images that are read to see whether they are the same


def refuse_single_class(train: Catalog) -> None:
    """Raise `UserError` where there is only one class."""
    there = [train.classes[label] for label in np.flatnonzero(train.class_counts())]
    require(
        len(there) > 1,
        f"data.path: {train.root} has images of one class only, {', '.join(there)}, and nothing to tell it from; give the "
        "folder above it, add another class, or give a table of the images' classes",
    )


def check_shards(catalog: Catalog, window: int) -> None:
    """Raise `UserError` where there are no shards to shuffle; warn where `window` of them lack classes that others have."""
    require(
        len(catalog.shards) > 0,
        f"data.shuffle_shards: {catalog.root} has no shards; leave it out, or pack the images first",
    )
    classes = len(np.unique(catalog.labels))
    pairs = np.unique(np.stack([catalog.spans[:, 0], catalog.labels]), axis=1)
    most = window * pairs.shape[1] // len(np.unique(pairs[0]))
    if most < classes:
        warn_on_rank0(
            f"data.shuffle_shards: {window} shards of {printable(str(catalog.root))} hold some {most} of {classes} classes, so "
            "that batches are one-sided; raise it, or pack the images with --shuffle"
        )


def summary(cfg: DataConfig, train: Catalog, val: Catalog) -> list[str]:
    """Return two lines on the layout, the images of each split and the classes; then one line on each oddity."""
    counts = train.class_counts()
    small, large = int(counts.argmin()), int(counts.argmax())
    sizes = f"{counts[small]:,} ({train.classes[small]}) to {counts[large]:,} ({train.classes[large]}) training images"
    if counts[small] == counts[large]:
        sizes = f"{counted(int(counts[small]), 'training image')} each"
    lines = [
        f"data: {cfg.path} ({train.taken.layout}): {counted(len(train), 'image')} to train on, {len(val):,} to validate on "
        f"({val.taken.val_from})",
        f"{_several(train, counts)}{len(counts)} classes of {sizes}: {_few(train.classes)}",
        *_balance(cfg, counts, train.classes),
        *_unread(cfg, train),
        *(f"data: {note}" for note in dict.fromkeys([*train.taken.notes, *val.taken.notes])),
        *(f"data: {doubt}" for doubt in [*doubts(train.classes), *_repeated(cfg, train, val)]),
    ]
    for catalog, what in ((train, "training"), (val, "validation")):
        empty = [name for name, images in zip(train.classes, catalog.class_counts(), strict=True) if not images]
        if empty:
            lines.append(f"data: no {what} images of {len(empty)} of {len(counts)} classes: {_few(empty)}")
    if len(val) < _SMALL:
        few = counted(len(val), "validation image")
        share = "" if train.multi_label else f": a single one is {100 / max(len(val), 1):.1f} % of top-1"
        lines.append(f"data: only {few}{share}")
    return [printable(line) for line in lines]


def _repeated(cfg: DataConfig, train: Catalog, val: Catalog) -> list[str]:
    """Say in a line each which images, byte by byte the same, are in both splits, and which have several classes."""
    if not len(train.marks) or not len(val.marks):
        return []

    def named(row: int) -> str:
        catalog, row = (train, row) if row < len(train) else (val, row - len(train))
        path, root = catalog.paths[row], catalog.root
        return path if isinstance(root, Address) else relative_to_data(cfg, root, path)

    marks, labels, lines = _compared(train, val), np.concatenate([train.labels, val.labels]), []
    again = len(train) + np.flatnonzero(np.isin(marks[len(train) :], marks[: len(train)]))
    if len(again):
        twin = int(np.flatnonzero(marks == marks[again[0]])[0])
        lines.append(
            "validation images that are training images too, byte by byte, so that scores are too good: "
            f"{len(again):,} of {len(val):,}, as {named(int(again[0]))} and {named(twin)}; remove one of each, or list it in "
            "data.quarantine"
        )
    order = np.lexsort([labels, marks])
    firsts = order[:-1][(np.diff(marks[order]) == 0) & (np.diff(labels[order]) != 0)]
    if len(firsts):
        one = int(firsts[0])
        other = int(np.flatnonzero((marks == marks[one]) & (labels != labels[one]))[0])
        lines.append(
            f"images that are the same byte by byte, and of different classes: {counted(len(firsts), 'pair')}, as {named(one)} "
            f"and {named(other)}; remove the wrong ones, or list them in data.quarantine"
        )
    return lines


def _compared(train: Catalog, val: Catalog) -> NDArray[np.int64]:
    """Return marks [N + M] of both splits that only the same bytes have in common.

    Large images whose ends are alike, as of scans without compression, are read. Beyond _COMPARED such images, each counts as
    one that is there once.
    """
    marks = np.concatenate([train.marks, val.marks])
    groups = 2 * np.concatenate([train.labels, val.labels]) + (np.arange(len(marks)) >= len(train))
    order = np.lexsort([groups, marks])
    told = marks[order[:-1]][(np.diff(marks[order]) == 0) & (np.diff(groups[order]) != 0)]
    for number, row in enumerate(order[np.isin(marks[order], told[told % 2 == 1])].tolist()):
        marks[row] = -1 - row
        if number < _COMPARED:
            catalog, its_row = (train, row) if row < len(train) else (val, row - len(train))
            with suppress(OSError, BadImage):
                data = catalog.read(its_row)
                marks[row] = digest(data, len(data)) << 1
    return marks


def _several(train: Catalog, counts: NDArray[np.int64]) -> str:
    """Say that images have several classes, and how many they have."""
    if not train.multi_label:
        return ""
    sizes = train.label_sets.sum(axis=1)[train.labels]
    none = f", {counted(int((sizes == 0).sum()), 'image')} without any" if (sizes == 0).any() else ""
    return f"multi-label, {counts.sum() / len(train):.2f} classes an image on average, at most {sizes.max()}{none}; "


def _unread(cfg: DataConfig, train: Catalog) -> list[str]:
    """Say in a line each which options about a table this layout does not read."""
    given = {name: getattr(cfg, name) for name in TABLE_OPTIONS}
    nothing = {"labels": ("auto", "single")}  # the one class that each image has there
    return [
        f"data.{name} {value}: it is for a table that names images, and changes nothing here ({train.taken.layout})"
        for name, value in given.items()
        if value not in nothing.get(name, (None,)) and name not in train.taken.options
    ]


def _balance(cfg: DataConfig, counts: NDArray[np.int64], classes: list[str]) -> list[str]:
    """Say in a line how often an epoch takes the images of the smallest and of the largest class."""
    if cfg.balance == "none":
        return []
    taken = quotas(counts, cfg.balance)
    ends = dict.fromkeys((int(np.where(counts > 0, counts, counts.max()).argmin()), int(counts.argmax())))
    found = (f"{taken[at]:,} of {classes[at]}, each image {taken[at] / counts[at]:.3g} times" for at in ends)
    return [f"data.balance {cfg.balance}: an epoch of {counts.sum():,} images takes {'; '.join(found)}"]


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", …" * (len(names) > _SHOWN)


def print_summary(cfg: DataConfig, train: Catalog, val: Catalog) -> None:
    """Print the summary on stdout."""
    for line in summary(cfg, train, val):
        print(line, flush=True)
