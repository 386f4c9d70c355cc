"""Class folders in zip files, as Kaggle hands data sets out: one with everything, or train.zip beside val.zip.

Images are read from their places in the archive, without unpacking.
"""

import csv
import posixpath
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.common.atomic_io import read_bytes
from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.sources.folder_walk import holds_below, look_into
from data_pipeline.sources.held_out import divided
from data_pipeline.sources.listing import LeftOut, Listing, Taken, counted, hidden_note, is_foreign, is_image
from data_pipeline.sources.published.archived_folders import Halves, Tree, classes_in, find_halves, labelled
from data_pipeline.sources.published.kaggle_imagenet import INSIDE, SOLUTION, solution
from data_pipeline.sources.published.zip_members import Member, inflated, members
from data_pipeline.sources.tables.text_table import TABLES, TextTable, few
from data_pipeline.sources.webdataset import is_shard

_Places = dict[str, tuple[int, Member]]
"""Path of each file -> number of its archive, and its place there."""


def zip_archives(root: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing | None:
    """List the samples of `split` where `root` is a zip file, or a folder of these; None where not. Raises `UserError`."""
    files = _archives(root)
    if not files:
        return None
    base = files[0].parent
    where = root if len(files) == 1 else base
    all_places = _places(files)
    places = {path: place for path, place in all_places.items() if not any(map(is_foreign, path.split("/")))}
    tree = Tree(filter(is_image, places))
    require(len(tree.images) > 0, f"data.path: no images in {where}; unzip it, and give the folder of the images")
    tables = [path for path in places if path.lower().endswith(TABLES)]
    halves = _kaggle_imagenet(tree) or _class_folders(tree, tables, where)
    classes = classes or classes_in(tree, halves.train, where)
    folder = halves.val if split == "val" and halves.val is not None else halves.train
    flat = halves.val is not None and folder == halves.val and tree.holds_images(folder)
    rows, notes = (
        _by_solution(places, tree, folder, classes, base, files) if flat else labelled(tree, folder, classes, where)
    )
    require(len(rows) > 0, f"data.path: no images in the class folders of {where}/{folder}; unzip it and look into it")
    listing = _listing(base, files, places, rows, classes)
    inside = f"/{folder}".rstrip("/") if len(files) == 1 else f", {folder}/"
    name = files[0].name if len(files) == 1 else counted(len(files), "zip file")
    val_from = f"{halves.val}/{f' by {SOLUTION}' * flat}" if halves.val is not None else ""
    notes = [
        *halves.notes,
        *notes,
        *_left_out(places, folder),
        *hidden_note(_hidden([*all_places])),
        *_deflated(places, rows),
    ]
    listing = replace(listing, taken=Taken(f"class folders in {name}{inside}", val_from, notes=notes))
    return divided(listing, cfg, split)


def _archives(root: Path) -> list[Path]:
    """List the zip files that `root` is or holds, where it holds no other data. Raises `UserError` for a table beside."""
    if root.is_file():
        return [root] if _is_zip(root.name) else []
    entries = look_into(root)
    names = [name for name in entries.files if _is_zip(name)]
    if not names or any(is_image(name) or is_shard(name) for name in entries.files):
        return []
    tables = [name for name in entries.files if name.lower().endswith(TABLES)]
    full = [name for name in entries.folders if holds_below(root / name, is_image)]
    if full:
        return []
    require(
        not tables,
        f"data.path: {root} has {', '.join(tables[:2])} beside {names[0]}, and a table's images are not read from zip files; "
        f"unzip {names[0]} and give the table, or give {root / names[0]} for class folders in it",
    )
    return [root / name for name in names]


def _is_zip(name: str) -> bool:
    return name.lower().endswith(".zip")


def _places(files: list[Path]) -> _Places:
    """Locate the files in all archives. Of several archives, each one's name is its topmost folder."""
    return {
        member.name if len(files) == 1 else f"{file.stem}/{member.name}": (number, member)
        for number, file in enumerate(files)
        for member in members(file)
    }


def _class_folders(tree: Tree, tables: list[str], where: Path) -> Halves:
    halves = find_halves(tree, where)
    require(
        halves.train in tree.folders or not tables,
        f"data.path: {where} has no class folders, and a table, {few(tables, 1)}; unzip it, as a table's images are read from "
        "folders only, and give the table",
    )
    notes = [f"left alone, as the folders are the classes: {few(tables)}"] if tables else []
    return halves._replace(notes=[*halves.notes, *notes])


def _kaggle_imagenet(tree: Tree) -> Halves | None:
    val = next((folder for folder in tree.images if f"/{folder}".endswith(f"/{INSIDE}/val")), None)
    return Halves(posixpath.join(posixpath.dirname(val), "train"), val, []) if val else None


def _by_solution(
    places: _Places, tree: Tree, folder: str, classes: list[str], base: Path, files: list[Path]
) -> tuple[list[tuple[str, int]], list[str]]:
    """Pair flat validation images with the classes in Kaggle's table for them, which must be in the archive."""
    name = f"{folder.removesuffix(f'{INSIDE}/val')}{SOLUTION}"
    require(
        name in places,
        f"data.path: {folder} in {files[0]} has its images in no class folders, and there is no {name}; download it again",
    )
    number, member = places[name]
    data = read_bytes(files[number], member.offset, member.length)
    lines = list(csv.DictReader((inflated(data) if member.deflated else data).decode().splitlines()))
    table = TextTable({column: [line[column] or "" for line in lines] for column in (lines[0] if lines else {})})
    labels, notes = solution(table, base / name, classes)
    rows = [
        (path, labels.get(posixpath.splitext(posixpath.basename(path))[0], -1)) for path in sorted(tree.images[folder])
    ]
    known = [(path, label) for path, label in rows if label >= 0]
    require(len(known) == len(labels), f"data.path: {files[0]} lacks images that {name} names; download it again")
    return known, notes


def _listing(
    base: Path, files: list[Path], places: _Places, rows: list[tuple[str, int]], classes: list[str]
) -> Listing:
    """List the images; an archive counts twice as a shard, for its stored and for its deflated members."""
    found = [places[path] for path, _ in rows]
    names = [path if len(files) > 1 else f"{files[0].name}/{path}" for path, _ in rows]
    return Listing(
        base,
        names,
        [label for _, label in rows],
        classes,
        [base, *files],
        [file.name for file in files for _ in range(2)],
        np.array([(2 * number + member.deflated, member.offset, member.length) for number, member in found], np.int64),
        forms=["", "deflated"] * len(files),
    )


def _left_out(places: _Places, base: str) -> list[str]:
    """Say in a line each which files in the class folders of `base` are not read."""
    classes = f"{base}/".lstrip("/")
    inside = (path for path in places if path.startswith(classes) and "/" in path[len(classes) :])
    left_out = LeftOut(path for path in inside if not is_image(path))
    return left_out.images() + left_out.others()


def _hidden(paths: list[str]) -> list[str]:
    """List the hidden folders with images in them."""
    images = (path for path in paths if is_image(path) and not is_foreign(posixpath.basename(path)))
    folders = {posixpath.dirname(path) for path in images}
    return sorted(folder for folder in folders if posixpath.basename(folder).startswith("."))


def _deflated(places: _Places, rows: list[tuple[str, int]]) -> list[str]:
    count = sum(places[path][1].deflated for path, _ in rows)
    again = "and decompressed at each reading; to do so once: python -m data_pipeline.pack"
    return [f"compressed in the zip file, {again}: {counted(count, 'image')}"] if count else []
