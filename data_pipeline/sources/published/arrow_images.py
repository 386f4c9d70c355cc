"""Images in an Arrow file, as `datasets` keeps them in its cache: each lies in it as it is, so that places are enough."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.sources.published.parquet_images import Column, Rows


def arrow_schema(file: Path) -> Any:
    """Read the schema of a file. Raises OSError, or pyarrow's ArrowException."""
    with _mapped(file) as source:
        return _batches(source)[0]


def arrow_rows(file: Path, columns: Column) -> Rows:
    """Read the rows of a file from its map in memory. Raises OSError, ValueError, or pyarrow's ArrowException."""
    from pyarrow import compute  # type: ignore[import-untyped]

    rows = Rows([], [], [], form="", groups=[])
    with _mapped(file) as source:
        whole = source.read_buffer(source.size())
        source.seek(0)
        for batch in _batches(source)[1]:
            column = batch.column(columns.image)
            values = compute.struct_field(column, "bytes") if columns.is_struct else column
            rows.images.extend(_places(values, whole))
            paths = compute.struct_field(column, "path").to_pylist() if columns.is_struct else [None] * len(column)
            rows.names.extend(os.path.basename(path or "") for path in paths)
            rows.labels.extend(batch.column(columns.label).to_pylist())
            rows.groups.extend(batch.column(columns.group).to_pylist() if columns.group else [])
    return rows


@contextmanager
def _mapped(file: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        yield source


def _batches(source: Any) -> tuple[Any, Iterator[Any]]:
    """Open a stream of batches, as `datasets` writes, or a file with an index at its end: its schema, and the batches."""
    from pyarrow import ArrowInvalid, ipc

    try:
        stream = ipc.open_stream(source)
        return stream.schema, iter(stream)
    except ArrowInvalid:
        file = ipc.open_file(source)
        return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))


def _places(values: Any, whole: Any) -> list[tuple[int, int]]:
    """Find first byte and bytes of each binary value in the mapped file `whole`; (0, -1) where it is null."""
    import pyarrow

    _, offsets, data = values.buffers()
    kind = np.int64 if pyarrow.types.is_large_binary(values.type) else np.int32
    ends = np.frombuffer(offsets, kind)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    start = data.address - whole.address if data else 0
    if not 0 <= start <= whole.size - (data.size if data else 0):
        raise ValueError("its columns are compressed")
    found = zip((start + ends[:-1]).tolist(), np.diff(ends).tolist(), values.is_valid().to_pylist(), strict=True)
    return [(at, length) if valid else (0, -1) for at, length, valid in found]
