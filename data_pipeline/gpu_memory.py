"""Estimate of the memory that a loader takes on a GPU, beside torch's."""

from contextlib import suppress
from math import prod

import numpy as np

from data_pipeline.loader import Loader
from data_pipeline.sources.image_headers import BadImage, inspect

_SAMPLES = 32  # images whose sizes stand for those of all
_DECODER_BYTES = 512 << 20  # that nvJPEG works in; a guess, as nobody has measured it here


def gpu_bytes(loader: Loader) -> int:
    """Estimate the bytes on a GPU of a loader's largest batches in flight, decoded and cut; 0 on a CPU. Reads a few images."""
    if loader.rank_info.device.type != "cuda":
        return 0
    decoded = 0.0 if loader.cfg.decode == "cpu" else _mean_pixels(loader)
    most = max(rows * (decoded + size_px * size_px) for rows, size_px in loader.shapes())
    return _DECODER_BYTES + round(3 * most * (loader.cfg.prefetch + 1))


def _mean_pixels(loader: Loader) -> float:
    """Mean of the pixels of images from all parts of the catalog."""
    sizes = []
    for sample in np.linspace(0, len(loader.catalog) - 1, _SAMPLES).astype(int).tolist():
        with suppress(BadImage, OSError):
            sizes.append(prod(inspect(loader.catalog.read(sample))))
    return float(np.mean(sizes or [0]))
