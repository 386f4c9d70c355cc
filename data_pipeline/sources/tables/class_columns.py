"""Find the classes of a table's rows: in a column of them, or in a column of 0 and 1 for each."""

import re
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.sources.tables.columns import CLASSES, FEW_CLASSES, MARKS, named, require_column, there
from data_pipeline.sources.tables.text_table import TextTable, few, shown

_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)


class Classes(NamedTuple):
    names: list[str]
    """Class of each row."""
    source: str
    """Column that they come from, such as "breed"."""


def class_column(table: TextTable, file: Path, cfg: DataConfig) -> Classes:
    """Find the classes of the rows of a table without its images' and its split's column. Raises `UserError`."""
    # In order of certainty: the given column, a usual name, one-hot columns, the only column left.
    if cfg.label_column is not None:
        require_column(table, cfg.label_column, "data.label_column", file)
        return _checked(table, cfg.label_column, file)
    usual = _same_classes(table, named(table, CLASSES))
    marked = _one_hot(table) if not usual else None
    if marked:
        return marked
    require(
        len(usual) > 0
        or len(table.columns) < 2
        or not all(MARKS.keys() >= {*cells} for cells in table.columns.values()),
        f"data.label_column: {few(list(table.columns))} of {file} mark several classes of an image, or none, in some rows, and "
        "several classes of an image are not trained; leave these rows out, or name one column and train a run for each",
    )
    chosen = usual or list(table.columns)
    require(
        len(chosen) > 0,
        f"data.label_column: {file} has no column beside the images' names; give a table with their classes",
    )
    require(
        len(chosen) == 1,
        f"data.label_column: which column of {file} has the classes is not clear; name it; {there(table)}",
    )
    mark = _separator(table.different(chosen[0]))
    require(
        mark is None,
        f"data.label_column: cells of {shown(chosen[0])} in {file} list several classes, divided by {mark!r}, and several "
        "classes of an image are not trained; leave these rows out, or name the column to take each list for a class of its own",
    )
    return _checked(table, chosen[0], file)


def check_classes(classes: list[str], rows: int, source: str, file: Path, table: TextTable, *, insisted: bool) -> None:
    """Raise `UserError` where a column of so many rows cannot be the classes."""
    require(
        len(classes) != 1,
        f"data.label_column: {source} of {file} has one class only, {few(classes)}, and nothing to tell it from; "
        f"name another column, or add rows of another class; {there(table)}",
    )
    require(
        insisted or len(classes) <= FEW_CLASSES or 2 * len(classes) <= rows,
        f"data.label_column: {source} of {file} has {len(classes)} values for {rows} images, so it is hardly their class; "
        f"name another column, or the same to insist; {there(table)}",
    )


def in_order(classes: set[str]) -> list[str]:
    """Sort classes for their labels: by number where all are numbers, else by letters."""
    numeric = all(map(_NUMBER.fullmatch, classes))
    return sorted(classes, key=lambda name: (float(name) if numeric else 0.0, name))


def _checked(table: TextTable, column: str, file: Path) -> Classes:
    names = table.columns[column]
    require("" not in names, f"data.path: {file} has rows without a {shown(column)}; fill or remove them")
    return Classes(names, shown(column))


def _separator(cells: list[str]) -> str | None:
    """Find the character that divides lists of classes: all that two lists or more hold is somewhere a cell of its own."""
    for mark in ("|", ";", ",", " "):
        lists = [cell for cell in cells if len(cell.split(mark)) > 1]
        parts = {part.strip() for cell in lists for part in cell.split(mark)}
        if len(lists) > 1 and parts <= {*cells}:
            return mark
    return None


def _one_hot(table: TextTable) -> Classes | None:
    """Read classes from columns of 0 and 1, one for each class, if every row has a single 1."""
    marks = {name: cells for name, cells in table.columns.items() if MARKS.keys() >= {*cells}}
    by_row = zip(*marks.values(), strict=True)
    rows = [[name for name, cell in zip(marks, cells, strict=True) if MARKS[cell]] for cells in by_row]
    if len(marks) < 2 or any(len(ones) != 1 for ones in rows):
        return None
    return Classes([ones[0] for ones in rows], f"the 1 in {few(list(marks))}")


def _same_classes(table: TextTable, columns: list[str]) -> list[str]:
    """Of columns that divide the rows alike, as a class's number and its name do, keep the one with names."""
    cells = [table.columns[name] for name in columns]
    if len({len({*its}) for its in (*cells, zip(*cells, strict=True))}) != 1:
        return columns
    named = [name for name in columns if not all(map(_NUMBER.fullmatch, table.different(name)))]
    return (named or columns)[:1]
