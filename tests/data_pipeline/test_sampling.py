"""Order, draws and windows, against torchvision and a hand-written reference."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize  # type: ignore[import-untyped]

from data_pipeline.config import AugmentConfig, Balance
from data_pipeline.sampling import (
    CROP_TRIES,
    balanced,
    centre_geometry,
    epoch_order,
    order,
    quotas,
    training_geometry,
    uniforms,
)

SZEGEDY = AugmentConfig(min_area=0.08)


def positions(*arguments: int) -> NDArray[np.int64]:
    return np.arange(*arguments, dtype=np.int64)


# Order


@pytest.mark.parametrize("count", [1, 2, 997])
def test_order_is_a_permutation(count: int) -> None:
    assert sorted(order(0, 0, count).tolist()) == list(range(count))


def test_order_repeats_and_differs_between_epochs_and_seeds() -> None:
    seen = {order(seed, epoch, 100).tobytes() for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 1000)}
    assert len(seen) == 9
    assert np.array_equal(order(7, 3, 100), order(7, 3, 100))


def test_the_streams_are_those_of_earlier_versions() -> None:
    """Resumed runs and published results depend on them."""
    assert order(0, 0, 10).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert order(1, 2, 10).tolist() == [2, 5, 7, 9, 8, 1, 0, 3, 4, 6]
    first, last = uniforms(0, 0, positions(1))[0], uniforms(1, 2, positions(1000, 1001))[0]
    assert first[[0, 1, 31]].tolist() == [0.8133540609793564, 0.7513314251083365, 0.034222273524666336]
    assert last[[0, 1, 31]].tolist() == [0.632841366654493, 0.768747247260959, 0.29833033223094796]


# Balance

LONG_TAIL = np.array([1, 4, 0, 25, 100])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), LONG_TAIL))


@pytest.mark.parametrize(
    ("balance", "wanted"),
    [("none", [1, 4, 0, 25, 100]), ("sqrt", [7, 15, 0, 36, 72]), ("uniform", [33, 33, 0, 32, 32])],
)
def test_quotas_are_of_the_square_root_or_equal(balance: Balance, wanted: list[int]) -> None:
    """By hand: of 130 images the roots 1, 2, 5, 10 of 18 are 7.2, 14.4, 36.1, 72.2; the largest remainder is the second's."""
    assert quotas(LONG_TAIL, balance).tolist() == wanted


@pytest.mark.parametrize("balance", ["sqrt", "uniform"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_takes_of_each_class_its_quota(balance: Balance, repeats: int) -> None:
    """With repeats, of that many epochs together: each of the images chosen so many times."""
    rounds = [
        np.concatenate([epoch_order(3, epoch, LABELS, repeats, balance) for epoch in range(first, first + repeats)])
        for first in (0, 5 * repeats)
    ]
    for found in rounds:
        assert np.bincount(LABELS[found], minlength=5).tolist() == (repeats * quotas(LONG_TAIL, balance)).tolist()
    assert not np.array_equal(rounds[0], rounds[1])
    by_shards = epoch_order(3, 0, LABELS, repeats, balance, np.arange(len(LABELS)) % 5, 2)
    assert len(set((by_shards[: len(LABELS) // 6] % 5).tolist())) <= 2
    assert np.array_equal(epoch_order(3, 0, LABELS, 1, "none"), order(3, 0, len(LABELS)))


@pytest.mark.parametrize("balance", ["sqrt", "uniform"])
def test_the_images_of_a_class_come_equally_often(balance: Balance) -> None:
    times = np.zeros(len(LABELS), np.int64)
    for epoch in range(20):
        times += np.bincount(balanced(7, epoch, LABELS, balance), minlength=len(LABELS))
        for label in np.flatnonzero(LONG_TAIL):
            assert np.ptp(times[label == LABELS]) <= 1, (epoch, label)


def test_the_choice_is_that_of_earlier_versions() -> None:
    assert balanced(1, 2, np.array([0, 0, 0, 0, 0, 1, 1, 2]), "uniform").tolist() == [3, 4, 2, 6, 5, 6, 7, 7]


@pytest.mark.parametrize("window", [1, 3, 4, 100])
@pytest.mark.parametrize("repeats", [1, 2])
def test_shards_come_in_random_order_a_window_at_a_time(window: int, repeats: int) -> None:
    shards = np.repeat(np.arange(10), 7)
    epochs = [order(5, epoch, len(shards), repeats, shards, window) for epoch in range(2 * repeats)]
    whole = np.concatenate(epochs[:repeats])
    assert sorted(whole.tolist()) == sorted(list(range(len(shards))) * repeats)
    assert np.array_equal(epochs[1], order(5, 1, len(shards), repeats, shards, window))
    assert not np.array_equal(epochs[-1], epochs[repeats - 1])
    if repeats == 1:
        parts = [shards[whole[at : at + 7 * window]] for at in range(0, len(whole), 7 * window)]
        assert sum(len(set(part.tolist())) for part in parts) == 10  # each shard lies in one window
        assert window == 1 or any(part.tolist() != sorted(part.tolist()) for part in parts)


# Uniform numbers


@pytest.mark.parametrize("start", [0, 1, 63, 300])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_block_is_a_slice_of_the_table(start: int, world: int) -> None:
    table = uniforms(5, 2, positions(512))
    for rank in range(world):
        rows = positions(start + rank, 512, world)
        assert np.array_equal(uniforms(5, 2, rows), table[rows])


def test_uniforms_are_uniform_and_unrelated() -> None:
    table = np.concatenate([uniforms(seed, epoch, positions(2000)) for seed in (0, 1) for epoch in (0, 1)])
    assert table.shape == (8000, 32)
    assert table.min() >= 0 and table.max() < 1
    assert np.abs(table.mean(axis=0) - 1 / 2).max() < 5 / math.sqrt(12 * len(table))
    assert np.abs(table.var(axis=0) - 1 / 12).max() < 0.005
    assert np.abs(np.corrcoef(table, rowvar=False) - np.eye(32)).max() < 5 / math.sqrt(len(table))
    assert np.unique(table).size == table.size


# Training windows


def scalar_window(u: Sequence[float], size: Sequence[int], cfg: AugmentConfig) -> tuple[int, int, int, int]:
    """Top, left, height and width as torchvision's get_params computes them, fed with `u`."""
    height, width = size
    for attempt in range(CROP_TRIES):
        area = height * width * (cfg.min_area + (cfg.max_area - cfg.min_area) * u[2 * attempt])
        low, high = math.log(1 / cfg.max_ratio), math.log(cfg.max_ratio)
        ratio = math.exp(low + (high - low) * u[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[22] * (height - h + 1)), int(u[23] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 1 / cfg.max_ratio:
        h = round(width * cfg.max_ratio)
    elif width / height > cfg.max_ratio:
        w = round(height * cfg.max_ratio)
    return (height - h) // 2, (width - w) // 2, h, w


def various_sizes(count: int) -> NDArray[np.int32]:
    """Height and width, from one pixel to thousands, up to a hundred times as long as wide."""
    draw = np.random.default_rng(1)
    short = np.exp(draw.uniform(0, math.log(1500), count))
    pairs = np.stack([short, short * np.exp(draw.uniform(0, math.log(100), count))], axis=1).astype(np.int32)
    return np.where(draw.random((count, 1)) < 0.5, pairs, pairs[:, ::-1])


@pytest.mark.parametrize(
    "cfg",
    [
        SZEGEDY,
        AugmentConfig(),
        AugmentConfig(min_area=1, max_ratio=1),
        AugmentConfig(min_area=0.9, max_ratio=2),
        AugmentConfig(min_area=0.001, max_area=0.01),
    ],
)
def test_windows_equal_the_scalar_algorithm_and_lie_inside(cfg: AugmentConfig) -> None:
    sizes = various_sizes(3000)
    u = uniforms(3, 1, positions(len(sizes)))
    top, left, bottom, right = training_geometry(u, sizes, cfg).roi.astype(int).T
    left, right = np.minimum(left, right), np.maximum(left, right)
    expected = [scalar_window(row, size, cfg) for row, size in zip(u.tolist(), sizes.tolist(), strict=True)]
    assert np.array_equal(np.stack([top, left, bottom - top, right - left], axis=1), expected)
    assert (top >= 0).all() and (top < bottom).all() and (bottom <= sizes[:, 0]).all()
    assert (left >= 0).all() and (left < right).all() and (right <= sizes[:, 1]).all()


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (30, 70), (71, 30), (1, 3)])
def test_the_fallback_is_torchvisions(size: tuple[int, int]) -> None:
    """No window of an allowed ratio has the whole area of so long an image, so both fall back."""
    whole = AugmentConfig(min_area=1, flip=0)
    top, left, bottom, right = training_geometry(uniforms(0, 0, positions(1)), np.array([size], np.int32), whole).roi[0]
    theirs = RandomResizedCrop.get_params(torch.empty(3, *size), [1.0, 1.0], [3 / 4, 4 / 3])
    assert (top, left, bottom - top, right - left) == tuple(theirs)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (200, 900)])
def test_windows_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    count = 4000
    ours = training_geometry(uniforms(0, 0, positions(count)), np.tile(np.array([size], np.int32), (count, 1)), SZEGEDY)
    top, left, bottom, right = ours.roi.astype(np.float64).T
    left, right = np.minimum(left, right), np.maximum(left, right)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    params = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    their_top, their_left, their_h, their_w = np.array(params, np.float64).T
    height, width = size
    for mine, theirs in (
        ((bottom - top) * (right - left) / (height * width), their_h * their_w / (height * width)),
        (np.log((right - left) / (bottom - top)), np.log(their_w / their_h)),
        ((top + bottom) / height, (2 * their_top + their_h) / height),
        ((left + right) / width, (2 * their_left + their_w) / width),
    ):
        # Two-sample Kolmogorov-Smirnov: this distance is passed by chance once in a million.
        grid = np.sort(np.concatenate([mine, theirs]))
        steps = [np.searchsorted(np.sort(sample), grid, side="right") / count for sample in (mine, theirs)]
        assert np.abs(steps[0] - steps[1]).max() < 2.69 * math.sqrt(2 / count)


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_flips_come_at_their_rate(flip: float) -> None:
    count = 10_000
    sizes = np.full((count, 2), 64, np.int32)
    u = uniforms(0, 0, positions(count))
    roi = training_geometry(u, sizes, AugmentConfig(flip=flip)).roi
    mirrored = roi[:, 1] > roi[:, 3]
    assert mirrored.mean() == pytest.approx(flip, abs=0.02 if 0 < flip < 1 else 0)
    unflipped = training_geometry(u, sizes, AugmentConfig(flip=0)).roi
    assert np.array_equal(np.where(mirrored[:, None], roi[:, [0, 3, 2, 1]], roi), unflipped)


def test_angles_fill_their_range() -> None:
    u = uniforms(0, 0, positions(10_000))
    angle = training_geometry(u, np.full((len(u), 2), 64, np.int32), AugmentConfig(rotate_deg=15)).angle_deg
    assert angle.dtype == np.float32
    assert np.quantile(angle, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([-15, -7.5, 0, 7.5, 15], abs=0.5)


# The centre


@pytest.mark.parametrize("size_px", [32, 63, 64, 224])
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
def test_centre_is_torchvisions(size_px: int, crop: float) -> None:
    """A ramp that is resized and cropped by torchvision shows where its window lies in the source."""
    sizes = np.array([(375, 500), (500, 333), (64, 64), (97, 301), (1200, 71)], np.int32)
    geometry = centre_geometry(sizes, size_px, crop)
    assert not geometry.angle_deg.any()
    for (height, width), (top, left, bottom, right) in zip(sizes.tolist(), geometry.roi.tolist(), strict=True):
        resized = Resize(round(size_px / crop))(Image.new("L", (width, height)))
        marks = torch.arange(resized.height)[:, None] * 10_000 + torch.arange(resized.width)
        window = CenterCrop(size_px)(marks[None])[0]
        first, last = int(window[0, 0]), int(window[-1, -1]) + 10_001
        scale_y, scale_x = height / resized.height, width / resized.width
        theirs = [
            first // 10_000 * scale_y,
            first % 10_000 * scale_x,
            last // 10_000 * scale_y,
            last % 10_000 * scale_x,
        ]
        assert [top, left, bottom, right] == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        assert 0 <= top < bottom <= height * (1 + 1e-6) and 0 <= left < right <= width * (1 + 1e-6)
