"""Check a file's structure and read its size, in a few microseconds instead of a decode.

DALI's parsers sometimes end the process on a stream that they cannot parse (garbage, GIF, an empty or header-only file, a
cut PNG). So they get nothing that `inspect` refuses, and `inspect` refuses what they refuse. Damage inside the
compressed data is not seen here; DALI reports it as an error of the batch.
"""

import hashlib
import struct
from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp"})
MAX_PIXELS = 1 << 27  # 400 MB decoded: a larger size is more likely a damaged header than a photograph

_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive Huffman: the kinds that decoders support
_SCAN = 0xDA
_SEGMENTS = _FRAMES | {0xC4, _SCAN, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}  # with tables, applications' data, comments

_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # bits, by kind of colour

_OTHERS = {
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"<!doctype html": "a web page, as of a download that failed",
    b"<html": "a web page, as of a download that failed",
    b"version https://git-lfs": "a pointer of Git LFS, for which `git lfs pull` fetches the file",
    b"PK\3\4": "a zip file, or a table of Excel",
    b"\xd0\xcf\x11\xe0": "a table of Excel",
    b"\x1f\x8b": "compressed by gzip",
}
"""First bytes of a file -> what it is."""


class BadImage(Exception):
    """A stream that must not be decoded, with the reason in a few words."""


class Size(NamedTuple):
    height: int
    width: int


def inspect(data: bytes, length: int | None = None) -> Size:
    """Read the size in pixels as stored (EXIF rotation not applied). Raises `BadImage`.

    `data` is the whole stream; or its beginning followed by its end, and then `length` is the true number of bytes, and the
    chunks of a PNG or WebP are not followed.
    """
    length = len(data) if length is None else length
    try:
        if data[:2] == b"\xff\xd8":
            size = _jpeg(data)
        elif data[:16] == _PNG:
            size = _png(data, length)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            size = _webp(data, length)
        elif data[:2] == b"BM":
            size = _bmp(data, length)
        else:
            kind = other_kind(data)
            stream = f"not a JPEG, PNG, BMP or WebP stream{f', but {kind}' * bool(kind)}"
            raise BadImage(stream if data else "the file is empty")
    except (IndexError, struct.error):
        raise BadImage("cut off") from None
    if not 0 < size.height * size.width <= MAX_PIXELS:
        raise BadImage(f"claims {size.width} x {size.height} pixels")
    return size


def other_kind(data: bytes) -> str:
    """Name what a file is that has the name of another kind, by its first bytes; "" where they tell nothing."""
    if data[4:8] == b"ftyp":
        return "HEIC, AVIF or a video"
    start = data[:512].lstrip().lower()
    return next((kind for first, kind in _OTHERS.items() if start.startswith(first.lower())), "")


def kind_of(file: Path) -> str:
    """Name what a file is, as `other_kind` does; "" where it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return other_kind(stream.read(512))
    except OSError:
        return ""


def mark(data: bytes, length: int, ends: tuple[int, int]) -> int:
    """Compute a number below 2^63 that images of the same bytes have in common, from their length and their two ends.

    It is odd where there is more than the ends, in which alone images with equal marks may differ. `data` is the whole stream
    of `length` bytes, or its first `ends[0]` bytes and up to `ends[1]` of its last.
    """
    head, tail = ends
    if len(data) == length > head:
        data = data[:head] + data[max(head, length - tail) :]
    return digest(data, length) << 1 | (length > head + tail)


def digest(data: bytes, length: int) -> int:
    """Compute a number below 2^62 from data and a length."""
    found = hashlib.sha1(data + length.to_bytes(8, "big"), usedforsecurity=False).digest()
    return int.from_bytes(found[:8], "big") >> 2


def _jpeg(data: bytes) -> Size:
    """Walk the segments up to the first scan (ITU-T T.81, annex B), then look for the end of the image behind it."""
    at, size = 2, None
    while True:
        if data[at] != 0xFF:
            raise BadImage("broken JPEG segment")
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        if marker not in _SEGMENTS:
            raise BadImage(f"JPEG marker {marker:#04x} is misplaced or not supported")
        (length,) = struct.unpack_from(">H", data, at + 1)
        if marker in _FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 3)
            if bits != 8 or components not in (1, 3, 4):
                raise BadImage(f"JPEG of {components} components with {bits} bits")
            size = Size(height, width)
        at += 1 + length
        if marker == _SCAN:
            break
    if size is None:
        raise BadImage("JPEG scan without a frame")
    if data.rfind(b"\xff\xd9") < at:
        raise BadImage("truncated JPEG")
    return size


def _png(data: bytes, length: int) -> Size:
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if bits not in _PNG_DEPTHS.get(colour, ()):
        raise BadImage(f"PNG of colour type {colour} with {bits} bits")
    if data.rfind(_PNG_END) < 33 or b"IDAT" not in data:
        raise BadImage("truncated PNG")
    if len(data) == length:
        at, kind = 33, b""
        while kind != b"IEND":
            size, kind = struct.unpack_from(">I4s", data, at)
            at += size + 12
    return Size(height, width)


def _webp(data: bytes, length: int) -> Size:
    claimed, kind = struct.unpack_from("<I4x4s", data, 4)
    if length < claimed + 8:
        raise BadImage("truncated WebP")
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Size(height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return Size((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise BadImage("unknown kind of WebP")
    if data[20] & 8 and len(data) == length:
        # The flag promises EXIF data. DALI's parser looks for it chunk by chunk, and forgets that odd chunks are padded.
        at = 12
        while kind != b"EXIF":
            kind, size = struct.unpack_from("<4sI", data, at)
            at += size + 8
        if at > length:
            raise BadImage("cut off")
    return Size(*(int.from_bytes(data[at : at + 3], "little") + 1 for at in (27, 24)))


def _bmp(data: bytes, length: int) -> Size:
    claimed, header = struct.unpack_from("<I8xI", data, 2)
    compression = colours = 0
    if header == 12:  # OS/2
        width, height, bits = struct.unpack_from("<HH2xH", data, 18)
    elif header >= 40:
        width, height, bits, compression, colours = struct.unpack_from("<ii2xHI12xI", data, 18)
    else:
        raise BadImage("unknown kind of BMP")
    if length < claimed:
        raise BadImage("truncated BMP")
    plain = compression == 0 and (bits in (24, 32) or (bits in (1, 4, 8) and colours <= 1 << bits))
    if not plain and not (compression == 3 and bits in (16, 32)):
        raise BadImage(f"BMP of {bits} bits, compression {compression}")
    return Size(abs(height), width)
