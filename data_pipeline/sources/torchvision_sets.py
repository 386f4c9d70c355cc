"""Datasets by name: downloaded once, through torchvision, which knows their addresses and checksums.

            train      val      torchvision's splits
imagenette  train      val      at 320 px
cifar10     train      test     as PNG files
flowers102  train      val      ten images of each class in both; its test split is a third part of the table
flowers102  train      val      ten images of each class in both; its test split is the third part of the table
food101     train      test

Each becomes a folder of the cache with its files and a table of them, and is opened like any table: classes have readable
names, and the order of the names decides the labels' numbers. Archives are removed after unpacking.
"""

import csv
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

from PIL import Image

from data_pipeline.common.address import place
from data_pipeline.common.errors import UserError, require
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig
from data_pipeline.sources.builtin import builtin_dataset, cache_path, make_once

_TABLE = "labels.csv"
_PATIENCE_S = 60.0  # longest silence of a server

_Labelled = Iterable[tuple[Path, str]]
"""File and class of each image."""


def dataset_root(cfg: DataConfig) -> Path:
    """Return the folder, table or address that `data.path` means, even if nothing is there; a name means the set in the cache.

    The set is rendered or downloaded first if missing. A file or folder of the same name is preferred to the set.

    Raises:
        UserError: the set cannot be fetched, or the cache cannot be written.
    """
    if cfg.path == "builtin":
        return builtin_dataset()
    if cfg.path in NAMED and not os.path.lexists(cfg.path):
        return make_once(cache_path() / "datasets" / cfg.path, partial(_fetch, cfg.path)) / _TABLE
    return place(cfg.path)


class _Source(NamedTuple):
    dataset: str
    """Class of torchvision.datasets."""
    splits: dict[str, dict[str, object]]
    """Split in our table -> arguments that ask torchvision for it."""
    samples: Callable[[Any, Path], _Labelled]
    """Function that yields the samples of such a dataset; it may write them into the folder of that name."""


def _files(data: Any, _: Path) -> _Labelled:
    """Yield files of a dataset whose loader is `Path`: it returns names of files in place of images."""
    for file, label in (data[row] for row in range(len(data))):
        name = data.classes[label]
        yield file, name if isinstance(name, str) else name[0]  # Imagenette has a tuple of synonyms


def _pets(data: Any, _: Path) -> _Labelled:
    # This one has no loader to replace, and opening each image takes long.
    return ((file, data.classes[label]) for file, label in zip(data._images, data._labels, strict=True))


def _pngs(data: Any, folder: Path) -> _Labelled:
    for row, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
        file = folder / data.classes[label] / f"{row:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        yield file, data.classes[label]


NAMED = {
    "imagenette": _Source(
        "Imagenette",
        {split: {"split": split, "size": "320px", "loader": Path} for split in ("train", "val")},
        _files,
    ),
    "cifar10": _Source("CIFAR10", {"train": {"train": True}, "val": {"train": False}}, _pngs),
    "flowers102": _Source(
        "Flowers102", {split: {"split": split, "loader": Path} for split in ("train", "val", "test")}, _files
    ),
    "oxford_pets": _Source("OxfordIIITPet", {"train": {"split": "trainval"}, "val": {"split": "test"}}, _pets),
    "food101": _Source(
        "Food101",
        {ours: {"split": theirs, "loader": Path} for ours, theirs in (("train", "train"), ("val", "test"))},
        _files,
    ),
}


def _fetch(name: str, folder: Path) -> None:
    """Fill the empty `folder` with a dataset. Raises `UserError`."""
    require(
        name != "flowers102" or find_spec("scipy") is not None,
        "data.path: flowers102 comes with labels that only scipy reads; pip install scipy",
    )
    try:
        with _waiting_for(name):
            _write_table(folder, _samples(NAMED[name], folder))
            _remove_archives(folder)
    except (OSError, HTTPException, RuntimeError) as error:  # torchvision raises RuntimeError for a wrong checksum
        raise UserError(
            f"data.path: {name} cannot be fetched ({_reason(error)}); mend that, or give a folder with its images"
        ) from error


def _samples(source: _Source, folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Download and unpack a dataset. Yields file, class and split of each image."""
    from torchvision import datasets  # type: ignore[import-untyped] # imported here: it takes a second

    for split, options in source.splits.items():
        data = getattr(datasets, source.dataset)(folder, download=True, **options)
        for file, label in source.samples(data, folder / split):
            yield file, label, split


def _remove_archives(folder: Path) -> None:
    for archive in folder.rglob("*gz"):
        archive.unlink()
    shutil.rmtree(folder / "cifar-10-batches-py", ignore_errors=True)  # its arrays are PNG files now


def _write_table(folder: Path, rows: Iterable[tuple[Path, str, str]]) -> None:
    with open(folder / _TABLE, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "label", "split"))
        writer.writerows((path.relative_to(folder).as_posix(), label, split) for path, label, split in rows)


@contextmanager
def _waiting_for(name: str) -> Iterator[None]:
    """Limit the wait for a server; draw torchvision's progress bars only on a terminal."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE_S)
    try:
        if sys.stderr.isatty():
            yield
        else:
            print(f"Fetching {name}, once, into {cache_path() / 'datasets' / name}", file=sys.stderr, flush=True)
            with progress(f"fetching {name}"), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
                yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: Exception) -> str:
    if isinstance(error, URLError) and isinstance(error.reason, OSError):
        error = error.reason
    return getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
