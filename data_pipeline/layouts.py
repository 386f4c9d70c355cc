"""How datasets lie on disk. Each layout lists the samples of a split: their names, their labels, where their bytes are.

class folders   ROOT/{train,val}/CLASS/**/IMAGE, or ROOT/CLASS/**/IMAGE divided by a hash
manifest        a CSV or Parquet table of image names and labels, as Kaggle publishes them
tar shards      ROOT/{train,val}/*.tar in WebDataset layout: KEY.jpg beside KEY.cls

Images without labels are those anywhere below a folder, or those that a table names.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig, require
from data_pipeline.errors import UserError
from data_pipeline.files import stays_below
from data_pipeline.headers import SUFFIXES

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".tsv", ".parquet")
UNLABELLED = -1
"""Label of images of no known class; loaders give them as `loader.UNCOUNTED`, which is the same."""

_IMAGE_COLUMNS = ("image", "image_id", "id", "filename", "file", "path", "image_path")
_LABEL_COLUMNS = ("label", "class", "target", "category")
_KINDS = ", ".join(sorted(SUFFIXES))


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


def list_samples(root: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing:
    """The samples of `split` ("train" or "val") in whichever layout `root` has. Raises `UserError`.

    Labels follow `classes`, or the classes of the training split.
    """
    if root.is_file():
        return _manifest(root, cfg, split, classes)
    divided = (root / "train").is_dir() or (root / "val").is_dir()
    for half in ("train", split) if classes is None else (split,):
        require(
            not divided or (root / half).is_dir(),
            f"data.path: {root} has no {half}/ beside its other half; add it, or give a folder of CLASS/ folders only",
        )
    base, train = (root / split, root / "train") if divided else (root, root)
    if any(base.glob("*.tar")):
        listing = _shards(base, classes or _shard_classes(train))
    else:
        listing = _class_folders(base, classes or _folders(train))
    return listing if divided else _share(listing, cfg.val_share, split)


def list_images(root: Path, cfg: DataConfig) -> Listing:
    """All images below a folder in the order of their paths, or those that a table names in its order; UNLABELLED.

    Raises `UserError`.
    """
    if root.is_file():
        base, watched = Path(cfg.images) if cfg.images else root.parent, [root]
        paths = _completed(base, table_names(root, cfg), root)
    else:
        base = root
        paths, watched = _images_below(root, root)
    require(len(paths) > 0, f"data.path: no images in {root}; put {_KINDS} files into it")
    return Listing(base, paths, [UNLABELLED] * len(paths), [], watched)


def table_names(file: Path, cfg: DataConfig) -> list[str]:
    """The images that a table names, as it writes them. Raises `UserError`."""
    table, images = _read_table(file, cfg)
    return table[images].astype(str).tolist()


def _class_folders(base: Path, classes: list[str]) -> Listing:
    for name in _folders(base):
        require(
            name in classes, f"data.path: {base / name} is a class that training lacks; remove it or add it to train/"
        )
    watched, found = [base], []
    for label, name in enumerate(classes):
        inside, folders = _images_below(base / name, base)
        watched += folders
        found += [(path, label) for path in inside]
    require(len(found) > 0, f"data.path: no images in {base}; put {_KINDS} files into its class folders")
    return Listing(base, [path for path, _ in found], [label for _, label in found], classes, watched)


def _images_below(top: Path, base: Path) -> tuple[list[str], list[Path]]:
    """The images anywhere below `top`, as sorted paths below `base`, and the folders that were looked into."""
    found, watched = [], []
    for folder, folders, files in os.walk(top, followlinks=True):
        watched.append(Path(folder))
        # A folder named like an image is listed too, and so told to be bad: it was hardly meant.
        images = [entry for entry in (*files, *folders) if _is_image(entry)]
        found += [os.path.relpath(os.path.join(folder, entry), base) for entry in images]
    return sorted(found), watched


def _folders(base: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith("."))
    require(len(names) > 0, f"data.path: {base} has no class folders; put the images of each class into {base}/CLASS/")
    return names


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _share(listing: Listing, val_share: float, split: str) -> Listing:
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
    )


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


# ---- manifests ------------------------------------------------------------------------------------------------------


def _manifest(file: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing:
    table, images = _read_table(file, cfg)
    labels = _column(table, cfg.label_column, _LABEL_COLUMNS, 1, "data.label_column", file)
    require(not table[labels].isna().any(), f"data.path: {file} has rows without a {labels}; fill or remove them")
    if classes is None:
        classes = [str(name) for name in sorted(table[labels].unique())]
    parts = cfg.split_column or ("split" if "split" in table else None)
    if parts is not None:
        require(parts in table, f"data.split_column: {file} has no column {parts}; it has {', '.join(map(str, table))}")
        table = table[table[parts] == split]
        require(len(table) > 0, f"data.split_column: no row of {file} has {parts} = {split}; name both train and val")
    root = Path(cfg.images) if cfg.images else file.parent
    paths = _completed(root, table[images].astype(str).tolist(), file)
    numbers = {name: number for number, name in enumerate(classes)}
    names = table[labels].astype(str)
    unknown = sorted(set(names) - set(numbers))
    require(
        not unknown, f"data.path: {file} has a class that training lacks: {', '.join(unknown[:3])}; remove its rows"
    )
    listing = Listing(root, paths, [numbers[name] for name in names], classes, [file])
    return listing if parts is not None else _share(listing, cfg.val_share, split)


def _read_table(file: Path, cfg: DataConfig) -> tuple["pd.DataFrame", str]:
    """A table, and which of its columns has the images' names."""
    import pandas as pd  # here, for only tables need it

    def images(table: pd.DataFrame) -> str:
        return _column(table, cfg.image_column, _IMAGE_COLUMNS, 0, "data.image_column", file)

    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
            return table, images(table)
        sep = "\t" if file.suffix == ".tsv" else ","
        column = images(pd.read_csv(file, sep=sep, nrows=0))
        return pd.read_csv(file, sep=sep, dtype={column: str}), column  # 0012 is a name, and no number
    except ImportError:
        raise UserError(f"data.path: reading {file} needs pyarrow; pip install pyarrow, or give a CSV file") from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"data.path: {file} is no table that can be read ({error}); give a CSV or Parquet file"
        ) from None


def _column(table: "pd.DataFrame", wanted: str | None, usual: tuple[str, ...], at: int, option: str, file: Path) -> str:
    """The named column, else one of a usual name, else the one at `at`."""
    if wanted is not None:
        require(wanted in table, f"{option}: {file} has no column {wanted}; it has {', '.join(map(str, table))}")
        return wanted
    found = [name for name in table if str(name).lower() in usual]
    require(bool(found) or table.shape[1] > at, f"{option}: {file} has {table.shape[1]} columns; name the one to use")
    return str(found[0] if found else table.columns[at])


def _completed(root: Path, names: list[str], file: Path) -> list[str]:
    """Names with the suffix that their files have, which tables often leave out. Files that are missing are told together."""
    there = {os.path.relpath(os.path.join(folder, name), root) for folder, _, found in os.walk(root) for name in found}
    paths, missing = [], []
    for name in names:
        candidates = [name, *(name + suffix for suffix in sorted(SUFFIXES))]
        path = next((c for c in map(os.path.normpath, candidates) if c in there and _is_image(c)), None)
        paths.append(path or name)
        if path is None:
            missing.append(name)
    require(
        not missing,
        f"data.images: {len(missing)} of the {len(names)} images that {file} names are not in {root}: "
        f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}; name their folder by data.images",
    )
    return paths


# ---- tar shards -----------------------------------------------------------------------------------------------------


def _shards(base: Path, classes: list[str]) -> Listing:
    shards = sorted(file.name for file in base.glob("*.tar"))
    numbers = {name: number for number, name in enumerate(classes)}
    paths, labels, spans = [], [], []
    for number, shard in enumerate(shards):
        for member, offset, length, label in _samples(base / shard):
            require(label in numbers, f"data.path: {base / shard} has class {label}, which training lacks; remove it")
            paths.append(f"{shard}/{member}")
            labels.append(numbers[label])
            spans.append((number, offset, length))
    require(len(paths) > 0, f"data.path: no images in the shards of {base}; they need KEY.jpg beside KEY.cls members")
    watched = [base, *(base / shard for shard in shards)]
    return Listing(base, paths, labels, classes, watched, shards, np.array(spans, np.int64))


def _shard_classes(base: Path) -> list[str]:
    """All labels in the shards of `base`: numbers in their order, or names."""
    found = {label for shard in sorted(base.glob("*.tar")) for _, _, _, label in _samples(shard)}
    numeric = all(label.isdecimal() for label in found)
    return sorted(found, key=int) if numeric else sorted(found)


def _samples(shard: Path) -> Iterator[tuple[str, int, int, str]]:
    """Name, offset, length and label of each image. The members of one sample stand together, in any order."""
    try:
        with open(shard, "rb") as file:
            file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
            require(not any(file.read()), f"data.path: the shard {shard} is cut off; copy it again or remove it")
        with tarfile.open(shard, "r:") as tar:
            group, image, label = "", None, None
            for member in tar:
                key = member.name.split(".")[0] if "/" not in member.name else _key(member.name)
                if key != group:
                    group, image, label = key, None, None
                require(
                    stays_below(member.name) and (member.isreg() or member.isdir()),
                    f"data.path: the shard {shard} has a member {member.name!r} that leads elsewhere; remove it",
                )
                if _is_image(member.name):
                    image = member
                elif member.name.endswith(".cls"):
                    extracted = tar.extractfile(member)
                    label = extracted.read().decode().strip() if extracted else None
                if image is not None and label is not None:
                    yield image.name, image.offset_data, image.size, label
                    image, label = None, None
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.path: the shard {shard} cannot be read ({error}); copy it again or remove it") from None


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.split('.')[0]}"
