"""Images in a column of a Parquet file: by their places in the file where these can be found, else by row groups.

A column that is not compressed (as `datasets` has written images since version 4) holds each image as it is, behind its
length: it is read like a member of a tar. Of one that Snappy has compressed, as most are, a few blocks are read. Any other
column is read by whole row groups, of which a few are kept.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from data_pipeline.common.atomic_io import MOST_BYTES, read_bytes
from data_pipeline.common.errors import require
from data_pipeline.sources.published.parquet_pages import pages
from data_pipeline.sources.published.snappy_blocks import BLOCK, blocks

SNAPPY, ROWS = "snappy", "rows of "
"""Forms of images in a column; ROWS is followed by its name."""
_MOST_KEPT = 1 << 28  # bytes of row groups that a process keeps, besides those being read
_LARGEST_GROUP = 1 << 31  # bytes: a row group is read at once, several at a time
_KNOWN_FILES = 1024


class Rows(NamedTuple):
    """Rows of one file."""

    images: list[tuple[int, int]]
    """Place of each row's image, as its form has it (see `stored_forms`); (0, -1) where it has none."""
    names: list[str]
    """File name that each image had; "" where that is unknown."""
    labels: list[Any]
    form: str
    groups: list[Any]
    """Group of each row; empty where none are asked for."""


class Column(NamedTuple):
    """Columns of the images, of their labels, and of their groups."""

    image: str
    is_struct: bool
    """True for a structure of bytes and path, as Hugging Face's libraries have it."""
    label: str
    group: str = ""
    """Empty where images are not grouped."""

    @property
    def data(self) -> str:
        return f"{self.image}.bytes" if self.is_struct else self.image


def parquet_schema(file: Path) -> Any:
    """Read the schema of a file. Raises OSError, or pyarrow's ArrowException."""
    with _opened(str(file), os.stat(file).st_mtime_ns) as source:
        return source.schema_arrow


def parquet_rows(file: Path, columns: Column) -> Rows:
    """Read the rows of a file, one row group at a time. Raises OSError, `UserError`, or pyarrow's ArrowException."""
    wanted = [columns.data, *([f"{columns.image}.path"] if columns.is_struct else [])]
    wanted += [name for name in (columns.label, columns.group) if name]
    source = _opened(str(file), os.stat(file).st_mtime_ns)
    sizes = [source.metadata.row_group(group).total_byte_size for group in range(source.num_row_groups)]
    require(
        max(sizes, default=0) <= _LARGEST_GROUP,
        f"data.path: {file} has a row group of {max(sizes, default=0) / 1e9:.1f} GB, which would be read at once; write it in "
        "smaller ones, as by pyarrow.parquet.write_table(…, row_group_size=100)",
    )
    images: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    form: str | None = None
    names: list[str] = []
    labels: list[Any] = []
    groups: list[Any] = []
    for group in range(source.num_row_groups):
        table = source.read_row_group(group, wanted, use_threads=False)
        data, paths = _parts(table.column(columns.image), columns)
        images += [(len(images) + row, -1 if value is None else len(value)) for row, value in enumerate(data)]
        if form is None or not form.startswith(ROWS):
            own, found = _places(source, file, group, columns.data, data)
            form = own if form in (None, own) else ROWS + columns.data
            places += found
        names += paths
        labels += table.column(columns.label).to_pylist()
        groups += table.column(columns.group).to_pylist() if columns.group else []
    form = form or ""
    return Rows(images if form.startswith(ROWS) else places, names, labels, form, groups)


def _parts(column: Any, columns: Column) -> tuple[list[bytes | None], list[str]]:
    """Divide an Arrow column of images into their bytes and their names."""
    from pyarrow import compute  # type: ignore[import-untyped]

    if not columns.is_struct:
        return column.to_pylist(), [""] * len(column)
    paths = compute.struct_field(column, "path").to_pylist()
    return compute.struct_field(column, "bytes").to_pylist(), [os.path.basename(path or "") for path in paths]


# ---- places ---------------------------------------------------------------------------------------------------------


class _Text(NamedTuple):
    """Part of a column, decompressed, in which values lie one after the other, each behind its length in four bytes."""

    data: bytes
    place: Callable[[int, int], tuple[int, int]]
    """Function that gives the place of a value, by its first byte in `data`, that of its length, and its bytes."""


def _places(
    source: Any, file: Path, group: int, name: str, values: list[bytes | None]
) -> tuple[str, list[tuple[int, int]]]:
    """Find the place of each value of a column in a row group, and their form. Every byte is compared."""
    row_group = source.metadata.row_group(group)
    column = next(
        column for at in range(row_group.num_columns) if (column := row_group.column(at)).path_in_schema == name
    )
    start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    kinds = {"UNCOMPRESSED": ("", _whole), "SNAPPY": (SNAPPY, _decompressed)}
    if column.compression in kinds and column.total_compressed_size <= MOST_BYTES:
        form, texts = kinds[column.compression]
        found = _found(texts(read_bytes(file, start, column.total_compressed_size), start), values)
        if found is not None:
            return form, found
    return ROWS + name, []


def _found(texts: Iterator[_Text], values: list[bytes | None]) -> list[tuple[int, int]] | None:
    """Find each value in the texts, where they are in order, each once; None if one is not there."""
    found: dict[bytes | None, tuple[int, int]] = {None: (0, -1)}
    text, at = next(texts, None), 0
    for value in values:
        if value is None or value in found:
            continue
        written = len(value).to_bytes(4, "little") + value
        while text and not text.data.startswith(written, at):
            at = text.data.find(written, at)
            if at < 0:
                text, at = next(texts, None), 0
        if text is None:
            return None
        found[value] = text.place(at, len(value))
        at += len(written)
    return [found[value] for value in values]


def _whole(column: bytes, start: int) -> Iterator[_Text]:
    yield _Text(column, lambda at, length: (start + at + 4, length))


def _decompressed(column: bytes, start: int) -> Iterator[_Text]:
    """Yield the pages of a column; none behind the first whose blocks cannot be read alone."""
    from pyarrow import decompress

    try:
        for page in pages(column):
            stream = column[page.start : page.end]
            starts = blocks(stream)
            if starts is None:
                return
            data = decompress(stream, page.size, codec="snappy", asbytes=True)
            yield _Text(data, partial(_blocks_of, start + page.start, starts))
    except (ValueError, IndexError, KeyError):  # a kind of page that is not known here
        return


def _blocks_of(start: int, starts: list[int], at: int, length: int) -> tuple[int, int]:
    """Place of a value in a page that begins at byte `start` of the file: its blocks, and where it begins in the first."""
    first, last = at // BLOCK, (at + 4 + length - 1) // BLOCK
    return (start + starts[first]) * BLOCK + at % BLOCK, starts[last + 1] - starts[first]


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
