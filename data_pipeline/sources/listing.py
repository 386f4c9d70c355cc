"""Result of every layout: the samples of one split, before any file is opened."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.label_sets import NO_SETS, LabelSets
from data_pipeline.sources.image_headers import SUFFIXES
from data_pipeline.sources.storage.objects import Objects

UNLABELLED = -1
"""Label of images of unknown class; the same number as `host_batch.IGNORE_LABEL`."""
TABLE_OPTIONS = ("images", "image_column", "label_column", "labels", "split_column")
"""Fields of `DataConfig` about a table; a layout without one reads none of them."""
KINDS = ", ".join(sorted(SUFFIXES))
_UNREAD = frozenset(
    {".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".svg", ".psd", ".dcm"}
)
_SHOWN = 3  # files that are named
_FOREIGN = frozenset(
    {
        *("__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
        *("Thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.ini"),
    }
)


@dataclass(frozen=True)
class Taken:
    """Description of how a dataset was understood, printed at the start of a run."""

    layout: str = ""
    """Layout in a few words, for a table with its columns: "table train.csv: images by id, classes by breed"."""
    val_from: str = ""
    """Source of the validation images, as "Testing/" or "10 % of each class, by a hash of the names"."""
    divided_from: int = 0
    """Images of the whole set where `data.val_share` or `data.fold` has divided it and the listing is one part; else 0."""
    notes: list[str] = field(default_factory=list)
    """Oddities and files left out, a line each, as "3 .gif files are not read"."""
    options: list[str] = field(default_factory=list)
    """Options of `TABLE_OPTIONS` that this layout reads."""
    written: str = ""
    """Form of several classes of an image in a table: "columns" of 0 and 1, or the character between; "" where each has one."""


class LeftOut:
    """Files below the folders of images that are not read."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._unread: Counter[str] = Counter()
        """Suffix of images of a kind that is not read -> number of them."""
        self._others: Counter[str] = Counter()
        """Suffix of other files -> number of them."""
        self._one: dict[str, str] = {}
        """Suffix -> path of a file."""
        for path in paths:
            self.add(path)

    def add(self, path: str) -> None:
        suffix = os.path.splitext(path)[1].lower()
        (self._unread if suffix in _UNREAD else self._others)[suffix] += 1
        self._one.setdefault(suffix, path)

    def images(self) -> list[str]:
        """Say in a line which images were left out."""
        kinds = " and ".join(counted(count, f"{suffix} file") for suffix, count in sorted(self._unread.items()))
        return [f"of kinds that are not read, until converted to PNG or JPEG: {kinds}"] if kinds else []

    def others(self) -> list[str]:
        """Say in a line which other files were left out."""
        few = ", ".join(self._one[suffix] for suffix, _ in self._others.most_common(_SHOWN))
        return [f"not named as images, so left out: {counted(self._others.total(), 'file')}, as {few}"] if few else []


@dataclass(frozen=True)
class Listing:
    """N samples of one split, before any file is opened."""

    root: Path
    paths: list[str]
    """Path of each image below `root`, or SHARD/MEMBER."""
    labels: list[int]
    """Row of each image's class in `classes`, or of its set in `label_sets`."""
    classes: list[str]
    watched: list[Path]
    """Files and folders whose change times tell if the listing still holds."""
    shards: list[str] = field(default_factory=list)
    """Paths of the tar files below `root`; empty where each sample is a file."""
    spans: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3), np.int64))
    """[N, 3] number of the shard, offset and length in bytes of each sample; empty where each is a file."""
    taken: Taken = field(default_factory=Taken)
    objects: Objects | None = None
    """The shards, where `root` is an address."""
    forms: list[str] = field(default_factory=list)
    """Form of the samples in each of `shards`, see `stored_forms`; empty where all are plain bytes."""
    label_sets: LabelSets = field(default_factory=lambda: NO_SETS)
    """Sets of classes, where images have several; else empty."""


def hidden_note(folders: list[str]) -> list[str]:
    """Say in a line which hidden folders with images were left out: a class may be called .net."""
    return [f"hidden, so left out: {', '.join(f'{folder}/' for folder in folders[:5])}"] if folders else []


def counted(count: int, noun: str) -> str:
    """Write a count, as "1 image" or "1,200 images"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_foreign(name: str) -> bool:
    """Return True for a file or folder of another program: hidden, a Mac's companion file, a server's thumbnails."""
    return name.startswith(".") or name in _FOREIGN
