"""From a folder of images to one table of samples: where each lies, its size in pixels, its label."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.builtin import builtin_dataset
from data_pipeline.config import DataConfig
from data_pipeline.errors import UserError
from data_pipeline.headers import SUFFIXES, BadImage, Size, inspect

_HEAD, _TAIL = 1 << 16, 1 << 12  # bytes of a large file that tell what it is


@dataclass(frozen=True)
class Catalog:
    """The samples of one split, N in all, sorted by path; a sample's id is its row."""

    root: Path
    paths: list[str]
    """Path of each sample below `root`."""
    labels: NDArray[np.int64]
    """[N] row of the sample's class in `classes`."""
    sizes: NDArray[np.int32]
    """[N, 2] height and width in pixels, as stored."""
    classes: list[str]
    bad: dict[str, str]
    """Files left out, path below `root` -> why."""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample: int) -> bytes:
        """The encoded bytes of one sample. Raises OSError."""
        with open(self.root / self.paths[sample], "rb", buffering=0) as file:
            return file.readall()

    def fingerprint(self) -> str:
        """Hash of names and labels: equal where an interrupted epoch can be continued."""
        digest = hashlib.blake2b(digest_size=16)
        for path, label in zip(self.paths, self.labels, strict=True):
            digest.update(f"{path}\0{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def open_catalog(cfg: DataConfig, split: str, classes: list[str] | None = None) -> Catalog:
    """The samples of `split` ("train" or "val").

    A folder with train/ and val/ is taken as it is; in any other, each CLASS/ folder is divided: a file is for validation
    when a hash of its path falls below `val_share`, so that files added later move none of the others.
    Labels follow `classes`, or the sorted class folders of the training split. Raises `UserError`.
    """
    root = builtin_dataset() if cfg.path == "builtin" else Path(cfg.path)
    if not root.is_dir():
        raise UserError(f"data.path: {cfg.path} is not a folder; give one with train/CLASS/ and val/CLASS/ images")
    divided = (root / "train").is_dir()
    if divided and not (root / split).is_dir():
        raise UserError(
            f"data.path: {root} has train/ but no {split}/; add it, or give a folder of CLASS/ folders only"
        )
    if classes is None:
        classes = _folders(root / "train" if divided else root)
    base = root / split if divided else root
    unknown = sorted(set(_folders(base)) - set(classes))
    if unknown:
        raise UserError(f"data.path: {base / unknown[0]} is a class that training lacks; remove it or add it to train/")
    files = [
        (path, label)
        for path, label in _walk(base, classes)
        if divided or _held_out(path, cfg.val_share) == (split == "val")
    ]
    return _scan(base, files, classes, split)


def _folders(base: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"data.path: {base} has no class folders; put the images of each class into {base}/CLASS/")
    return names


def _walk(base: Path, classes: list[str]) -> Iterator[tuple[str, int]]:
    """Path below `base` and label of every image file, in sorted order, sub-folders of a class included."""
    for label, name in enumerate(classes):
        found = []
        for folder, _, files in os.walk(base / name, followlinks=True):
            found += [os.path.relpath(os.path.join(folder, file), base) for file in files]
        for path in sorted(found):
            if os.path.splitext(path)[1].lower() in SUFFIXES:
                yield path, label


def _held_out(path: str, share: float) -> bool:
    digest = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _scan(base: Path, files: list[tuple[str, int]], classes: list[str], split: str) -> Catalog:
    if not files:
        raise UserError(f"data.path: no images for {split} in {base}; looked for {', '.join(sorted(SUFFIXES))}")
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(_size_or_reason, (base / path for path, _ in files), chunksize=256))
    good = [(path, label, size) for (path, label), size in zip(files, sizes, strict=True) if isinstance(size, Size)]
    bad = {path: why for (path, _), why in zip(files, sizes, strict=True) if isinstance(why, str)}
    if not good:
        path, why = next(iter(bad.items()))
        raise UserError(f"data.path: none of the {len(files)} images for {split} in {base} can be read: {path}: {why}")
    return Catalog(
        root=base,
        paths=[path for path, _, _ in good],
        labels=np.array([label for _, label, _ in good], np.int64),
        sizes=np.array([size for _, _, size in good], np.int32),
        classes=classes,
        bad=bad,
    )


def _size_or_reason(path: Path) -> Size | str:
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            data = file.read(_HEAD)
            if length > _HEAD:
                file.seek(max(_HEAD, length - _TAIL))
                data += file.read()
        try:
            return inspect(data, length)
        except BadImage:
            return inspect(path.read_bytes())  # a header beyond the first bytes, or much behind the image
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or type(error).__name__
