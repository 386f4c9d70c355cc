"""The order of an epoch and every random number in it, as pure functions of (seed, epoch, position).

`position` counts an epoch's images in the order they are read, over all ranks. Nothing here keeps state, so an epoch
resumes at any position and at any number of ranks with the same draws. Philox is a counter-based generator (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): jumping to a position costs nothing.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import AugmentConfig, Balance

ORDER, AUGMENT, WEIGHTS, LOOK, MIX, CHOICE, DEPTH, COLOUT = range(
    8
)  # streams of random numbers; WEIGHTS and DEPTH are the trainer's

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
RIM_PX = 4  # mirrored around an image before a simple crop
_WIDTH = 32  # numbers reserved for one image; a multiple of 4, as one Philox counter yields four
_FLIP, _ANGLE, _TOP, _LEFT, _VERTICAL_FLIP = range(2 * CROP_TRIES, 2 * CROP_TRIES + 5)
_APART = 3  # images whose repeats alternate; odd, so that mixing pairs an image with others each time


class Geometry(NamedTuple):
    """Window, flips and rotation of each image of a batch of B."""

    roi: NDArray[np.float32]
    """[B, 4] window in source pixels: top, left, bottom, right; left > right mirrors the image, top > bottom turns it
    upside down."""
    angle_deg: NDArray[np.float32]
    """[B] counter-clockwise rotation after the resize."""
    shift_px: NDArray[np.int32] | None = None
    """[B, 2] pixels by which the crop lies below and to the right of that window, in ± RIM_PX; what is outside of the image
    mirrors it. None where no crop reaches outside."""


def philox(seed: int, stream: int, epoch: int, position: int = 0) -> np.random.Philox:
    """Make a generator whose numbers follow from these four alone."""
    return np.random.Philox(key=[seed, stream], counter=[0, 0, position, epoch])


def order(
    seed: int, epoch: int, count: int, repeats: int = 1, shards: NDArray[np.int64] | None = None, window: int = 1
) -> NDArray[np.int64]:
    """Draw [count] sample indices in the order in which the epoch reads them.

    With `shards` [count], the shard of each sample, these come in random order, and the samples of `window` shards at a time
    are mixed; otherwise all are mixed.

    With `repeats` (Hoffer et al. 2020, arXiv 1901.09335) each index stands there so many times, close together. One
    permutation serves `repeats` epochs, and each reads its share: a b c a b c d e f d e f ... where `repeats` is 2.
    """
    draw = np.random.Generator(philox(seed, ORDER, epoch // repeats))
    permutation = draw.permutation(count) if shards is None else _by_windows(draw, shards, window)
    if repeats == 1:
        return permutation
    positions = epoch % repeats * count + np.arange(count)  # in the order of all `repeats` epochs
    first = positions // (_APART * repeats) * _APART
    return permutation[first + positions % (_APART * repeats) % np.minimum(_APART, count - first)]


def epoch_order(
    seed: int,
    epoch: int,
    labels: NDArray[np.int64],
    repeats: int = 1,
    balance: Balance = "none",
    shards: NDArray[np.int64] | None = None,
    window: int = 1,
) -> NDArray[np.int64]:
    """Draw [N] sample indices in the order in which the epoch reads them, of N samples with these labels, in these shards."""
    if balance == "none":
        return order(seed, epoch, len(labels), repeats, shards, window)
    chosen = balanced(seed, epoch // repeats, labels, balance)
    return chosen[order(seed, epoch, len(labels), repeats, None if shards is None else shards[chosen], window)]


def quotas(counts: NDArray[np.int64], balance: Balance) -> NDArray[np.int64]:
    """Share an epoch of as many images as there are out over classes of so many images: [C], at least 1 of each class."""
    if balance == "none":
        return counts
    shares = np.sqrt(counts) if balance == "sqrt" else (counts > 0).astype(np.float64)
    exact = counts.sum() * shares / shares.sum()
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: counts.sum() - whole.sum()]] += 1  # the largest remainders
    return whole


def balanced(seed: int, epoch: int, labels: NDArray[np.int64], balance: Balance) -> NDArray[np.int64]:
    """Choose [N] the samples of an epoch, class by class, as often as `quotas` says.

    Each class has an endless row of permutations of its images, and every epoch takes the next piece of it. So at any time
    the images of a class have come equally often, but for one.
    """
    counts = np.bincount(labels)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    pieces = zip(members, quotas(counts, balance).tolist(), strict=True)
    return np.concatenate([_piece(seed, label, its, epoch * n, n) for label, (its, n) in enumerate(pieces)])


def _piece(seed: int, label: int, members: NDArray[np.int64], start: int, count: int) -> NDArray[np.int64]:
    """Take `count` of a class's endless row of permutations of its images, from `start` on."""
    if count == 0:
        return members[:0]
    first, last, width = start // len(members), (start + count - 1) // len(members), -(-len(members) // 4)
    bits = philox(seed, CHOICE, 0, label).advance(first * width)
    draws = np.random.Generator(bits).random((last - first + 1, 4 * width))[:, : len(members)]
    row = members[draws.argsort(axis=1, kind="stable")].ravel()
    return row[start - first * len(members) :][:count]


def _by_windows(draw: np.random.Generator, shards: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    turns = draw.permutation(int(shards.max(initial=0)) + 1)[shards]
    return np.lexsort((draw.random(len(shards)), turns // window))


def uniforms(
    seed: int, epoch: int, positions: NDArray[np.int64], stream: int = AUGMENT, width: int = _WIDTH
) -> NDArray[np.float64]:
    """Draw [B, width] numbers in [0, 1): row i belongs to `positions[i]` alone.

    Positions must ascend, and `width` be a multiple of 4.
    """
    first, last = int(positions[0]), int(positions[-1])
    bits = philox(seed, stream, epoch).advance(first * width // 4)
    table = np.random.Generator(bits).random((last - first + 1, width))
    return table[positions - first]


def training_geometry(u: NDArray[np.float64], sizes: NDArray[np.int32], cfg: AugmentConfig) -> Geometry:
    """Random resized crop (Szegedy et al. 2014, sec. 6, with torchvision's ten tries), flips and rotation.

    `u` [B, 32] from `uniforms`; `sizes` [B, 2] height and width of the sources in pixels.
    """
    # Try ten windows of random area and ratio; the first that fits into the image counts.
    height, width = sizes[:, 0:1].astype(np.float64), sizes[:, 1:2].astype(np.float64)
    area = height * width * (cfg.min_area + (cfg.max_area - cfg.min_area) * u[:, 0 : 2 * CROP_TRIES : 2])
    ratio = np.exp(np.log(cfg.max_ratio) * (2 * u[:, 1 : 2 * CROP_TRIES : 2] - 1))
    crop_w, crop_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (crop_w > 0) & (crop_w <= width) & (crop_h > 0) & (crop_h <= height)
    pick = fits.argmax(axis=1)[:, None]
    found = np.take_along_axis(fits, pick, axis=1)
    # Where no try fits, take the largest centred window of an allowed ratio.
    widest, highest = (
        np.minimum(width, np.rint(height * cfg.max_ratio)),
        np.minimum(height, np.rint(width * cfg.max_ratio)),
    )
    w = np.where(found, np.take_along_axis(crop_w, pick, axis=1), widest)
    h = np.where(found, np.take_along_axis(crop_h, pick, axis=1), highest)
    # Place it anywhere; the centred one stays.
    top = np.where(found, np.floor(u[:, _TOP, None] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(u[:, _LEFT, None] * (width - w + 1)), (width - w) // 2)
    return _flipped(u, top, left, h, w, cfg)


def simple_geometry(u: NDArray[np.float64], sizes: NDArray[np.int32], size_px: int, cfg: AugmentConfig) -> Geometry:
    """Crop as torchvision's Resize(size_px) and RandomCrop(size_px, padding=4, padding_mode="reflect") do; flips and rotation.

    `u` [B, 32] from `uniforms`; `sizes` [B, 2] height and width of the sources in pixels.
    """
    sources = sizes.astype(np.float64)
    resized = np.floor(
        size_px * sources / sources.min(axis=1, keepdims=True)
    )  # cut to whole pixels as torchvision does
    corner = np.floor(u[:, [_TOP, _LEFT]] * (resized + 2 * RIM_PX - size_px + 1)) - RIM_PX
    start = np.clip(corner, 0, resized - size_px)
    scale = sources / resized
    (top, left), (h, w) = np.split(start * scale, 2, axis=1), np.split(size_px * scale, 2, axis=1)
    geometry = _flipped(u, top, left, h, w, cfg)
    shift = np.where(geometry.roi[:, :2] > geometry.roi[:, 2:], start - corner, corner - start)
    return geometry._replace(shift_px=shift.astype(np.int32))


def _flipped(
    u: NDArray[np.float64],
    top: NDArray[np.float64],
    left: NDArray[np.float64],
    h: NDArray[np.float64],
    w: NDArray[np.float64],
    cfg: AugmentConfig,
) -> Geometry:
    """Draw flips and rotation of windows, all [B, 1]; a flip exchanges two edges."""
    mirrored, upturned = u[:, _FLIP, None] < cfg.flip, u[:, _VERTICAL_FLIP, None] < cfg.vertical_flip
    roi = np.hstack([top + upturned * h, left + mirrored * w, top + ~upturned * h, left + ~mirrored * w])
    angle = cfg.rotate_deg * (2 * u[:, _ANGLE] - 1)
    return Geometry(roi.astype(np.float32), angle.astype(np.float32))


def centre_geometry(sizes: NDArray[np.int32], size_px: int, crop: float) -> Geometry:
    """Compute torchvision's Resize(size_px / crop) and CenterCrop(size_px), as one window in each source. `sizes` [B, 2]."""
    sources, short = sizes.astype(np.float64), round(size_px / crop)
    resized = np.floor(short * sources / sources.min(axis=1, keepdims=True))  # cut to whole pixels as torchvision does
    start = np.rint((resized - size_px) / 2)
    scale = sources / resized
    roi = np.hstack([start * scale, (start + size_px) * scale])
    return Geometry(roi.astype(np.float32), np.zeros(len(sizes), np.float32))
