"""Read samples that lie in a shard: as plain bytes, or in another form.

""          at `offset`, `length` bytes
deflated    likewise, but compressed, as in a zip file
snappy      in `length` bytes of whole blocks, from byte offset / BLOCK on; within these, behind its length, from the rest on
rows of X   in the row number `offset` of the column X of a Parquet file
"""

import errno

from data_pipeline.common.atomic_io import read_bytes
from data_pipeline.sources.published.parquet_images import ROWS, SNAPPY, read_row
from data_pipeline.sources.published.snappy_blocks import BLOCK, read_from
from data_pipeline.sources.published.zip_members import inflated


def read_form(form: str, path: str, offset: int, length: int) -> bytes:
    """Read the encoded bytes of a sample in one of the forms. Raises OSError, or `BadImage` for damaged data."""
    if form.startswith(ROWS):
        return read_row(path, form.removeprefix(ROWS), offset)
    if form == SNAPPY:
        return read_from(read_plain(path, offset // BLOCK, length), offset % BLOCK)
    data = read_plain(path, offset, length)
    return inflated(data) if form == "deflated" else data


def read_plain(path: str, offset: int, length: int) -> bytes:
    """Read `length` bytes at `offset`. Raises OSError, also where there are fewer."""
    data = read_bytes(path, offset, length)
    if len(data) < length:
        raise OSError(errno.EIO, "its shard is cut off")
    return data[:length]
