"""A sample submission, as Kaggle hands it out, and the same file with predictions in it."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError, printable
from data_pipeline.config import require

_WAYS: tuple[Callable[[str], str], ...] = (
    lambda path: path,
    lambda path: os.path.splitext(path)[0],
    os.path.basename,
    lambda path: os.path.splitext(os.path.basename(path))[0],
)
"""How an id may be made of an image's path: whole or the file's name alone, each with or without its suffix."""


class Form(NamedTuple):
    """A sample submission of N rows for a catalog's N images."""

    table: pd.DataFrame
    """All of it, as text; the ids are in its first column."""
    rows: NDArray[np.int64]
    """[N] the image of each row of the table."""
    shows: Literal["probabilities", "names", "numbers"]
    """A column for each class, or one with classes' names, or with their places among the sorted classes, from 0."""
    classes: list[str]

    def fill(self, probabilities: NDArray[np.float32], ranked: NDArray[np.int64]) -> pd.DataFrame:
        """The table with predictions: `probabilities` [N, C], and the likeliest classes `ranked` [N, K], of each image.

        Several classes in one column stand with spaces between them.
        """
        filled = self.table.copy()
        columns = [str(name) for name in filled][1:]
        if self.shows == "probabilities":
            places = [self.classes.index(name) for name in columns]
            return filled.assign(**dict(zip(columns, probabilities[self.rows][:, places].T, strict=True)))
        texts = self.classes if self.shows == "names" else [str(number) for number in range(len(self.classes))]
        filled[columns[0]] = [" ".join(texts[place] for place in places) for places in ranked[self.rows]]
        return filled


def read(file: Path, paths: list[str], classes: list[str], topk: int) -> Form:
    """The form of the sample `file` for the images `paths`. Raises `UserError` where ids or columns are not theirs."""
    try:
        table = pd.read_csv(file, sep="\t" if file.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--sample: {file} cannot be read ({error}); give a CSV file") from None
    require(table.shape[1] > 1, f"--sample: {file} has no column beside its ids; give one with ids and predictions")
    return Form(table, _matched(file, table.iloc[:, 0].tolist(), paths), _shown(file, table, classes, topk), classes)


def _matched(file: Path, ids: list[str], paths: list[str]) -> NDArray[np.int64]:
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
    names, numbers = values <= known, values <= {str(number) for number in range(len(classes))}
    if topk > 1:
        spaced = [name for name in classes if " " in name]
        tokens = {token for value in values for token in value.split()}
        names, numbers = tokens <= known, tokens <= {str(number) for number in range(len(classes))}
        require(
            not spaced or (bool(tokens) and numbers and not names),
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


def few(names: list[str]) -> str:
    """The first of some names, for a message of one line."""
    return ", ".join(map(printable, names[:5])) + (", …" if len(names) > 5 else "")
