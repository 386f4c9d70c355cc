"""Write predictions of several classes for an image in the form that they came in: lists in a column, or 0 and 1 in columns."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.common.errors import require
from data_pipeline.sources.tables.class_columns import COLUMNS, SEPARATORS
from data_pipeline.sources.tables.text_table import read_table
from trainer.predict.class_columns import with_classes
from trainer.predict.kaggle_submission import few, matched

_MARKS = (" ", *(mark for mark in SEPARATORS if mark != " "), "/", "\t")
"""Characters between classes in the order of preference."""
Said = NDArray[np.bool_]
"""[N, C] True for the classes that an image is said to be of."""


def as_lists(said: Said, texts: list[str], mark: str) -> list[str]:
    """Write the classes of each image, by the texts that stand for them, with `mark` between."""
    return [mark.join(texts[place] for place in np.flatnonzero(row)) for row in said]


def separator_of(written: str, classes: list[str]) -> str:
    """Choose the character between classes for a run whose table has `written` them so.

    Where it has none: a space, or the first other character that no class's name has. Raises `UserError` if all occur.
    """
    if written != COLUMNS:
        return written
    free = [mark for mark in _MARKS if _divides(mark, classes)]
    require(
        len(free) > 0, f"RUN: its classes' names ({few(classes)}) have every character that could stand between two"
    )
    return free[0]


def _divides(mark: str, texts: list[str]) -> bool:
    """Return True where no text holds the character, so that a list of them can be cut at it."""
    return not any(mark in text for text in texts)


def plain_table(
    names: list[str], said: Said, probabilities: NDArray[np.float32], classes: list[str], written: str, *, chances: bool
) -> pd.DataFrame:
    """List each image with its classes, as the run's table had them, and with `chances` the probability of each class."""
    table = pd.DataFrame({"image": names})
    if written != COLUMNS:
        table["predicted"] = as_lists(said, classes, separator_of(written, classes))
    columns = chances or written == COLUMNS
    return with_classes(table, probabilities if chances else said.astype(int), classes) if columns else table


class SampleForm(NamedTuple):
    """A sample submission of N rows for a catalog's N images of several classes."""

    table: pd.DataFrame
    """Whole table as text; the ids are in its first column."""
    rows: NDArray[np.int64]
    """[N] image of each row of the table."""
    shows: Literal["probabilities", "marks", "lists"]
    """Columns of the classes with probabilities or with 0 and 1, or one column of lists."""
    classes: list[str]
    texts: list[str]
    """Text of each class in a list: its name, or its place among the classes, from 0."""
    mark: str
    """Character between them."""

    @property
    def meaning(self) -> str:
        """Guess about the sample, for people."""
        column = self.table.columns[1]
        if self.shows == "lists":
            numbers = "" if self.texts == self.classes else f", by their numbers: {few(self.numbered)}"
            return f"{column} lists classes, separated by {self.mark!r}{numbers}"
        if self.shows == "marks":
            return "its columns are 0 or 1, as in the sample, by the threshold of each class"
        return "its columns are probabilities"

    @property
    def numbered(self) -> list[str]:
        return [f"{number} {name}" for number, name in enumerate(self.classes)]

    def fill(self, probabilities: NDArray[np.float32], said: Said) -> pd.DataFrame:
        """The table with predictions."""
        filled = self.table.copy()
        columns = [str(name) for name in filled][1:]
        if self.shows == "lists":
            filled[columns[0]] = as_lists(said[self.rows], self.texts, self.mark)
            return filled
        values = probabilities if self.shows == "probabilities" else said.astype(int)
        places = [self.classes.index(name) for name in columns]
        return filled.assign(**dict(zip(columns, values[self.rows][:, places].T, strict=True)))


def read(file: Path, paths: list[str], classes: list[str], written: str) -> SampleForm:
    """The form of the sample `file` for the images `paths`, of a run whose table has `written` classes so. Raises `UserError`."""
    table = pd.DataFrame(read_table(file, "--sample").columns, dtype=str)
    require(table.shape[1] > 1, f"--sample: {file} has no column beside its ids; give one with ids and predictions")
    rows = matched(file, table.iloc[:, 0].tolist(), paths)
    columns = [str(name) for name in table][1:]
    # A column for each class: 0 and 1 only where the sample has both, as zeros alone may stand for probabilities.
    if {*columns} == {*classes}:
        marks = {*table[columns].to_numpy().ravel().tolist()} == {"0", "1"}
        return SampleForm(table, rows, "marks" if marks else "probabilities", classes, classes, "")
    odd = sorted({*columns} ^ {*classes})
    require(
        len(columns) == 1,
        f"--sample: the columns of {file} are not the {len(classes)} classes of the run, which {few(odd)} tell apart; "
        "give one column of lists, or one for each class",
    )
    # Lists of names or of numbers; the run's own separator first, as a list of one has none. A name that holds a separator
    # would be cut by whoever reads the file.
    cells = sorted({*table[columns[0]]} - {""})
    numbers = [str(number) for number in range(len(classes))]
    for mark in dict.fromkeys((*([] if written == COLUMNS else [written]), *_MARKS)):
        parts = {part.strip() for cell in cells for part in cell.split(mark)} - {""}
        for texts in (classes, numbers):
            if parts <= {*texts} and _divides(mark, texts):
                return SampleForm(table, rows, "lists", classes, texts, mark)
    require(
        False,
        f"--sample: column {columns[0]} of {file} shows {few(cells)}, which are no lists of classes of the run ({few(classes)}) "
        f"nor of numbers below {len(classes)}, divided by a character that no class's name has; put these into it",
    )
    raise AssertionError
