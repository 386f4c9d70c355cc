"""Random changes of an image of its final size: a policy, colour jitter, random erasing, in this order.

Each is an `Operator`: its draws, made in NumPy by position (see `sampling`), and the DALI operators that apply them. One
that is switched off does not exist.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.auto_aug.auto_augment import get_reduced_image_net_policy
from nvidia.dali.auto_aug.core import augmentation, select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

from data_pipeline.config import AugmentConfig, DataConfig

BINS = 31  # magnitudes of RandAugment and TrivialAugment
_FILL = 128  # grey level where a policy's operation moves the image out of the frame
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as PIL converts to grey

ERASE_TRIES = 8
_ERASE_AREA, _ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)  # torchvision's RandomErasing
# Columns of the table of draws, 32 wide.
_POLICY, _JITTER, _ERASE = slice(0, 8), slice(8, 12), slice(12, 15 + 2 * ERASE_TRIES)

Uniforms = NDArray[np.float64]
Draws = NDArray[Any]


class Operator(NamedTuple):
    """One random change of the images of a batch of B."""

    draw: Callable[[Uniforms, int], Draws]
    """(numbers in [0, 1) [B, 32], side of the images in pixels) -> draws for `apply`, [B, ...]."""
    apply: Callable[[DataNode, DataNode, int], DataNode]
    """(images uint8 RGB HWC, the draws, side of the images in pixels) -> images; within a pipeline with conditionals."""


def operators(cfg: DataConfig) -> list[Operator]:
    """Return the changes that are switched on, in their order."""
    augment = cfg.augment
    wanted = {
        _policy: augment.policy != "none",
        _color_jitter: any(augment.color_jitter),
        _erasing: augment.erase > 0,
    }
    return [operator(cfg) for operator, on in wanted.items() if on]


# ---- policies -------------------------------------------------------------------------------------------------------


class Stages(NamedTuple):
    """A policy of S stages: in each stage, each image goes through one augmentation of that stage's list."""

    choices: list[list[Any]]
    """`nvidia.dali.auto_aug` augmentations of each stage."""
    bins: int
    """Magnitudes that the range of each augmentation is divided into."""
    draw: Callable[[Uniforms], NDArray[np.int32]]
    """[B, 8] numbers -> [B, S, 3]: index of the augmentation, bin of its magnitude, 1 for a negative sign."""


def stages_of(cfg: AugmentConfig) -> Stages:
    """Look up the policy `cfg.policy`, with DALI's ranges of magnitudes."""
    match cfg.policy:
        case "randaugment":
            return _rand_augment(cfg)
        case "trivialaugment":
            return _trivial_augment()
        case "threeaugment":
            return _three_augment()
    return _auto_augment()


def _rand_augment(cfg: AugmentConfig) -> Stages:
    """Cubuk et al. 2020, arXiv 1909.13719: `n` of 14 operations, each of magnitude `m`, or near it, or left out."""
    suite, n = get_rand_augment_suite(use_shape=True), cfg.randaugment_n
    still = suite.index(augmentations.identity)

    def draw(u: Uniforms) -> NDArray[np.int32]:
        choice, sign = u[:, :n] * len(suite), u[:, n : 2 * n]
        # What an index and a sign leave of their numbers is random too: the chance, and two for the normal distribution
        # (Box and Muller 1958).
        rest, other = choice % 1, 2 * sign % 1
        applied = rest < cfg.randaugment_chance
        noise = np.sqrt(-2 * np.log1p(-other)) * np.cos(2 * np.pi * rest / max(cfg.randaugment_chance, 1e-9))
        magnitude = np.clip(np.rint(cfg.randaugment_m + cfg.randaugment_std * noise), 0, BINS - 1)
        return _signed(np.where(applied, choice, still), magnitude, sign)

    return Stages([suite] * n, BINS, draw)


@augmentation
def _grey(images: DataNode, _: None) -> DataNode:
    return fn.color_twist(images, saturation=0)


@augmentation(mag_range=(0.1, 2.0))
def _blur(images: DataNode, sigma: DataNode) -> DataNode:
    return fn.gaussian_blur(images, sigma=sigma)


def _three_augment() -> Stages:
    """Touvron et al. 2022, arXiv 2204.07118, section 3.2: grey, solarised from level 128 on, or blurred by 0.1 to 2 pixels."""
    suite = [_grey, augmentations.solarize.augmentation(mag_range=(128, 128)), _blur]

    def draw(u: Uniforms) -> NDArray[np.int32]:
        return _signed(u[:, 0:1] * len(suite), u[:, 1:2] * BINS, u[:, 2:3])

    return Stages([suite], BINS, draw)


def _trivial_augment() -> Stages:
    """Müller and Hutter 2021, arXiv 2103.10158: one of 14 operations, of any magnitude in a wide range."""
    suite = get_trivial_augment_wide_suite(use_shape=True, max_translate_rel=32 / 224)  # 32 of 224 pixels in the paper

    def draw(u: Uniforms) -> NDArray[np.int32]:
        return _signed(u[:, 0:1] * len(suite), u[:, 1:2] * BINS, u[:, 2:3])

    return Stages([suite], BINS, draw)


def _auto_augment() -> Stages:
    """Cubuk et al. 2019, arXiv 1805.09501, table 9: one of 25 pairs of operations, each with its own chance to run.

    DALI has it under the name of the reduced ImageNet that it was found on; torchvision uses it for ImageNet too.
    """
    policy = get_reduced_image_net_policy()
    skip = (augmentations.identity, 0.0, None)
    pairs = [(*pair, skip)[:2] for pair in policy.sub_policies]
    choices = [list(dict.fromkeys([skip[0], *(pair[stage][0] for pair in pairs)])) for stage in (0, 1)]
    index = np.array([[choices[stage].index(pair[stage][0]) for stage in (0, 1)] for pair in pairs])
    chance = np.array([[chance for _, chance, _ in pair] for pair in pairs])
    magnitude = np.array([[bin or 0 for _, _, bin in pair] for pair in pairs])

    def draw(u: Uniforms) -> NDArray[np.int32]:
        pair = (u[:, 0] * len(pairs)).astype(int)
        return _signed(np.where(u[:, 1:3] < chance[pair], index[pair], 0), magnitude[pair], u[:, 3:5])

    return Stages(choices, policy.num_magnitude_bins, draw)


def _signed(index: Draws, bin: Draws, u: Uniforms) -> NDArray[np.int32]:
    """Stack three [B, S] into [B, S, 3]: whole part of an index and of a bin, and an even chance to be negative."""
    return np.stack([index, bin, u < 0.5], axis=-1).astype(np.int32)


def _policy(cfg: DataConfig) -> Operator:
    stages = stages_of(cfg.augment)
    # They contain no conditionals. DALI would rewrite them for conditionals and run them twenty times as slowly.
    calls = [[do_not_convert(choice.__call__) for choice in choices] for choices in stages.choices]

    def apply(images: DataNode, draws: DataNode, size_px: int) -> DataNode:
        # DALI's augmentations call two of its operators by deprecated names; it warns of that in spite of all filters.
        with warnings.catch_warnings(record=True):
            for stage, choices in enumerate(calls):
                images = select(
                    choices,
                    draws[stage, 0],
                    data=images,
                    magnitude_bin=signed_bin(draws[stage, 1], draws[stage, 2]),
                    num_magnitude_bins=stages.bins,
                    fill_value=_FILL,
                    # Nearest neighbour as in the graph's `rotate`: linear makes a policy cost 1.5 to 2.5 times as much on a CPU.
                    interp_type=types.INTERP_NN,
                    shape=(size_px, size_px),
                )
        return images

    return Operator(lambda u, size_px: stages.draw(u[:, _POLICY]), apply)


# ---- colour ---------------------------------------------------------------------------------------------------------


def _color_jitter(cfg: DataConfig) -> Operator:
    """torchvision's ColorJitter: brightness and contrast, then saturation and hue.

    Its random order is left out: except for clipping, all but the hue commute. The hue turns about the grey axis, which
    keeps the luma; torchvision goes through HSV, which does not.
    """
    strength = np.array(cfg.augment.color_jitter)
    low, high = np.maximum(1 - strength, 0), 1 + strength
    low[3], high[3] = -360 * strength[3], 360 * strength[3]  # DALI counts degrees
    light, hue = bool(strength[:2].any()), bool(strength[2:].any())

    def draw(u: Uniforms, size_px: int) -> Draws:
        return (low + (high - low) * u[:, _JITTER]).astype(np.float32)

    def apply(images: DataNode, draws: DataNode, size_px: int) -> DataNode:
        if light:
            grey = fn.reductions.sum(fn.reductions.mean(images, axes=[0, 1]) * types.Constant(_LUMA), axes=[0])
            images = fn.brightness_contrast(images, brightness=draws[0], contrast=draws[1], contrast_center=grey.cpu())
        if hue:
            images = fn.color_twist(images, saturation=draws[2], hue=draws[3])
        return images

    return Operator(draw, apply)


# ---- erasing --------------------------------------------------------------------------------------------------------


def _erasing(cfg: DataConfig) -> Operator:
    """Random erasing (Zhong et al. 2017, arXiv 1708.04896) to the mean colour, which normalisation makes zero."""
    colour = [round(255 * mean) for mean in cfg.mean]

    def draw(u: Uniforms, size_px: int) -> Draws:
        return erased_boxes(u[:, _ERASE], size_px, cfg.augment.erase)

    def apply(images: DataNode, draws: DataNode, size_px: int) -> DataNode:
        return fn.erase(images, anchor=draws[0:2], shape=draws[2:4], axes=[0, 1], fill_value=colour)

    return Operator(draw, apply)


def erased_boxes(u: Uniforms, size_px: int, chance: float) -> NDArray[np.float32]:
    """Compute [B, 4] top, left, height, width in pixels of the erased rectangles; 0, 0, 0, 0 for none.

    `u` [B, 19]: chance, place, then eight pairs of area and ratio; the first pair that fits into the image counts.
    """
    (smallest, largest), (narrowest, widest) = _ERASE_AREA, np.log(_ERASE_RATIO)
    area = size_px * size_px * (smallest + (largest - smallest) * u[:, 3::2])
    ratio = np.exp(narrowest + (widest - narrowest) * u[:, 4::2])
    height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (height < size_px) & (width < size_px)
    pick = fits.argmax(axis=1)[:, None]
    shape = np.hstack([np.take_along_axis(side, pick, axis=1) for side in (height, width)])
    corner = np.floor(u[:, 1:3] * (size_px - shape + 1))
    erased = (u[:, 0] < chance) & fits.any(axis=1)
    return np.where(erased[:, None], np.hstack([corner, shape]), 0).astype(np.float32)
