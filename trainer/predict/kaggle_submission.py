"""Read Kaggle's sample submission, and fill it with predictions."""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.common.errors import printable, require
from data_pipeline.sources.tables.text_table import read_table

_WAYS: tuple[Callable[[str], str], ...] = (
    lambda path: path,
    lambda path: os.path.splitext(path)[0],
    os.path.basename,
    lambda path: os.path.splitext(os.path.basename(path))[0],
)
"""Ways to make an id of an image's path: whole or the file's name alone, each with or without its suffix."""


class Form(NamedTuple):
    """A sample submission of N rows for a catalog's N images."""

    table: pd.DataFrame
    """Whole table as text; the ids are in its first column."""
    rows: NDArray[np.int64]
    """[N] image of each row of the table."""
    shows: Literal["probabilities", "probability", "names", "numbers"]
    """A column for each class; or one with the probability of `certain`, with classes' names, or with their places among
    the sorted classes, from 0."""
    classes: list[str]
    certain: str = ""
    """Of two classes the one that a probability or a number of 1 stands for."""

    @property
    def meaning(self) -> str:
        """Guess about the sample, for people; empty where its columns are certain."""
        column = str(self.table.columns[1])
        if self.shows == "probability":
            return f"{column} is the probability of {printable(self.certain)}"
        if self.shows == "names" and not any(self.table.iloc[:, 1]):
            return f"{column} is empty in the sample, and has the classes' names"
        if self.shows == "numbers" and self.certain:
            return f"{column} is 1 for {printable(self.certain)}, else 0"
        if self.shows == "numbers":
            return f"{column} is the class's number: {few([f'{at} {name}' for at, name in enumerate(self.classes)])}"
        return ""

    def fill(self, probabilities: NDArray[np.float32], ranked: NDArray[np.int64]) -> pd.DataFrame:
        """The table with predictions: `probabilities` [N, C], and the likeliest classes `ranked` [N, K], of each image.

        Several classes in one column are separated by spaces.
        """
        filled = self.table.copy()
        columns = [str(name) for name in filled][1:]
        if self.shows == "probabilities":
            places = [self.classes.index(name) for name in columns]
            return filled.assign(**dict(zip(columns, probabilities[self.rows][:, places].T, strict=True)))
        if self.shows == "probability":
            return filled.assign(**{columns[0]: probabilities[self.rows, self.classes.index(self.certain)]})
        texts = self.classes if self.shows == "names" else [str(number) for number in range(len(self.classes))]
        if self.certain:
            texts = [str(int(name == self.certain)) for name in self.classes]
        filled[columns[0]] = [" ".join(texts[place] for place in places) for places in ranked[self.rows]]
        return filled


def read(file: Path, paths: list[str], classes: list[str], topk: int) -> Form:
    """The form of the sample `file` for the images `paths`. Raises `UserError` where ids or columns are not theirs."""
    table = pd.DataFrame(read_table(file, "--sample").columns, dtype=str)
    require(table.shape[1] > 1, f"--sample: {file} has no column beside its ids; give one with ids and predictions")
    rows = matched(file, table.iloc[:, 0].tolist(), paths)
    meant = _meant(str(table.columns[1]), classes) if len(classes) == 2 and topk == 1 and table.shape[1] == 2 else ""
    if meant and _are_probabilities(set(table.iloc[:, 1])):
        return Form(table, rows, "probability", classes, meant)
    shows = _shown(file, table, classes, topk)
    return Form(table, rows, shows, classes, meant if shows == "numbers" and meant != classes[1] else "")


def _are_probabilities(values: set[str]) -> bool:
    """Return True for numbers from 0 to 1, at least one of them between."""
    if not all(re.fullmatch(r"[01]|[01]?\.\d+", value, re.ASCII) for value in values):
        return False
    return any(0 < float(value) < 1 for value in values)


def _meant(column: str, classes: list[str]) -> str:
    """Choose of two classes the one that a column is named after, as is_cat is, or else the second, as 1 is of 0 and 1.

    Of "cactus" and "no cactus" it is the one with more words in the column.
    """
    words = {name: _words(name) for name in classes}
    there = [name for name in reversed(classes) if words[name] and words[name] <= _words(column)]
    return max(there, key=lambda name: len(words[name]), default=classes[1])


def _words(text: str) -> set[str]:
    return {*re.findall(r"[^\W_]+", text.lower())}


def matched(file: Path, ids: list[str], paths: list[str]) -> NDArray[np.int64]:
    """[N] the image of each id. Raises `UserError` where the ids are not exactly those of the images."""
    twice = [name for name, seen in Counter(ids).items() if seen > 1]
    require(not twice, f"--sample: {file} has {len(twice)} ids more than once: {few(twice)}; remove the repeated rows")
    wanted = set(ids)
    ways = [[way(path) for path in paths] for way in _WAYS]
    best = max(ways, key=lambda names: len(wanted & set(names)))
    images = {name: row for row, name in enumerate(best)}
    missing, beyond = [name for name in ids if name not in images], [name for name in best if name not in wanted]
    parts = [
        *([f"{len(missing)} of its {len(ids)} ids have no image: {few(missing)}"] if missing else []),
        *([f"{len(beyond)} of the {len(paths)} images are not in it: {few(beyond)}"] if beyond else []),
    ]
    require(
        not parts,
        f"--sample: {file} is of other images, for {'; '.join(parts)}; give the right folder, "
        f"or as IMAGES the sample itself with --data.images FOLDER",
    )
    same = [name for name, seen in Counter(best).items() if seen > 1]
    require(not same, f"--sample: {len(same)} ids fit several images each: {few(same)}; give a folder with one of each")
    return np.array([images[name] for name in ids], np.int64)


def _shown(
    file: Path, table: pd.DataFrame, classes: list[str], topk: int
) -> Literal["probabilities", "names", "numbers"]:
    columns = [str(name) for name in table][1:]
    if set(columns) == set(classes) and len(columns) == len(classes):
        require(topk == 1, f"--topk: {file} has a column for each class; leave it out")
        return "probabilities"
    odd = sorted(set(columns) ^ set(classes))
    require(
        len(columns) == 1,
        f"--sample: the columns of {file} are not the {len(classes)} classes of the run, which {few(odd)} tell apart; "
        "give one column of labels, or one for each class",
    )
    known, values = set(classes), set(table[columns[0]]) - {""}
    tokens = values if topk == 1 else {token for value in values for token in value.split()}
    names, numbers = tokens <= known, tokens <= {str(number) for number in range(len(classes))}
    if _are_numbers(known):  # so the sample's are these, though it may be filled with a 0 that is none of them
        names, numbers = names or _are_numbers(tokens), False
    spaced = [name for name in classes if " " in name]
    require(
        topk == 1 or not spaced or (bool(tokens) and numbers and not names),
        f"--topk: in column {columns[0]} of {file} spaces part several classes, and some names have spaces themselves "
        f"({few(spaced)}); leave out --topk, or give a sample with the classes' numbers",
    )
    odd = sorted(values - known)
    require(
        names or numbers,
        f"--sample: column {columns[0]} of {file} shows {few(odd)}, neither a class of the run ({few(classes)}) "
        f"nor a number below {len(classes)}; put one of these into it",
    )
    return "names" if names else "numbers"


def _are_numbers(texts: set[str]) -> bool:
    return all(re.fullmatch(r"-?\d+", text, re.ASCII) for text in texts)


def few(names: list[str]) -> str:
    """The first of some names, for a message of one line."""
    return ", ".join(map(printable, names[:5])) + (", …" if len(names) > 5 else "")
