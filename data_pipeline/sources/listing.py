"""What every layout gives: the samples of one split, not yet looked into."""

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import require
from data_pipeline.sources.image_headers import SUFFIXES

UNLABELLED = -1
"""Label of images of no known class; loaders give them as `loader.IGNORE_LABEL`, which is the same."""
KINDS = ", ".join(sorted(SUFFIXES))


@dataclass(frozen=True)
class Taken:
    """How a dataset was understood, for a run to say at its start."""

    layout: str = ""
    """The layout in a few words; of a table its columns too, as "table train.csv: images by id, classes by breed"."""
    val_from: str = ""
    """Where the validation images come from, as "Testing/" or "10 % of each class, by a hash of the names"."""
    divided_from: int = 0
    """Images of the whole set where `data.val_share` has divided it and the listing is one part; else 0."""
    notes: list[str] = field(default_factory=list)
    """What was left aside or is odd, a line each, as "3 .gif files are not read"."""


@dataclass(frozen=True)
class Listing:
    """The N samples of one split, not yet looked into."""

    root: Path
    paths: list[str]
    """Below `root`: of each image, or of each SHARD/MEMBER."""
    labels: list[int]
    classes: list[str]
    watched: list[Path]
    """Files and folders whose times of change tell whether the listing still holds."""
    shards: list[str] = field(default_factory=list)
    """Paths of the tar files below `root`; none where each sample is a file."""
    spans: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3), np.int64))
    """[N, 3] number of the shard, offset and length in bytes of each sample; empty where each is a file."""
    taken: Taken = field(default_factory=Taken)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def share(listing: Listing, val_share: float, split: str) -> Listing:
    """The part of an undivided set that is `split`: decided by a hash of each name, so that others never matter."""
    rows = [row for row, path in enumerate(listing.paths) if (_hash(path) < val_share * 2**64) == (split == "val")]
    require(
        len(rows) > 0,
        f"data.val_share: {val_share} leaves no image in {listing.root} for {split}; give another share or more images",
    )
    return replace(
        listing,
        paths=[listing.paths[row] for row in rows],
        labels=[listing.labels[row] for row in rows],
        spans=listing.spans[rows] if len(listing.spans) else listing.spans,
        taken=replace(listing.taken, divided_from=len(listing.paths)),
    )


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
