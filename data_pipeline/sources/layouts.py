"""Layouts of datasets on disk. Each one lists the samples of a split: their names, their labels, the place of their bytes.

class_folders   CLASS/**/IMAGE in train/ and val/, or in one folder: then a share of it is held out
tables          a CSV or Parquet table of image names and labels, as Kaggle publishes them
webdataset      *.tar in WebDataset layout, KEY.jpg beside KEY.cls, in train/ and val/ or in one folder
published       ImageNet's tars, Kaggle's ImageNet, zip files, and what Hugging Face's libraries leave on disk

The splits' folders may have any of their usual names (see `splits`). The dataset may lie deeper, in a folder that has
nothing beside it. Unlabelled images are all those below a folder, or those that a table names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.sources.class_folders import are_parts, class_folders, class_names, is_whole_set
from data_pipeline.sources.folder_walk import holds, holds_below, look_into, walk
from data_pipeline.sources.held_out import divided
from data_pipeline.sources.listing import KINDS, UNLABELLED, Listing, Taken, is_image
from data_pipeline.sources.published.huggingface_cache import is_repository, reference, snapshot
from data_pipeline.sources.published.huggingface_tables import holds_images, huggingface_tables
from data_pipeline.sources.published.ilsvrc_tars import ilsvrc_tars
from data_pipeline.sources.published.kaggle_imagenet import kaggle_imagenet
from data_pipeline.sources.published.zip_archives import zip_archives
from data_pipeline.sources.splits import Splits, find_splits, role_of
from data_pipeline.sources.tables.beside import check_agreement
from data_pipeline.sources.tables.manifest import manifest, table_images
from data_pipeline.sources.tables.text_table import TABLES, few
from data_pipeline.sources.webdataset import is_shard, refuse_archives, shard_names, split_shards, tar_shards

PUBLISHED = (ilsvrc_tars, kaggle_imagenet, zip_archives, huggingface_tables)
"""Layouts in which data sets are published; each is recognised with certainty, or refuses what comes close to it."""
FILES = (*TABLES, ".zip", ".arrow")
"""Ends of the names of files that are a dataset by themselves."""
_ONLY_FILES = "images without their classes are read from a folder of image files or a table of these"
_LABELS = re.compile(r"\.(json|jsonl|ndjson|xlsx?|ods|txt|mat|pkl|pickle|npy|npz|xml|db|sqlite)$")
_TEXTS = re.compile("readme|licen[cs]e|copying|requirements|citation")
"""Ends of files that may have labels, and beginnings of those that have none."""
_DEEPEST = 8  # folders that may be wrapped around a dataset


@dataclass(frozen=True)
class _Halves:
    """Folders of a dataset's splits."""

    train: Path
    """Folder of class folders or shards."""
    val: Path | None
    """None where a part of `train` is for validation."""
    watched: list[Path]
    """Folders that were read to find this out."""
    notes: list[str]
    """Folders that were left out, a line each."""


def list_samples(root: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing:
    """List the samples of `split` ("train" or "val") in the layout that `root` has. Raises `UserError`.

    Labels follow `classes`, or the classes of the training split.
    """
    if is_repository(root):
        listing = list_samples(snapshot(root), cfg, split, classes)
        return replace(listing, watched=[reference(root), root / "snapshots", *listing.watched])
    for published in PUBLISHED:
        if found := published(root, cfg, split, classes):
            return found
    if root.is_file():
        others = sorted(name for name in look_into(root.parent).files if name.lower().endswith(TABLES))
        return _beside_table(manifest(root, cfg, split, classes), root, others)
    halves = _find_halves(root, only_val=split == "val" and classes is not None)
    tables = _tables_in(halves)
    table = None if shard_names(halves.train) or _are_classes(halves.train) else _only_table(tables, halves)
    if table:
        listing = _beside_table(manifest(table, cfg, split, classes), table, [other.name for other in tables])
        return replace(listing, watched=[*halves.watched, *listing.watched])
    base = halves.val if split == "val" and halves.val else halves.train
    in_shards = bool(shard_names(base))
    listing = _of_shards(halves, base, split, classes) if in_shards else _of_folders(halves, base, classes, cfg)
    if not in_shards and base == halves.train:
        listing = _beside(tables, _other_labels(halves), listing)
    taken = listing.taken
    where = "" if base == root else f" in {base.relative_to(root)}/"
    val_from = f"{halves.val.relative_to(root)}/" if halves.val else taken.val_from
    taken = replace(taken, layout=taken.layout + where, val_from=val_from, notes=[*halves.notes, *taken.notes])
    listing = replace(listing, watched=[*halves.watched, *listing.watched], taken=taken)
    return divided(listing, cfg, split)


def list_images(root: Path, cfg: DataConfig) -> Listing:
    """List all images below a folder in the order of their paths, or those that a table names, in its order; UNLABELLED.

    Raises `UserError`.
    """
    if is_repository(root):
        return list_images(snapshot(root), cfg)
    require(
        not (root.is_file() and holds_images(root)) and not root.name.lower().endswith((".zip", ".arrow")),
        f"data.path: {_ONLY_FILES}; unpack {root}",
    )
    if root.is_file():
        return table_images(root, cfg)[1]
    found = walk(root, [root])
    paths = found.images[0]
    notes = found.notes() + found.left_out.others()
    also = f" ({'; '.join(notes)})" if notes else ""
    require(len(paths) > 0, f"data.path: no images in {root}{also}; put {KINDS} files into it, as {_ONLY_FILES}")
    taken = Taken(notes=notes)
    return Listing(root, paths, [UNLABELLED] * len(paths), [], found.folders, taken=taken)


def _of_folders(halves: _Halves, base: Path, classes: list[str] | None, cfg: DataConfig) -> Listing:
    if not look_into(base).folders:
        refuse_archives(base)
    beside = [table.name for table in _tables_in(halves)] + _other_labels(halves)
    names = classes or class_names(halves.train, nested=cfg.group is not None, beside=beside)
    return class_folders(base, names)


def _are_classes(base: Path) -> bool:
    folders = look_into(base).folders
    return len(_full_folders(base, 2)) > 1 and not are_parts(folders) and not any(map(is_whole_set, folders))


def _tables_in(halves: _Halves) -> list[Path]:
    """List the tables around the images."""
    return [
        folder / name for folder in halves.watched for name in look_into(folder).files if name.lower().endswith(TABLES)
    ]


def _other_labels(halves: _Halves) -> list[str]:
    """List the files around the images that may have their labels, and are no tables."""
    names = [name for folder in halves.watched for name in look_into(folder).files if _LABELS.search(name.lower())]
    return [name for name in names if not _TEXTS.match(name.lower())]


def _may_have_labels(table: Path) -> bool:
    """Return True unless the name is that of a table of tests or of a submission."""
    return not re.search(r"(?<![a-z])(sample|submission|test)", table.name.lower())


def _beside(tables: list[Path], others: list[str], listing: Listing) -> Listing:
    """Note the tables and `others` that lie beside class folders. Raises `UserError` where a table has other classes."""
    for table in filter(_may_have_labels, tables):
        check_agreement(table, listing)
    names = [table.name for table in tables] + others
    if not names:
        return listing
    note = f"left alone, as the folders are the classes: {few(names)}"
    return replace(
        listing,
        watched=[*listing.watched, *tables],
        taken=replace(listing.taken, notes=[*listing.taken.notes, note]),
    )


def _beside_table(listing: Listing, table: Path, names: list[str]) -> Listing:
    """Note the other tables among `names`."""
    others = [name for name in names if name != table.name]
    notes = [f"left alone beside {table.name}: {few(others)}"] if others else []
    return replace(listing, taken=replace(listing.taken, notes=[*listing.taken.notes, *notes]))


def _only_table(tables: list[Path], halves: _Halves) -> Path | None:
    """Find the table of labels of a folder whose images lie in no class folders. Raises `UserError` where it has several."""
    tables = list(filter(_may_have_labels, tables))
    require(
        len(tables) < 2,
        f"data.path: {halves.watched[-1]} has no class folders, and several tables ({', '.join(map(str, tables[:5]))}); give "
        "the one with the images' labels as data.path, or write those of training and validation into one, with a column split",
    )
    return tables[0] if tables else None


def _of_shards(halves: _Halves, base: Path, split: str, classes: list[str] | None) -> Listing:
    refuse_archives(base)
    full = _full_folders(base)
    require(
        not full,
        f"data.path: {base} holds both shards and folders of images ({', '.join(full)}); give a folder with either",
    )
    if halves.val:
        for folder, roles in ((halves.train, ("train", None)), (halves.val, ("val", "test", None))):
            other = next((name for name in shard_names(folder) if role_of(name) not in roles), "")
            require(
                not other, f"data.path: {folder / other} is named like a shard of another split; move it, or rename it"
            )
        if classes is None and split == "val":
            classes = tar_shards(halves.train, shard_names(halves.train), None).classes
        return tar_shards(base, shard_names(base), classes)
    names = split_shards(base)
    if classes is None and split == "val":
        classes = tar_shards(base, names.train, None).classes
    listing = tar_shards(base, names.val if names.val and split == "val" else names.train, classes)
    taken = replace(listing.taken, val_from=names.val_from, notes=[*names.notes, *listing.taken.notes])
    return replace(listing, taken=taken)


def _find_halves(root: Path, only_val: bool) -> _Halves:
    """Look for the splits in `root`, or in the only folder that it holds, and so on.

    With `only_val`, images for training need not exist.
    """
    watched: list[Path] = []
    for folder in _inwards(root):
        watched.append(folder)
        splits = find_splits(look_into(folder).folders, folder)
        if any(splits) and not _is_class(folder, splits):
            return _divided(folder, splits, watched, only_val)
    return _Halves(watched[-1], None, watched, [])


def _divided(folder: Path, splits: Splits, watched: list[Path], only_val: bool) -> _Halves:
    # Without images for training there is nothing to divide; validation alone may be asked for.
    others = [name for name in _full_folders(folder) if name not in splits]
    notes = [f"left alone beside the splits: {_few(others)}"] if others else []
    if splits.train is None:
        there = splits.val or splits.test
        require(
            only_val and splits.val is not None,
            f"data.path: {folder} has no train/ beside {there}/; add it, or give a folder of CLASS/ folders only, "
            "or rename it if it is a class",
        )
        return _Halves(folder / str(splits.val), folder / str(splits.val), watched, notes)
    require(
        bool(splits.val or splits.test) or not others,
        f"data.path: {folder} has {splits.train}/ and no val/ beside {_few(others)}; add it, or give {folder / splits.train}, "
        f"or rename {splits.train}/ if it is a class",
    )
    # Splits may be wrapped in further folders.
    train = _unwrapped(folder / splits.train)
    val = _unwrapped(folder / splits.val) if splits.val else None
    watched = [*watched, *(folder / name for name in splits if name)]
    # Test images validate where no others do, if they have labels of the same classes.
    if splits.test and val:
        notes.append(f"{splits.test}/ is left alone, as {splits.val}/ is there")
    elif splits.test:
        test = _unwrapped(folder / splits.test)
        if shard_names(test) or set(look_into(test).folders) & set(look_into(train).folders):
            val = test
        else:
            notes.append(f"{splits.test}/ is left alone, as it has none of the class folders of {splits.train}/")
    return _Halves(train, val, watched, notes)


def _is_class(folder: Path, splits: Splits) -> bool:
    """Return True where "train" is a class with pictures of trains: at least two classes beside it, and no other split."""
    if splits.train is None or splits.val or splits.test or not holds(folder / splits.train, is_image):
        return False
    beside = (name for name in look_into(folder).folders if name != splits.train)
    return len(list(islice((name for name in beside if holds(folder / name, is_image)), 2))) == 2


def _unwrapped(folder: Path) -> Path:
    """Return the folder that holds everything in `folder`."""
    return list(_inwards(folder))[-1]


def _inwards(folder: Path) -> Iterator[Path]:
    """Yield the folder, then the only one in it that holds images or shards, and so on, down to a folder of images."""
    for _ in range(_DEEPEST):
        yield folder
        full = _full_folders(folder, 2)
        if len(full) != 1 or holds(folder, _is_data) or holds(folder / full[0], is_image):
            return
        folder = folder / full[0]


def _full_folders(folder: Path, most: int | None = None) -> list[str]:
    """List the folders in `folder` with images or shards anywhere in them, at most the first `most`."""
    return list(islice((name for name in look_into(folder).folders if holds_below(folder / name, _is_data)), most))


def _is_data(name: str) -> bool:
    return is_image(name) or is_shard(name)


def _few(names: list[str]) -> str:
    return ", ".join(f"{name}/" for name in names[:5]) + ", …" * (len(names) > 5)
