"""Find the pages in a column of a Parquet file, by their headers in Thrift's compact protocol.

Format: parquet.thrift (PageHeader), and thrift-compact-protocol.md of Apache Thrift.
"""

from collections.abc import Iterator
from typing import NamedTuple

_DICTIONARY, _DATA = 2, 0  # kinds of pages; others are not known here
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12  # kinds of fields; 4 to 6 are whole numbers


class Page(NamedTuple):
    start: int
    """First byte of the compressed page in the column."""
    end: int
    size: int
    """Bytes when decompressed."""


def pages(column: bytes) -> Iterator[Page]:
    """Yield the pages of values, and the dictionary's. Raises ValueError for any other, or IndexError where it is cut off."""
    at = 0
    while at < len(column):
        reader = _Reader(column, at)
        header = reader.struct()
        if header[1] not in (_DICTIONARY, _DATA):
            raise ValueError(f"a page of kind {header[1]}")
        at = reader.at + header[3]
        yield Page(reader.at, at, header[2])


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def struct(self) -> dict[int, int]:
        """Read a structure: its numbers by the numbers of their fields; other fields are passed over."""
        found, field = {}, 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            field = field + step if step else self._signed()
            value = self._value(kind)
            if value is not None:
                found[field] = value
        return found

    def _value(self, kind: int) -> int | None:
        """Read the number of a field, or pass over anything else."""
        if kind in (_TRUE, _FALSE):
            return None
        if _BYTE < kind < _DOUBLE:
            return self._signed()
        if kind in (_BYTE, _DOUBLE):
            self.at += 1 if kind == _BYTE else 8
        elif kind == _BINARY:
            length = self._number()
            self.at += length
        elif kind == _STRUCT:
            self.struct()
        else:
            raise ValueError(f"a field of kind {kind}")
        return None

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _number(self) -> int:
        number, shift = 0, 0
        while (byte := self._byte()) >= 0x80:
            number |= (byte & 0x7F) << shift
            shift += 7
        return number | byte << shift

    def _signed(self) -> int:
        number = self._number()
        return number >> 1 ^ -(number & 1)
