"""What a file claims to be, read from its first and last bytes: a few microseconds instead of a decode.

DALI's CPU decoder can end the process on streams that it cannot parse (garbage, GIF, an empty or header-only file, a cut
PNG), so nothing reaches it that `inspect` refuses. Damage inside the entropy-coded data is not seen here.
"""

import struct
from typing import NamedTuple

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

_PNG = b"\x89PNG\r\n\x1a\n"
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive Huffman: what decoders support
_OTHER_FRAMES = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length: TEM and restarts


class BadImage(Exception):
    """Why a stream must not be decoded, in a few words."""


class Size(NamedTuple):
    height: int
    width: int


def inspect(data: bytes, length: int | None = None) -> Size:
    """Size in pixels as stored (EXIF rotation not applied). Raises `BadImage`.

    `data` is the whole stream, or its beginning followed by its end when `length` gives the true number of bytes.
    """
    length = len(data) if length is None else length
    try:
        if data[:2] == b"\xff\xd8":
            size = _jpeg(data)
        elif data[:8] == _PNG:
            size = _png(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            size = _webp(data, length)
        elif data[:2] == b"BM":
            size = _bmp(data, length)
        else:
            raise BadImage("the file is empty" if not data else "not a JPEG, PNG, BMP or WebP stream")
    except (IndexError, struct.error):
        raise BadImage("cut off in the header") from None
    if not (size.height and size.width):
        raise BadImage("zero height or width")
    return size


def _jpeg(data: bytes) -> Size:
    """Walk the markers up to the first scan (ITU-T T.81, annex B), then look for the end of the image behind it."""
    at, size = 2, None
    while True:
        if data[at] != 0xFF:
            raise BadImage("broken JPEG marker")
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in _ALONE:
            continue
        if marker == 0xD9:
            raise BadImage("JPEG without image data")
        (length,) = struct.unpack_from(">H", data, at)
        if length < 2:
            raise BadImage("broken JPEG segment")
        if marker in _FRAMES:
            size = Size(*struct.unpack_from(">HH", data, at + 3))
        elif marker in _OTHER_FRAMES:
            raise BadImage("lossless, hierarchical or arithmetic JPEG")
        at += length
        if marker == 0xDA:
            break
    if size is None:
        raise BadImage("JPEG scan without a frame")
    if data.rfind(b"\xff\xd9") < at:
        raise BadImage("truncated JPEG")
    return size


def _png(data: bytes) -> Size:
    if data[12:16] != b"IHDR":
        raise BadImage("PNG without its header")
    width, height = struct.unpack_from(">II", data, 16)
    if data.rfind(b"IEND") < 33 or b"IDAT" not in data:
        raise BadImage("truncated PNG")
    return Size(height, width)


def _webp(data: bytes, length: int) -> Size:
    (claimed,) = struct.unpack_from("<I", data, 4)
    if length < claimed + 8:
        raise BadImage("truncated WebP")
    if data[12:16] == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Size(height & 0x3FFF, width & 0x3FFF)
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Size((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if data[12:16] == b"VP8X":
        return Size(*(int.from_bytes(data[at : at + 3], "little") + 1 for at in (27, 24)))
    raise BadImage("unknown kind of WebP")


def _bmp(data: bytes, length: int) -> Size:
    (claimed,) = struct.unpack_from("<I", data, 2)
    width, height = struct.unpack_from("<ii", data, 18)
    if length < claimed:
        raise BadImage("truncated BMP")
    return Size(abs(height), width)
