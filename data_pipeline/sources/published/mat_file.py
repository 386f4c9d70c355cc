"""Read an array of structures from a MATLAB file (level 5), as ImageNet's development kit has one, without SciPy.

Format: "MAT-File Format", MathWorks, chapter 1. Numbers and texts are read, other contents are passed over.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED, _UTF8 = 14, 15, 16
_STRUCT, _CHAR = 2, 4  # classes of arrays
_MOST_BYTES = 1 << 26  # decompressed: the kit's file has 2 MB

Record = dict[str, object]
"""Fields of one structure: a text, a number, or None for anything else."""


def read_structs(data: bytes, name: str) -> list[Record]:
    """Read the variable `name`, an array of structures. Raises ValueError for a file without it, or of another kind."""
    if data[126:128] != b"IM":
        raise ValueError("it is no MATLAB file of level 5")
    try:
        for kind, content in _elements(data[128:]):
            if kind == _COMPRESSED:
                ((kind, content),) = list(_elements(_inflated(content)))
            parts = list(_elements(content)) if kind == _MATRIX else []
            if len(parts) > 4 and parts[2][1].decode() == name and parts[0][1][0] == _STRUCT:
                return _records(parts)
    except (struct.error, zlib.error, IndexError) as error:
        raise ValueError(f"it is damaged: {error}") from None
    raise ValueError(f"it has no structures called {name}")


def _inflated(content: bytes) -> bytes:
    return zlib.decompressobj().decompress(content, _MOST_BYTES)


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and content of each element: eight bytes of kind and length, or four of both before four of content."""
    at = 0
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<II", data, at)
        if kind >> 16:
            kind, length, at = kind & 0xFFFF, kind >> 16, at + 4
            step = 4
        else:
            at += 8
            step = length if kind == _COMPRESSED else -(-length // 8) * 8
        if at + length > len(data):
            raise ValueError("it is cut off")
        yield kind, data[at : at + length]
        at += step


def _records(parts: list[tuple[int, bytes]]) -> list[Record]:
    """Divide the values of a structure array by structures: flags, size, name, length of a field's name, fields, values."""
    width = int.from_bytes(parts[3][1], "little")
    fields = [parts[4][1][at : at + width].split(b"\0")[0].decode() for at in range(0, len(parts[4][1]), width)]
    values = [_value(content) for _, content in parts[5:]]
    return [dict(zip(fields, values[at:], strict=False)) for at in range(0, len(values), len(fields))]


def _value(matrix: bytes) -> object:
    """Read a matrix: a text, or its number where it has just one."""
    parts = list(_elements(matrix))
    if len(parts) != 4:
        return None
    (_, flags), _, _, (kind, content) = parts
    if flags[0] == _CHAR:
        return content.decode("utf-8" if kind in (1, 2, _UTF8) else "utf-16-le")
    if kind not in _NUMBERS:
        return None
    numbers = np.frombuffer(content, "<" + _NUMBERS[kind])
    return numbers.item() if len(numbers) == 1 else None
