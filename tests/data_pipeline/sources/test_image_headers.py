"""Headers of streams against PIL; and DALI survives every stream that is accepted."""

import io
import pickle
import random
import struct
import subprocess
import sys
import zlib
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.sources.image_headers import MAX_PIXELS, BadImage, inspect
from tests.conftest import KINDS, ROOT, encode, picture

JPEG = KINDS["plain.jpg"](picture(60, 80))
PNG = KINDS["rgb.png"](picture(60, 80))
WEBP = KINDS["lossy.webp"](picture(60, 80))
BMP, GREY_BMP = KINDS["rgb.bmp"](picture(60, 80)), KINDS["grayscale.bmp"](picture(60, 80))


def thumbnailed(image: Image.Image) -> bytes:
    """A JPEG whose EXIF data hold a whole JPEG, end marker and all."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + encode(image.resize((32, 24)), "JPEG")
    return encode(image, "JPEG", exif=exif)


def os2_bitmap(height: int, width: int) -> bytes:
    rows = bytes((3 * width + 3) // 4 * 4 * height)
    return struct.pack("<2sIHHIIHHHH", b"BM", 26 + len(rows), 0, 0, 26, 12, width, height, 1, 24) + rows


def upside_down_bitmap(height: int, width: int) -> bytes:
    stream = bytearray(encode(picture(height, width), "BMP"))
    struct.pack_into("<i", stream, 22, -height)
    return bytes(stream)


def odd_chunk_webp(height: int, width: int) -> bytes:
    return encode(picture(height, width), "WEBP", icc_profile=bytes(133), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")


def overlong_exif_webp(height: int, width: int) -> bytes:
    stream = bytearray(KINDS["turned.webp"](picture(height, width)))
    struct.pack_into("<I", stream, stream.rindex(b"EXIF") + 4, 10_000)
    return bytes(stream)


def claiming(stream: bytes, width: int, height: int) -> bytes:
    """A PNG with another size in its header, and the right checksum for it."""
    header = b"IHDR" + struct.pack(">II", width, height) + stream[24:29]
    return stream[:12] + header + struct.pack(">I", zlib.crc32(header)) + stream[33:]


# What is accepted


def test_sizes_are_those_of_pil(streams: dict[str, bytes]) -> None:
    extra = {
        "thumbnail": thumbnailed(picture(60, 80)),
        "animated.png": encode(picture(60, 80), "PNG", save_all=True, append_images=[picture(60, 80, 1)]),
        "animated.webp": encode(picture(60, 80), "WEBP", save_all=True, append_images=[picture(60, 80, 1)]),
        "several.jpg": encode(picture(60, 80), "MPO", save_all=True, append_images=[picture(60, 80, 1)]),
        "os2.bmp": os2_bitmap(9, 14),
        "upside down.bmp": upside_down_bitmap(9, 14),
    }
    for name, stream in (streams | extra).items():
        width, height = Image.open(io.BytesIO(stream)).size
        assert inspect(stream) == (height, width), name


def test_beginning_and_end_of_a_file_will_do(streams: dict[str, bytes]) -> None:
    for name, stream in streams.items():
        if name not in ("big header.jpg", "trailer.jpg"):  # what counts lies in between
            assert inspect(stream[:1500] + stream[-600:], len(stream)) == inspect(stream), name


def test_real_images(imagenette: Path) -> None:
    for path in sorted(imagenette.glob("val/*/*"))[::20]:
        with Image.open(path) as image:
            assert inspect(path.read_bytes()) == image.size[::-1], path


# What is refused, and why


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"", "the file is empty"),
        (b"\xff", "not a JPEG"),
        (random.Random(0).randbytes(5000), "not a JPEG"),
        (bytes(5000), "not a JPEG"),
        (b"A text that someone called cat.jpg.\n" * 50, "not a JPEG"),
        (b"BM is how this text happens to begin.\n" * 50, "BMP"),
        (encode(picture(60, 80).convert("P"), "GIF"), "not a JPEG"),
        (encode(picture(60, 80), "TIFF"), "not a JPEG"),
        (b"\xff\xd8", "cut off"),
        (b"\xff\xd8" + bytes(5000), "broken JPEG segment"),
        (b"\xff\xd8\xff\xd9", "0xd9"),
        (JPEG[:300], "cut off"),
        (JPEG[: JPEG.index(b"\xff\xda")], "cut off"),
        (JPEG[: JPEG.index(b"\xff\xda")] + b"\xff\xd9", "0xd9"),
        (JPEG[: JPEG.index(b"\xff\xda") + 300], "truncated JPEG"),
        (JPEG[:-2], "truncated JPEG"),
        (JPEG.replace(b"\xff\xc0", b"\xff\xc9"), "0xc9"),
        (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "12 bits"),
        (JPEG[:2] + b"\xff\xd0" + JPEG[2:], "0xd0"),
        (JPEG[: JPEG.index(b"\xff\xc0")] + JPEG[JPEG.index(b"\xff\xc0") + 19 :], "without a frame"),
        (JPEG.replace(b"\xff\xc0\0\x11\x08\0\x3c", b"\xff\xc0\0\x11\x08\0\0"), "0 pixels"),
        (PNG[:8], "not a JPEG"),
        (PNG[:40], "truncated PNG"),
        (PNG[:-1], "truncated PNG"),
        (PNG[:2000] + PNG[-12:], "cut off"),
        (PNG[:24] + b"\x03" + PNG[25:], "3 bits"),
        (claiming(PNG, 80, 0), "80 x 0 pixels"),
        (claiming(PNG, 60_000, 60_000), "60000 x 60000 pixels"),
        (WEBP[:-1], "truncated WebP"),
        (WEBP[:20], "truncated WebP"),
        (WEBP.replace(b"\x9d\x01\x2a", bytes(3)), "unknown kind of WebP"),
        (odd_chunk_webp(60, 80), "cut off"),
        (overlong_exif_webp(60, 80), "cut off"),
        (BMP[:-1], "truncated BMP"),
        (BMP[:30], "cut off"),
        (BMP[:28] + b"\x10" + BMP[29:], "16 bits"),
        (GREY_BMP[:46] + b"\x01\x01" + GREY_BMP[48:], "8 bits"),
    ],
)
def test_refused_with_a_reason(stream: bytes, why: str) -> None:
    with pytest.raises(BadImage, match=why):
        inspect(stream)


def test_the_end_marker_of_a_thumbnail_ends_no_image() -> None:
    whole = thumbnailed(picture(60, 80))
    scan = whole.rindex(b"\xff\xda")
    assert whole.index(b"\xff\xd9") < scan
    for end in range(scan + 20, len(whole) - 1, 97):
        with pytest.raises(BadImage, match="truncated JPEG"):
            inspect(whole[:end])


def test_the_largest_image_is_bounded() -> None:
    assert inspect(claiming(PNG, 1 << 14, 1 << 13)) == (1 << 13, 1 << 14)
    assert MAX_PIXELS == 1 << 27
    with pytest.raises(BadImage, match="pixels"):
        inspect(claiming(PNG, (1 << 14) + 1, 1 << 13))


# What DALI makes of it

DECODE = """
import pickle, sys
import numpy as np
from nvidia.dali import Pipeline, fn, types

def decode(stream):
    pipeline = Pipeline(batch_size=32, num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source=lambda: [np.frombuffer(stream, np.uint8)] * 32)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False))
    pipeline.build()
    try:
        return tuple(pipeline.run()[0].shape()[-1][:2])
    except RuntimeError as error:
        return str(error)

for stream in pickle.load(sys.stdin.buffer):
    print(repr(decode(stream)), flush=True)
"""


def decode(streams: list[bytes]) -> list[tuple[int, int] | str]:
    """Size of each after decoding 32 copies in one batch, or the error; in a process that may be lost."""
    process = subprocess.run([sys.executable, "-c", DECODE], input=pickle.dumps(streams), capture_output=True, cwd=ROOT)
    results = [literal_eval(line) for line in process.stdout.decode().splitlines()]
    assert process.returncode == 0, f"DALI ended the process on {streams[len(results)][:64]!r}"
    return results


def cut(stream: bytes, draw: random.Random) -> bytes:
    return stream[: draw.randrange(len(stream))]


def zeroed(stream: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(stream)), draw.randrange(1, 3000)
    return stream[:start] + bytes(len(stream[start : start + length])) + stream[start + length :]


def shortened(stream: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(stream))
    return stream[:start] + stream[start + draw.randrange(1, 2000) :]


def altered(stream: bytes, draw: random.Random) -> bytes:
    """One byte is another, most often in the header."""
    at = draw.randrange(min(len(stream), 700 if draw.random() < 0.7 else 1 << 30))
    return stream[:at] + draw.randbytes(1) + stream[at + 1 :]


@pytest.mark.parametrize("damage", [cut, zeroed, shortened, altered])
def test_dali_survives_what_is_accepted(
    streams: dict[str, bytes], damage: Callable[[bytes, random.Random], bytes]
) -> None:
    draw = random.Random(0)
    accepted, sizes, refused = [], [], 0
    for stream in [*streams.values(), thumbnailed(picture(60, 80))]:
        for _ in range(40 if damage is cut else 12):
            damaged = damage(stream, draw)
            try:
                sizes.append(inspect(damaged))
                accepted.append(damaged)
            except BadImage:
                refused += 1
    assert refused > 0 and accepted
    for result, size in zip(decode(accepted), sizes, strict=True):
        assert result == size or (isinstance(result, str) and "Failed to decode sample" in result)
        assert damage is not cut or result == size


def test_whole_streams_are_decoded_at_their_size(streams: dict[str, bytes]) -> None:
    assert decode(list(streams.values())) == [inspect(stream) for stream in streams.values()]
