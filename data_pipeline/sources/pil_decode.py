"""Strict decoding by Pillow: every pixel, or the reason why not."""

import io
import re

import numpy as np
from PIL import Image

from data_pipeline.sources.image_headers import MAX_PIXELS, BadImage, inspect

Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # `inspect` refuses more: Pillow needs no limit of its own

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")


def decode(data: bytes, draft: tuple[int, int] | None = None) -> Image.Image:
    """Decode the whole image, orientation tag ignored, in the mode it is stored in. Raises `BadImage` with a short reason.

    `draft` (width, height): a JPEG may come smaller by a factor of 2, 4 or 8, but not smaller than this. Data that the
    decoder can interpret passes, here as in DALI: in a JPEG, most flipped bits are valid codes for other pixels.
    """
    inspect(data)
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if draft:
            image.draft("", draft)
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # plugins raise OSError, SyntaxError, ValueError, struct.error, EOFError and others
        raise BadImage(_reason(error)) from None
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB as DALI does: alpha is dropped, 16 bits become 8 by scaling."""
    if image.mode.startswith("I"):  # Pillow would clip values above 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    said = str(error).split("\n")[0]
    if "truncated" in said.lower():
        return "truncated image data"
    if any(words in said for words in ("broken", "cannot identify", "unrecognized data", "failed to read")):
        return "damaged image data"
    return re.sub(r"\s+", " ", said) or type(error).__name__
