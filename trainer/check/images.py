"""Images that the check makes itself, so that it needs neither a network nor a dataset."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "jpeg": ("JPEG", {"quality": 90}, "RGB"),
    "progressive jpeg": ("JPEG", {"progressive": True}, "RGB"),
    "full chroma jpeg": ("JPEG", {"subsampling": 0}, "RGB"),
    "grayscale jpeg": ("JPEG", {}, "L"),
    "cmyk jpeg": ("JPEG", {}, "CMYK"),
    "png": ("PNG", {}, "RGB"),
    "palette png": ("PNG", {}, "P"),
    "grayscale png": ("PNG", {}, "L"),
    "webp": ("WEBP", {"quality": 90}, "RGB"),
    "bmp": ("BMP", {}, "RGB"),
}
"""Name of each kind of file that is read -> Pillow's format, options and mode."""

SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


def picture(seed: int, side_px: int = 256) -> Image.Image:
    """Draw a square RGB image of smooth waves, sharp edges and some noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:side_px, :side_px]
    waves = [np.sin(x / draw.uniform(4, 40) + y / draw.uniform(4, 40) + phase) for phase in draw.uniform(0, 6, 3)]
    pixels = 128 + 70 * np.stack(waves, axis=-1) + 50 * ((x // 17 + y // 13) % 2)[..., None] - 25
    return Image.fromarray((pixels + draw.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str) -> bytes:
    """Encode the image as a file of one of `KINDS`."""
    form, options, mode = KINDS[kind]
    stream = io.BytesIO()
    image.convert(mode).save(stream, form, **options)
    return stream.getvalue()


def write_dataset(folder: Path, count: int, side_px: int = 256) -> Path:
    """Write train/ and val/ of two classes into `folder`, `count` JPEGs in train/ and a quarter of that in val/."""
    for split, images in (("train", count), ("val", count // 4)):
        for number in range(images):
            path = folder / split / ("even", "odd")[number % 2] / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(number, side_px), "jpeg"))
    return folder
