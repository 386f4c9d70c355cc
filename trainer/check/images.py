"""Images that the check makes itself, so that it needs neither a network nor a dataset."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

DISTINCT = 128
"""Different images of a dataset, as to draw one takes longer than to read it; even, for two classes."""


def picture(seed: int, side_px: int = 256) -> Image.Image:
    """Draw a square RGB image of smooth waves, sharp edges and some noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:side_px, :side_px]
    waves = [np.sin(x / draw.uniform(4, 40) + y / draw.uniform(4, 40) + phase) for phase in draw.uniform(0, 6, 3)]
    pixels = 128 + 70 * np.stack(waves, axis=-1) + 50 * ((x // 17 + y // 13) % 2)[..., None] - 25
    return Image.fromarray((pixels + draw.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


def _encode(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _alpha(image: Image.Image) -> Image.Image:
    """Make the image half transparent towards the right."""
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return image


def _deep(image: Image.Image) -> Image.Image:
    """Make a gray image of 16 bits."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257 + 100)


def _turned() -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6  # by a quarter: to be ignored
    return tags.tobytes()


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "plain.jpg": lambda image: _encode(image, "JPEG", quality=90),
    "coarse.jpg": lambda image: _encode(image, "JPEG", quality=30),
    "full chroma.jpg": lambda image: _encode(image, "JPEG", subsampling=0),
    "half chroma.jpg": lambda image: _encode(image, "JPEG", subsampling=1),
    "progressive.jpg": lambda image: _encode(image, "JPEG", progressive=True),
    "gray.jpg": lambda image: _encode(image.convert("L"), "JPEG"),
    "cmyk.jpg": lambda image: _encode(image.convert("CMYK"), "JPEG"),
    "restarts.jpg": lambda image: _encode(image, "JPEG", restart_marker_blocks=4),
    "turned.jpg": lambda image: _encode(image, "JPEG", exif=_turned()),
    "big header.jpg": lambda image: _encode(image, "JPEG", icc_profile=bytes(90_000)),
    "trailer.jpg": lambda image: _encode(image, "JPEG") + bytes(9_000),
    "rgb.png": lambda image: _encode(image, "PNG"),
    "alpha.png": lambda image: _encode(_alpha(image), "PNG"),
    "gray.png": lambda image: _encode(image.convert("L"), "PNG"),
    "palette.png": lambda image: _encode(image.convert("P"), "PNG"),
    "one bit.png": lambda image: _encode(image.convert("1"), "PNG"),
    "16 bits.png": lambda image: _encode(_deep(image), "PNG"),
    "lossy.webp": lambda image: _encode(image, "WEBP", quality=90),
    "lossless.webp": lambda image: _encode(image, "WEBP", lossless=True),
    "alpha.webp": lambda image: _encode(_alpha(image), "WEBP"),
    "rgb.bmp": lambda image: _encode(image, "BMP"),
    "gray.bmp": lambda image: _encode(image.convert("L"), "BMP"),
}
"""Name of each kind of file that is read -> its encoder."""


def broken_files() -> dict[str, bytes]:
    """Make files that no decoder accepts, one of each kind."""
    image = picture(0, 96)
    whole, png = KINDS["plain.jpg"](image), KINDS["rgb.png"](image)
    return {
        "empty": b"",
        "garbage": np.random.default_rng(0).bytes(5000),
        "zeros": bytes(5000),
        "text": b"<html>404 Not Found</html>\n" * 20,
        "gif": _encode(image, "GIF"),
        "signature only": b"\xff\xd8\xff\xd9",
        "header only": whole[:20],
        "tables only": whole[:400],
        "cut jpeg": whole[: len(whole) // 2],
        "cut at its end": whole[:-2],
        "cut png": png[: len(png) // 2],
        "cut webp": KINDS["lossy.webp"](image)[:-100],
        "cut bmp": KINDS["rgb.bmp"](image)[:-100],
    }


def flipped(data: bytes, at: int) -> bytes:
    """Flip the highest bit of one byte."""
    return data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :]


def write_dataset(folder: Path, count: int, side_px: int = 256, kind: str = "plain.jpg") -> Path:
    """Write train/ and val/ of two classes into `folder`, `count` files in train/ and a quarter of that in val/."""
    contents = [KINDS[kind](picture(number, side_px)) for number in range(min(count, DISTINCT))]
    for split, images in (("train", count), ("val", count // 4)):
        for number in range(images):
            path = folder / split / ("even", "odd")[number % 2] / f"{number:05}{Path(kind).suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[number % len(contents)])
    return folder
