"""Tables that hold their images, as the Hugging Face hub has data sets: Parquet, or the Arrow files of `datasets`' cache.

A column has the images, as bytes or as a structure of bytes and path; another the classes, by numbers whose names are in the
file's metadata. Files are divided into splits by their names, as train-00000-of-00005.parquet, or by those of their folders.
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.class_names import lacking
from data_pipeline.common.errors import UserError, require
from data_pipeline.config import DataConfig
from data_pipeline.sources.folder_walk import look_into
from data_pipeline.sources.held_out import divided
from data_pipeline.sources.image_headers import kind_of
from data_pipeline.sources.listing import Listing, Taken, counted, is_image
from data_pipeline.sources.published.arrow_images import arrow_rows
from data_pipeline.sources.published.huggingface_columns import Table, guarded, image_columns, schema_of, table_of
from data_pipeline.sources.published.parquet_images import ROWS, Column, Rows, parquet_rows
from data_pipeline.sources.splits import Role, role_of
from data_pipeline.sources.tables.text_table import few
from data_pipeline.sources.webdataset import is_archive, is_shard

_SUFFIXES = (".parquet", ".arrow")
_DEEPEST = 4  # folders below data.path that may hold the files


class _Files(NamedTuple):
    train: list[str]
    val: list[str]
    val_from: str
    notes: list[str]


def huggingface_tables(root: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing | None:
    """List the samples of `split` in such tables; None where `root` is or has none. Raises `UserError`."""
    folder, names = (root.parent, [root.name]) if root.is_file() else (root, _tables_below(root))
    names = [name for name in names if name.lower().endswith(_SUFFIXES)]
    if not names or not holds_images(folder / names[0]):
        return None
    require(
        cfg.split_column is None,
        f"data.split_column: {root} holds its images in its tables, whose splits are those that the files' names say; leave it "
        "out",
    )
    table = table_of(folder, names, cfg)
    files = _divided(root, names)
    used = files.val if split == "val" and files.val else files.train
    listing, groups = _listing(folder, used, table, classes)
    if classes is None and split == "val" and files.val and table.names is None:
        listing, groups = _listing(folder, used, table, _listing(folder, files.train, table, None)[0].classes)
    watched = [folder, *(folder / name for name in names)]
    taken = replace(listing.taken, val_from=files.val_from, notes=[*files.notes, *listing.taken.notes])
    listing = replace(listing, watched=watched, taken=taken)
    return divided(listing, cfg, split, groups)


def holds_images(file: Path) -> bool:
    """Return True where a table holds images itself; a file that cannot be read is left to those who read other tables."""
    if not file.name.lower().endswith(_SUFFIXES):
        return False
    try:
        return bool(image_columns(guarded(file, schema_of)))
    except UserError:
        if file.suffix.lower() == ".arrow" or kind_of(file):
            raise
        return False


# ---- files ----------------------------------------------------------------------------------------------------------


def _tables_below(root: Path) -> list[str]:
    """List the tables in `root` and its folders; none where an image, a shard or an archive lies there too."""
    found: list[str] = []
    left = [(root, 0)]
    while left:
        folder, depth = left.pop()
        entries = look_into(folder)
        if any(is_image(name) or is_shard(name) or is_archive(name) for name in entries.files):
            return []
        found += [(folder / name).relative_to(root).as_posix() for name in entries.files if _is_table(name)]
        if depth < _DEEPEST:
            left += [(folder / name, depth + 1) for name in entries.folders]
    return sorted(found)


def _is_table(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith("cache-")  # of other steps of `datasets`


def _divided(root: Path, names: list[str]) -> _Files:
    """Divide files by the splits that their names, or those of their folders, mention. Raises `UserError`."""
    roles: dict[Role | None, list[str]] = defaultdict(list)
    sets: dict[str, str] = {}
    for name in names:
        *folders, file = name.split("/")
        said = [part for part in (file.rpartition(".")[0], *reversed(folders)) if role_of(part)]
        roles[role_of(said[0]) if said else None].append(name)
        sets.setdefault("/".join(part for part in folders if not role_of(part)), name)
    require(
        len(sets) < 2,
        f"data.path: {root} holds several data sets or configurations ({few(list(sets.values()), 3)}); give the folder of one",
    )
    missing = _missing(names)
    if not roles.keys() - {None}:
        return _Files(names, [], "", missing)
    why = f"{roles[None][0]} names none" if roles[None] else "" if roles["train"] else "none names train"
    require(
        not why,
        f"data.path: the files of {root} name splits, but {why}; rename them, as train-00000.parquet, or give one file",
    )
    val, left = (roles["val"], roles["test"]) if roles["val"] else (roles["test"], [])
    notes = missing + ([f"left alone: {counted(len(left), 'file')}, as {left[0]}"] if left else [])
    return _Files(roles["train"], val, f"{counted(len(val), 'file')} by name, as {val[0]}" if val else "", notes)


def _missing(names: list[str]) -> list[str]:
    """Say in a line each which files of a split are not there, where names count them, as train-00000-of-00005.parquet."""
    counts: dict[tuple[str, int], int] = Counter()
    for name in names:
        if match := re.fullmatch(r"(.*)-\d{5,}-of-(\d{5,})(-\w+)?\.\w+", name):
            counts[match[1], int(match[2])] += 1
    return [
        f"only {there} of the {of} files of {name} are there; download the others, or train without them"
        for (name, of), there in counts.items()
        if there != of
    ]


# ---- rows -----------------------------------------------------------------------------------------------------------


def _listing(
    folder: Path, files: list[str], table: Table, classes: list[str] | None
) -> tuple[Listing, list[str] | None]:
    """List the rows that have an image and a class; and the group of each, if there is a column of them."""
    read = [guarded(folder / name, lambda file: _rows(file, table.columns)) for name in files]
    labels = [_class_of(label, table.names) for rows in read for label in rows.labels]
    places = [(number, *image) for number, rows in enumerate(read) for image in rows.images]
    names = [
        f"{file}/{row}{f'/{name}' if name else ''}"
        for file, rows in zip(files, read, strict=True)
        for row, name in enumerate(rows.names)
    ]
    kept = [row for row, label in enumerate(labels) if label is not None and places[row][2] >= 0]
    groups = [group for rows in read for group in rows.groups]
    if table.columns.group:
        bare = next((names[row] for row in kept if groups[row] in (None, "")), None)
        require(
            bare is None,
            f"data.group: {folder}/{bare} has no {table.columns.group}; fill it in, or name another column",
        )
    require(
        len(kept) > 0,
        f"data.path: no row of {folder / files[0]} has both an image's bytes and a class; images by their paths alone are read "
        "from class folders or a table beside them",
    )
    if classes is None:
        found = {label for label in labels if label is not None}
        classes = table.names or sorted(found, key=int if all(map(str.isdecimal, found)) else None)
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted({str(labels[row]) for row in kept} - {*numbers})
    require(
        not unknown,
        f"data.path: {folder / files[0]} has a class that training lacks: {few(unknown, 3)} "
        f"({lacking(unknown[0], classes) if unknown else ''}); remove or mend its rows",
    )
    left = len(labels) - len(kept)
    notes = [f"without an image or a class, so left out: {counted(left, 'row')}"] if left else []
    grouped = [name for name, rows in zip(files, read, strict=True) if rows.form.startswith(ROWS)]
    if grouped:
        notes.append(
            f"images are compressed in row groups, as in {grouped[0]}, so that each reading of one reads many; to read faster, "
            "once: python -m data_pipeline.pack"
        )
    kind = "Arrow" if files[0].endswith(".arrow") else "Parquet"
    listing = Listing(
        folder,
        [names[row] for row in kept],
        [numbers[str(labels[row])] for row in kept],
        classes,
        [],
        files,
        np.array([places[row] for row in kept], np.int64),
        Taken(
            f"{counted(len(files), f'{kind} file')}: images in {table.columns.image}, classes by {table.columns.label}",
            notes=notes,
            options=["image_column", "label_column"],
        ),
        forms=[rows.form for rows in read],
    )
    return listing, [str(groups[row]) for row in kept] if groups else None


def _rows(file: Path, columns: Column) -> Rows:
    return arrow_rows(file, columns) if file.suffix.lower() == ".arrow" else parquet_rows(file, columns)


def _class_of(label: Any, names: list[str] | None) -> str | None:
    """Name the class of a label; None where it has none, as -1 stands for in the tests of the hub."""
    if label is None or label == "" or (isinstance(label, int) and label < 0):
        return None
    if names is None:
        return str(label)
    return names[label] if isinstance(label, int) and label < len(names) else None
