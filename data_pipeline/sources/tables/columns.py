"""Find the columns of a table by usual names and by their cells, or refuse with a list of its columns."""

import re
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.sources.listing import is_image
from data_pipeline.sources.splits import Role, role_of
from data_pipeline.sources.tables.named_images import Located, NamedImages
from data_pipeline.sources.tables.text_table import TextTable, few, shown

_IMAGES = re.compile(
    "images?|imgs?|photos?|pictures?|(image|img)(id|name|index|(file)?(name|path)?)|(file|image)?(name|path)s?|files?|fname|"
    "ids?|idcode|isicid"
)
CLASSES = re.compile(
    "(label|class|category|target|breed)(name|id|label)?|labels|classes|categories|targets|breeds|species|genus|dx|"
    "diagnosis|disease"
)
_SPLITS = re.compile("(data)?(sub)?(set|split)s?|partition")
_FLAGS = re.compile("(is|in)?(train|training|val|valid|validation|test|testing)(set)?")
"""Usual names of columns, in small letters and nothing else."""
_NUMBER = re.compile(r"\d+(\.0)?", re.ASCII)
MARKS = {
    **{"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1, "false": 0, "true": 1, "FALSE": 0, "TRUE": 1},
}
_COLUMNS_SHOWN, _WIDTH_SHOWN = 20, 30  # of a table that has many, or long ones
FEW_CLASSES = 10  # classes that may have a single image, as in a first try with few images


class Images(NamedTuple):
    """Column with the images' names, and the places of these images."""

    column: str
    located: Located


class Split(NamedTuple):
    """Division of the rows into training and validation."""

    column: str
    """Column of the table; "" where none divides the rows."""
    roles: list[Role | None]
    """Role of each row; None for any other word."""
    val_role: Role
    """Role of the rows for validation: "test" where there is no "val"."""
    val_names: list[str]
    """Words in the column for these rows; empty where all rows train."""


def image_column(table: TextTable, file: Path, root: Path, cfg: DataConfig, role: Role | None) -> Images:
    """Find the column whose cells all name images below `root`: one of a usual name, or the only one. Raises `UserError`.

    Of images of the same names in the folders of several splits, those of `role` are meant.
    """
    disk = NamedImages(root, role)
    if cfg.image_column is not None:
        require_column(table, cfg.image_column, "data.image_column", file)
        images = Images(cfg.image_column, disk.locate(table.columns[cfg.image_column]))
    else:
        images = _naming_images(table, disk, file, root)
    images.located.check(len(table), file, root)
    require(
        images.column in named(table, _IMAGES) or not disk.locate([images.column]).all_found,
        f"data.path: the first row of {file} names an image, {shown(images.column)}, and so is no header; give it one",
    )
    return images


def _naming_images(table: TextTable, disk: NamedImages, file: Path, root: Path) -> Images:
    usual = named(table, _IMAGES)
    tried = {name: disk.locate(table.columns[name]) for name in usual}
    found = next(
        iter(_alike({name: located for name, located in tried.items() if located.all_found}, table, file)), None
    )
    if found is None:
        others = {name: disk.locate(cells) for name, cells in table.columns.items() if name not in usual}
        fitting = [name for name, located in others.items() if located.all_found]
        require(
            len(fitting) < 2,
            f"data.image_column: several columns of {file} name images, {few(fitting)}; name the one to use",
        )
        tried |= others
        found = next(iter(fitting or sorted(usual, key=lambda name: len(tried[name].missing))), None)
    require(
        found is not None,
        f"data.image_column: no column of {file} names images in {root}; name it, and their folder by data.images; "
        f"{there(table)}",
    )
    return Images(str(found), tried[str(found)])


def _alike(found: dict[str, Located], table: TextTable, file: Path) -> list[str]:
    """Keep the columns, if all name the same images, or else the only one with suffixes. Raises `UserError`."""
    if len({tuple(located.paths) for located in found.values()}) < 2:
        return list(found)
    full = [name for name in found if all(map(is_image, table.columns[name]))]
    require(
        len(full) == 1,
        f"data.image_column: {few(list(found))} of {file} name different images; name the one to use",
    )
    return full


def split_column(table: TextTable, file: Path, cfg: DataConfig) -> Split:
    """Find the column that divides the rows into training and validation; without one, all train. Raises `UserError`."""
    # The user's choice must divide the rows; a column found by its name may be about something else.
    if cfg.split_column is not None:
        require_column(table, cfg.split_column, "data.split_column", file)
        split = _split(table, cfg.split_column)
        require(
            len(split.val_names) > 0,
            f"data.split_column: no row of {file} has {cfg.split_column} = val; name both train and val",
        )
        return split
    few_cells = [name for name in table.columns if len({*table.columns[name]}) <= FEW_CLASSES]
    others = [name for name in few_cells if name not in named(table, _IMAGES) + named(table, CLASSES)]
    for column in [*named(table, _SPLITS), *others]:
        split = _split(table, column)
        known = _is_certain(table, column) and column not in (cfg.label_column, cfg.group)
        require(
            any(split.roles) or not known,
            f"data.split_column: {shown(column)} of {file} has {few(table.different(column))}, none of which is train or "
            "val; write these, or rename the column",
        )
        if known or (all(split.roles) and len({*split.roles}) > 1):
            val = sum(role == split.val_role for role in split.roles)
            require(
                not _flags(table, column) or 2 * val <= len(table),
                f"data.split_column: by {shown(column)} of {file} {val} of {len(table)} rows would validate, which is more than "
                "train; name it to insist, or rename it if it is about something else",
            )
            return split
    return Split("", ["train"] * len(table), "test", [])


def _is_certain(table: TextTable, column: str) -> bool:
    """Return True for a column that can only be one of splits, whatever is in it: by its name, and in doubt by numbers in it."""
    if column in named(table, _SPLITS):
        return plain(column) in ("split", "splits") or all(map(_NUMBER.fullmatch, table.different(column)))
    return bool(_FLAGS.fullmatch(plain(column))) and plain(column).startswith("is")


def split_by_folder(paths: list[str]) -> Split:
    """Divide images by the folders that they lie in, if all lie in folders of splits, of training and another."""
    found = [
        next(((name, role) for name in path.split("/")[:-1] if (role := role_of(name))), ("", None)) for path in paths
    ]
    roles = [role for _, role in found]
    val: Role = "val" if "val" in roles else "test"
    if not all(roles) or not {"train", val} <= {*roles}:
        return Split("", ["train"] * len(paths), "test", [])
    return Split("", roles, val, sorted({f"{name}/" for name, role in found if role == val}))


def _split(table: TextTable, column: str) -> Split:
    known = _flags(table, column) or {cell: role_of(cell) for cell in table.different(column)}
    val: Role = "val" if "val" in known.values() else "test"
    return Split(
        column,
        [known[cell] for cell in table.columns[column]],
        val,
        [cell for cell, role in known.items() if role == val],
    )


def _flags(table: TextTable, column: str) -> dict[str, Role | None]:
    """Map the cells of a column of 0 and 1 such as is_train or test to roles; empty for any other column."""
    role, cells = role_of(re.sub("^(is|in)", "", plain(column))), table.different(column)
    if role is None or not _FLAGS.fullmatch(plain(column)) or not MARKS.keys() >= {*cells}:
        return {}
    other: Role = "val" if role == "train" else "train"
    return {cell: role if MARKS[cell] else other for cell in cells}


def named(table: TextTable, usual: re.Pattern[str]) -> list[str]:
    return [name for name in table.columns if usual.fullmatch(plain(name))]


def plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def require_named(table: TextTable, file: Path, cfg: DataConfig) -> None:
    """Raise `UserError` where an option names a column that is not there."""
    for option in ("image_column", "label_column", "split_column"):
        column = getattr(cfg, option)
        if column is not None:
            require_column(table, column, f"data.{option}", file)
    if cfg.group is not None and not cfg.group.isdecimal():
        require_column(table, cfg.group, "data.group", file)


def require_column(table: TextTable, column: str, option: str, file: Path) -> None:
    require(column in table.columns, f"{option}: {file} has no column {column}; {there(table)}")


def there(table: TextTable) -> str:
    return f"it has {few([shown(name, _WIDTH_SHOWN) for name in table.columns], _COLUMNS_SHOWN)}"
