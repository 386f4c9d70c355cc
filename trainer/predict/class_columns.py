"""Tables with a column for each class beside others."""

import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from data_pipeline.common.errors import printable


def with_classes(table: pd.DataFrame, values: NDArray[Any], classes: Sequence[str]) -> pd.DataFrame:
    """Append to a table of N rows a column of `values` [N, C] for each class.

    A class named like a column that is there, such as image, has the column "class image", and a line on stderr says so.
    """
    names = [str(name) for name in table]
    for name in classes:
        column = name
        while column in names or (column != name and column in classes):
            column = f"class {column}"
        if column != name:
            print(f"{printable(name)}: the column of this class is {printable(column)!r}", file=sys.stderr, flush=True)
        names.append(column)
    return pd.concat([table, pd.DataFrame(values)], axis=1).set_axis(names, axis=1)
