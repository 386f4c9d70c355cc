"""Places of the images in a zip file: of each the bytes of its data, stored or deflated."""

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.atomic_io import MOST_BYTES, stays_below
from data_pipeline.common.errors import UserError, require
from data_pipeline.sources.image_headers import BadImage

_HEADER = struct.Struct("<4s22xHH")  # in front of each member: signature, then lengths of its name and of other fields
_ENCRYPTED = 0x1


class Member(NamedTuple):
    """File in a zip file: its name and the place of its data in bytes."""

    name: str
    offset: int
    length: int
    deflated: bool


def members(file: Path) -> list[Member]:
    """List all files in a zip file. Raises `UserError` for one of which not every member can be read."""
    try:
        with _opened(file) as archive, open(file, "rb") as stream:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            _use_slashes(infos)
            _check(infos, file)
            return [_located(info, stream.fileno()) for info in infos]
    except (OSError, zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"data.path: {file} cannot be read ({why}); download it again, and join it first where it comes in parts"
        ) from None


def inflated(data: bytes) -> bytes:
    """Decompress a deflated member. Raises `BadImage` for damaged data, or for more than an image may have."""
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        image = inflater.decompress(data, MOST_BYTES)
    except zlib.error:
        raise BadImage("damaged in the zip file") from None
    if not inflater.eof:
        raise BadImage("cut off in the zip file, or larger than any image")
    return image


def _opened(file: Path) -> zipfile.ZipFile:
    """Open a zip file; its names are UTF-8, or, as old programs wrote them, in code page 437."""
    try:
        return zipfile.ZipFile(file, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(file)


def _use_slashes(infos: list[zipfile.ZipInfo]) -> None:
    """Divide names by slashes where all are divided by backslashes, as some programs of Windows write them."""
    if not any("/" in info.filename for info in infos):
        for info in infos:
            info.filename = info.filename.replace("\\", "/")


def _check(infos: list[zipfile.ZipInfo], file: Path) -> None:
    locked = next((info.filename for info in infos if info.flag_bits & _ENCRYPTED), None)
    require(
        locked is None,
        f"data.path: {file} is encrypted, as {locked!r}; unzip it with its password, and give the folder",
    )
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    odd = next((info for info in infos if info.compress_type not in kinds), None)
    require(
        odd is None,
        f"data.path: {file} is compressed by method {odd and odd.compress_type}, where images are read from stored or "
        "deflated members; unzip it, and give the folder",
    )
    outside = next((info.filename for info in infos if not stays_below(info.filename)), None)
    require(outside is None, f"data.path: {file} has a member {outside!r} that leads elsewhere; remove it")
    twice = len(infos) - len({info.filename for info in infos})
    require(twice == 0, f"data.path: {twice} files in {file} have the name of another; unzip it, and give the folder")


def _located(info: zipfile.ZipInfo, descriptor: int) -> Member:
    """Find a member's data behind its own header, which may differ in length from that of the index."""
    header = os.pread(descriptor, _HEADER.size, info.header_offset)
    signature, name, other = _HEADER.unpack(header)
    if signature != b"PK\3\4":
        raise zipfile.BadZipFile(f"no file at byte {info.header_offset:,}, where its index has {info.filename!r}")
    start = info.header_offset + _HEADER.size + name + other
    return Member(info.filename, start, info.compress_size, info.compress_type == zipfile.ZIP_DEFLATED)
