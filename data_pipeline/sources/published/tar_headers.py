"""Walk the members of a plain tar, or of a tar within a tar, by their headers alone."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from data_pipeline.common.errors import UserError

_BLOCK = 512
_FILES = (b"0", b"\0")


class Member(NamedTuple):
    """File in a tar: its name and its place in bytes."""

    name: str
    offset: int
    length: int


def members(descriptor: int, name: str, start: int, end: int) -> Iterator[Member]:
    """Yield the files of the tar that lies between the bytes `start` and `end` of an open file, called `name` in messages.

    Raises OSError, or `UserError` for a tar that is cut off, or that has anything but plain files of short names.
    """
    while True:
        header = os.pread(descriptor, _BLOCK, start)
        if start + _BLOCK > end or len(header) < _BLOCK:
            raise UserError(f"data.path: {name} is cut off; copy it again, and compare its checksum")
        if not any(header):
            return
        member = _parsed(header, start)
        if member is None:
            raise UserError(
                f"data.path: {name} is no plain tar at byte {start:,}; copy it again, and compare its checksum"
            )
        yield member
        start = member.offset + -(-member.length // _BLOCK) * _BLOCK


def _parsed(header: bytes, start: int) -> Member | None:
    """Parse the header of a plain file; None for anything else (POSIX.1-1988, ustar)."""
    try:
        name = header[:100].rstrip(b"\0").decode()
        length, checksum = int(header[124:136].strip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    whole = checksum == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    fits = whole and length >= 0 and header[156:157] in _FILES and not any(header[345:500])
    return Member(name, start + _BLOCK, length) if fits else None
