"""Changes that a whole optimizer step has in common, on the training device: mixup and cutmix between neighbours, and ColOut.

Row 2i of a batch is mixed with row 2i + 1, and 2i + 1 with 2i. The ranks get whole pairs, and one draw serves a whole
optimizer step: so neither the number of ranks nor that of micro-batches changes a pixel.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import on_device
from data_pipeline.config import AugmentConfig
from data_pipeline.sampling import COLOUT, MIX, philox


class Mixing(NamedTuple):
    """Random draw of an optimizer step: all of its images are mixed in this way."""

    cut: bool
    """True for cutmix, False for mixup."""
    share: float
    """Lambda: share of itself that an image keeps, in 0..1; cutmix then rounds it to whole pixels."""
    y: float
    x: float
    """Centre of the rectangle that cutmix swaps, as a share of the image's height and width, in 0..1."""


def draw(seed: int, epoch: int, start: int, cfg: AugmentConfig) -> Mixing | None:
    """Draw the mixing of the optimizer step that begins at position `start`, as `cfg` switches on; None for no mixing."""
    generator = np.random.Generator(philox(seed, MIX, epoch, start))
    either, y, x = generator.random(3)
    cut = cfg.cutmix > 0 and (cfg.mixup == 0 or either < cfg.cutmix_chance)
    alpha = cfg.cutmix if cut else cfg.mixup
    share = generator.beta(alpha, alpha)
    return Mixing(cut, share, y, x) if generator.random() < cfg.mix_chance else None


def mix(images: Tensor, labels: Tensor, own: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each even row with the odd one behind it, and the other way round, except pairs with a row that does not count.

    `images` [B, H, W, 3] uint8, B even; `labels` [B] int64, negative where a row does not count; `own` [B, classes] float32,
    the classes of each image, all zero where it does not count.
    Returns images, uint8 as swapped by cutmix (Yun et al. 2019, arXiv 1905.04899) or float32 as blended by mixup (Zhang et
    al. 2018, arXiv 1710.09412); the class of the largest share [B] int64, negative as before; and the share of each class
    [B, classes] float32, all zero where a row does not count.
    """
    # A pair with padding, or with an image that could not be read, stays as it is.
    paired = (labels.view(-1, 2) >= 0).all(dim=1).repeat_interleave(2)
    height, width = images.shape[1:3]
    # cutmix: swap a rectangle. The share is what the clipped rectangle leaves, so labels match pixels exactly.
    if mixing.cut:
        top, left, bottom, right = box(mixing, height, width)
        share = 1 - (bottom - top) * (right - left) / (height * width)
        window = images[:, top:bottom, left:right]
        images = images.clone()
        images[:, top:bottom, left:right] = torch.where(_per_image(paired), _partner(window), window)
    # mixup: blend in place, in float32. One difference serves both rows of a pair.
    else:
        share = mixing.share
        images = images.float()  # a copy, changed in place below
        even, odd = images.unflatten(0, (-1, 2)).unbind(dim=1)
        moved = (odd - even) * _per_image(paired[::2] * (1 - share))
        even += moved
        odd -= moved
    # Labels follow the pixels.
    targets = torch.lerp(own, _partner(own), (paired * (1 - share))[:, None])
    return images, torch.where(labels >= 0, targets.argmax(dim=1), labels), targets


def box(mixing: Mixing, height: int, width: int) -> tuple[int, int, int, int]:
    """Compute top, left, bottom, right in pixels of a rectangle of 1 - share of the area, clipped to the image."""
    half = 0.5 * math.sqrt(1 - mixing.share)
    y, x = int(mixing.y * height), int(mixing.x * width)
    half_height, half_width = int(half * height), int(half * width)
    return max(y - half_height, 0), max(x - half_width, 0), min(y + half_height, height), min(x + half_width, width)


def thin_out(images: Tensor, seed: int, epoch: int, start: int, side_px: int) -> Tensor:
    """Leave rows and columns of `images` [B, S, S, 3] out, the same in all of the step, so that [B, side_px, side_px, 3] remain.

    Which ones follows from the position `start` where the step begins (Composer's ColOut, for batches).
    """
    generator = np.random.Generator(philox(seed, COLOUT, epoch, start))
    for axis in (1, 2):
        kept = np.sort(generator.permutation(images.shape[axis])[:side_px])
        images = images.index_select(axis, on_device(kept, images.device))
    return images


def _partner(rows: Tensor) -> Tensor:
    """Exchange the two rows of each pair: [B, ...]."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
