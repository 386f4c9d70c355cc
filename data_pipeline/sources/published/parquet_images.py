"""Images in a column of a Parquet file: by their places in the file where these can be found, else by row groups.

A column that is not compressed (as `datasets` has written images since version 4) holds each image as it is, behind its
length: it is read like a member of a tar. Any other column is read by whole row groups, of which a few are kept.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import Future
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from data_pipeline.common.atomic_io import read_bytes

_MOST_KEPT = 1 << 28  # bytes of row groups that a process keeps, besides those being read
_KNOWN_FILES = 1024


class Rows(NamedTuple):
    """Rows of one file."""

    images: list[tuple[int, int]]
    """Place of each row's image: first byte and bytes, or the row's number and bytes; (0, -1) where it has none."""
    names: list[str]
    """File name that each image had; "" where that is unknown."""
    labels: list[Any]
    plain: bool
    """True where `images` are places in the file."""


class Column(NamedTuple):
    """Columns of the images and of their labels."""

    image: str
    is_struct: bool
    """True for a structure of bytes and path, as Hugging Face's libraries have it."""
    label: str

    @property
    def data(self) -> str:
        return f"{self.image}.bytes" if self.is_struct else self.image


def parquet_schema(file: Path) -> Any:
    """Read the schema of a file. Raises OSError, or pyarrow's ArrowException."""
    with _opened(str(file), os.stat(file).st_mtime_ns) as source:
        return source.schema_arrow


def parquet_rows(file: Path, columns: Column) -> Rows:
    """Read the rows of a file, one row group at a time. Raises OSError, or pyarrow's ArrowException."""
    wanted = [columns.data, *([f"{columns.image}.path"] if columns.is_struct else []), columns.label]
    source = _opened(str(file), os.stat(file).st_mtime_ns)
    images: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    names: list[str] = []
    labels: list[Any] = []
    plain = True
    for group in range(source.num_row_groups):
        table = source.read_row_group(group, wanted, use_threads=False)
        data, paths = _parts(table.column(columns.image), columns)
        images += [(len(images) + row, -1 if value is None else len(value)) for row, value in enumerate(data)]
        found = _places(_raw_column(source, file, group, columns.data), data) if plain else None
        plain = found is not None
        places += found or []
        names += paths
        labels += table.column(columns.label).to_pylist()
    return Rows(places if plain else images, names, labels, plain)


def _parts(column: Any, columns: Column) -> tuple[list[bytes | None], list[str]]:
    """Divide an Arrow column of images into their bytes and their names."""
    from pyarrow import compute  # type: ignore[import-untyped]

    if not columns.is_struct:
        return column.to_pylist(), [""] * len(column)
    paths = compute.struct_field(column, "path").to_pylist()
    return compute.struct_field(column, "bytes").to_pylist(), [os.path.basename(path or "") for path in paths]


def _raw_column(source: Any, file: Path, group: int, name: str) -> tuple[int, bytes] | None:
    """Read a column of a row group as it lies in the file, with its first byte; None where it is compressed."""
    row_group = source.metadata.row_group(group)
    column = next(
        column for at in range(row_group.num_columns) if (column := row_group.column(at)).path_in_schema == name
    )
    if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
        return None
    start = column.data_page_offset
    return start, read_bytes(file, start, column.total_compressed_size)


def _places(raw: tuple[int, bytes] | None, values: list[bytes | None]) -> list[tuple[int, int]] | None:
    """Find first byte and bytes of each value, which lie in this order, each behind its length; None if one is not there."""
    if raw is None:
        return None
    start, column = raw
    found, at = [], 0
    for value in values:
        if value is None:
            found.append((0, -1))
            continue
        written = len(value).to_bytes(4, "little") + value
        if not column.startswith(written, at):  # a new page begins
            at = column.find(written, at)
            if at < 0:
                return None
        found.append((start + at + 4, len(value)))
        at += len(written)
    return found


# ---- row groups -----------------------------------------------------------------------------------------------------


def read_row(path: str, column: str, row: int) -> bytes:
    """Read the value in a row of the binary `column`, "image" or "image.bytes". Raises OSError."""
    import pyarrow

    try:
        key = (path, os.stat(path).st_mtime_ns)
        firsts = _first_rows(*key)
        group = bisect_right(firsts, row) - 1
        return bytes(_groups.get((*key, column, group))[row - firsts[group]].as_buffer())
    except (pyarrow.ArrowException, IndexError) as error:
        raise OSError(None, f"not as when it was listed: {error}") from None


def _opened(path: str, changed_ns: int) -> Any:
    """Open a file anew, as several threads must not read by one object; its metadata are parsed but once."""
    from pyarrow import parquet

    return parquet.ParquetFile(path, metadata=_metadata(path, changed_ns))


@lru_cache(_KNOWN_FILES)
def _metadata(path: str, _changed_ns: int) -> Any:
    from pyarrow import parquet

    return parquet.read_metadata(path)


@lru_cache(_KNOWN_FILES)
def _first_rows(path: str, changed_ns: int) -> list[int]:
    """List the number of the first row of each row group."""
    metadata = _metadata(path, changed_ns)
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return [0, *accumulate(rows)][:-1]


_Key = tuple[str, int, str, int]
"""Path, time of its change, column and row group."""


class _RowGroups:
    """Row groups that were read last. Several threads may ask at once; one of them reads, the others wait for it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, Future[Any]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: _Key) -> Any:
        """Return the binary values of a row group."""
        with self._lock:
            found = self._kept.get(key)
            values = self._kept[key] = found or Future()
            self._kept.move_to_end(key)
        if found is None:
            try:
                values.set_result(_read_group(*key))
            except BaseException as error:
                del self._kept[key]
                values.set_exception(error)
            self._shrink()
        return values.result()

    def _shrink(self) -> None:
        with self._lock:
            done = [(key, values.result().nbytes) for key, values in self._kept.items() if values.done()]
            kept = sum(size for _, size in done)
            for key, size in done[:-1]:
                if kept > _MOST_KEPT:
                    del self._kept[key]
                    kept -= size


def _read_group(path: str, changed_ns: int, column: str, group: int) -> Any:
    from pyarrow import compute

    with _opened(path, changed_ns) as source:
        table = source.read_row_group(group, [column], use_threads=False)
    name, _, field = column.partition(".")
    values = compute.struct_field(table.column(name), field) if field else table.column(name)
    return values.combine_chunks()


_groups = _RowGroups()
