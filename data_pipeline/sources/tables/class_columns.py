"""Find the classes of a table's rows: in a column of them, or in a column of 0 and 1 for each."""

import re
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.sources.tables.columns import CLASSES, FEW_CLASSES, MARKS, named, require_column, there
from data_pipeline.sources.tables.text_table import TextTable, few, shown

COLUMNS = "columns"
"""Form of several classes of an image: a column of 0 and 1 for each class."""
SEPARATORS = ("|", ";", ",", " ")
_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)


class Classes(NamedTuple):
    rows: list[tuple[str, ...]]
    """Classes of each row; a single one where `written` is empty."""
    source: str
    """Column that they come from, such as "breed"."""
    written: str = ""
    """Form of several classes of an image: COLUMNS, or the character between them; "" where each has a single one."""
    columns: tuple[str, ...] = ()
    """Classes that have a column of their own, and are classes even if no image is of them."""
    notes: tuple[str, ...] = ()
    """Doubts about the guess, a line each."""


def class_column(table: TextTable, file: Path, cfg: DataConfig) -> Classes:
    """Find the classes of the rows of a table without its images' and its split's column. Raises `UserError`."""
    # In order of certainty: the given column, a usual name, columns of 0 and 1, the only column left.
    if cfg.label_column is not None:
        require_column(table, cfg.label_column, "data.label_column", file)
        return _of_column(table, cfg.label_column, file, cfg)
    usual = _same_classes(table, named(table, CLASSES))
    marked = _marked(table, file, cfg) if not usual else None
    if marked:
        return marked
    chosen = usual or list(table.columns)
    require(
        len(chosen) > 0,
        f"data.label_column: {file} has no column beside the images' names; give a table with their classes",
    )
    marks = len(_marks(table))
    several = f"; --data.labels multi takes the {marks} columns of 0 and 1 for a class each" if marks > 1 else ""
    require(
        len(chosen) == 1,
        f"data.label_column: which column of {file} has the classes is not clear; name it; {there(table)}{several}",
    )
    return _of_column(table, chosen[0], file, cfg)


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
    parts = next((name for name in classes if re.fullmatch(r"-?\d*\.0*[1-9]\d*", name)), None)
    require(
        insisted or parts is None or len(classes) <= FEW_CLASSES // 2 or not all(map(_NUMBER.fullmatch, classes)),
        f"data.label_column: {source} of {file} has numbers such as {parts}, so it is a measure and hardly a class; name another "
        f"column, or the same to insist; {there(table)}",
    )


def in_order(classes: set[str]) -> list[str]:
    """Sort classes for their labels: by number where all are numbers, else by letters."""
    numeric = all(map(_NUMBER.fullmatch, classes))
    return sorted(classes, key=lambda name: (float(name) if numeric else 0.0, name))


def _of_column(table: TextTable, column: str, file: Path, cfg: DataConfig) -> Classes:
    """Read a column: cells that certainly are lists of classes, in a column that nobody has named, as such."""
    cells = table.different(column)
    mark = _separator(cells)
    if cfg.labels == "multi":
        # Where no cell has any, each is a list of one class, or of none.
        mark = mark or next((mark for mark in SEPARATORS if any(mark in cell for cell in cells)), SEPARATORS[0])
    if mark and (cfg.labels == "multi" or (cfg.labels == "auto" and cfg.label_column is None)):
        lists = [tuple(dict.fromkeys(filter(None, map(str.strip, cell.split(mark))))) for cell in table.columns[column]]
        return Classes(lists, f"{shown(column)}, separated by {mark!r}", mark)
    names = table.columns[column]
    require("" not in names, f"data.path: {file} has rows without a {shown(column)}; fill or remove them")
    doubt = _doubt(cells) if cfg.labels == "auto" else None
    notes = (
        f"cells of {shown(column)} may list several classes, divided by {doubt!r}; each list is taken for a class of its own, "
        "or with --data.labels multi for several",
    )
    return Classes([(name,) for name in names], shown(column), notes=notes if doubt else ())


def _separator(cells: list[str]) -> str | None:
    """Find the character that divides lists of classes: all that two lists or more hold is somewhere a cell of its own."""
    for mark in SEPARATORS:
        lists = [cell for cell in cells if len(cell.split(mark)) > 1]
        parts = {part.strip() for cell in lists for part in cell.split(mark)}
        if len(lists) > 1 and parts <= {*cells}:
            return mark
    return None


def _doubt(cells: list[str]) -> str | None:
    """Find the character that may divide lists: of their parts there are fewer than of the cells."""
    certain = _separator(cells)
    parts = {mark: {part.strip() for cell in cells for part in cell.split(mark)} for mark in SEPARATORS}
    return certain or next((mark for mark in SEPARATORS if len(parts[mark]) < len(cells)), None)


def _marks(table: TextTable) -> dict[str, list[str]]:
    return {name: cells for name, cells in table.columns.items() if MARKS.keys() >= {*cells}}


def _marked(table: TextTable, file: Path, cfg: DataConfig) -> Classes | None:
    """Read classes from columns of 0 and 1, one for each class; None where it is not certain that they are.

    It is where every row has a single 1, or where the table has no other column.
    """
    marks = _marks(table)
    if len(marks) < 2:
        return None
    by_row = zip(*marks.values(), strict=True)
    rows = [tuple(name for name, cell in zip(marks, cells, strict=True) if MARKS[cell]) for cells in by_row]
    single = all(len(ones) == 1 for ones in rows)
    if single and cfg.labels != "multi":
        return Classes(rows, f"the 1 in {few(list(marks))}")
    if cfg.labels != "multi" and len(marks) < len(table.columns):
        return None
    require(
        cfg.labels != "single",
        f"data.labels: single, but {few(list(marks))} of {file} mark several classes of an image, or none, in some rows; "
        "leave the option out to train several, or name one column by --data.label_column",
    )
    return Classes(rows, f"the 1s in {few(list(marks))}", COLUMNS, tuple(marks))


def _same_classes(table: TextTable, columns: list[str]) -> list[str]:
    """Of columns that divide the rows alike, as a class's number and its name do, keep the one with names."""
    cells = [table.columns[name] for name in columns]
    if len({len({*its}) for its in (*cells, zip(*cells, strict=True))}) != 1:
        return columns
    named = [name for name in columns if not all(map(_NUMBER.fullmatch, table.different(name)))]
    return (named or columns)[:1]
