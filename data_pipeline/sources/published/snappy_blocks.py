"""Read a part of a stream that Snappy has compressed: its blocks of 64 KB do not refer to each other.

Format: github.com/google/snappy, format_description.txt. That blocks stand alone is how its compressor works, not a promise of
the format, so `blocks` checks it.
"""

from collections.abc import Iterator
from typing import NamedTuple

from data_pipeline.sources.image_headers import BadImage

BLOCK = 1 << 16
"""Bytes of a block before compression."""


class _Element(NamedTuple):
    start: int
    """First byte in the compressed stream."""
    length: int
    """Bytes that it stands for."""
    back: int
    """Bytes from there back to their copy; 0 where they are in the stream itself."""


def blocks(stream: bytes) -> list[int] | None:
    """Find where in a stream each block begins, and the last one ends; None where they do not stand alone."""
    starts, made = [], 0
    for element in _elements(stream, _header(stream)):
        if made % BLOCK == 0:
            starts.append(element.start)
        if element.back > made % BLOCK or made % BLOCK + element.length > BLOCK:
            return None
        made += element.length
    return [*starts, len(stream)]


def read_from(compressed: bytes, skip: int) -> bytes:
    """Read the text behind its length in four bytes that begins at byte `skip` of some whole blocks. Raises `BadImage`."""
    from pyarrow import ArrowException, decompress  # type: ignore[import-untyped]

    try:
        size = sum(element.length for element in _elements(compressed, 0))
        data = decompress(_varint(size) + compressed, size, codec="snappy", asbytes=True)
    except (IndexError, OSError, ArrowException):
        raise BadImage("damaged in the Parquet file") from None
    start = skip + 4
    end = start + int.from_bytes(data[skip:start], "little")
    if end > len(data):
        raise BadImage("damaged in the Parquet file")
    return bytes(data[start:end])


def _elements(stream: bytes, at: int) -> Iterator[_Element]:
    """Yield the elements of a stream from byte `at` on. Raises IndexError where it is cut off."""
    while at < len(stream):
        tag, start = stream[at], at
        kind, number = tag & 3, tag >> 2
        if kind == 0:
            more = max(number - 59, 0)
            length = (int.from_bytes(stream[at + 1 : at + 1 + more], "little") if more else number) + 1
            at += 1 + more + length
            yield _Element(start, length, 0)
        elif kind == 1:
            at += 2
            yield _Element(start, 4 + (number & 7), tag >> 5 << 8 | stream[start + 1])
        else:
            width = 2 if kind == 2 else 4
            at += 1 + width
            yield _Element(start, number + 1, int.from_bytes(stream[start + 1 : at], "little"))


def _header(stream: bytes) -> int:
    """Return the bytes of the number in front of a stream."""
    return next(at for at in range(5) if stream[at] < 0x80) + 1


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
