"""Sharding: cases worked out by hand, and every image once whatever the numbers are."""

from itertools import product

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.sharding import (
    check_batch,
    micro_batches,
    positions_of_rank,
    shard_batch,
    steps_per_epoch,
)

NUMBERS = list(product([1, 2, 3, 4], [1, 2, 3], [False, True]))
"""World sizes, micro-batches a step, whether images are read in pairs."""


@pytest.mark.parametrize(
    ("world", "micro", "pairs", "positions"),
    [
        (1, 1, False, [[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]]),
        (2, 1, False, [[[0, 2, 4, 6, 8, 10]], [[1, 3, 5, 7, 9, 11]]]),
        (2, 1, True, [[[0, 1, 4, 5, 8, 9]], [[2, 3, 6, 7, 10, 11]]]),
        (1, 2, True, [[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]]),
        (2, 3, False, [[[0, 2], [4, 6], [8, 10]], [[1, 3], [5, 7], [9, 11]]]),
        (3, 2, True, [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]),
    ],
)
def test_a_step_of_twelve_images(world: int, micro: int, pairs: bool, positions: list[list[list[int]]]) -> None:
    """Positions of each rank in each micro-batch, in the first step and in the one behind it."""
    for rank in range(world):
        sharding = shard_batch(12, rank, world, micro_batches=micro, pairs=pairs)
        assert (sharding.rows, sharding.micro_batch, sharding.step) == (12 // world // micro, 12 // micro, 12)
        for first in (0, 12):
            found = list(micro_batches(sharding, first, first + 12))
            assert [one.positions.tolist() for one in found] == [[first + at for at in row] for row in positions[rank]]
            assert {(one.start, one.end, one.num_real) for one in found} == {(first, first + 12, sharding.rows)}


def test_the_last_step_is_filled_up() -> None:
    """Seventeen images by two ranks, in steps of eight from position four on."""
    found = [
        [(one.positions.tolist(), one.num_real) for one in micro_batches(shard_batch(8, rank, 2), 4, 17)]
        for rank in (0, 1)
    ]
    assert found[0] == [([4, 6, 8, 10], 4), ([12, 14, 16, 18], 3)]
    assert found[1] == [([5, 7, 9, 11], 4), ([13, 15, 17, 19], 2)]


def test_a_rank_without_any_image_has_a_batch_of_padding() -> None:
    (one,) = micro_batches(shard_batch(4, 3, 4), 0, 2)
    assert one.positions.tolist() == [3] and one.num_real == 0 and (one.start, one.end) == (0, 2)


def test_shares_are_rounded_up() -> None:
    """As for validation: ten images by four ranks are three each."""
    assert [shard_batch(10, rank, 4).local_positions.tolist() for rank in range(4)] == [
        [0, 4, 8],
        [1, 5, 9],
        [2, 6, 10],
        [3, 7, 11],
    ]
    assert shard_batch(10, 0, 4).step == 12 and steps_per_epoch(shard_batch(10, 0, 4), 24) == 2


@pytest.mark.parametrize(("world", "micro", "pairs"), NUMBERS)
@pytest.mark.parametrize("count", [1, 47, 72, 100])
@pytest.mark.parametrize("start", [0, 5, 72])
def test_every_image_is_read_once(world: int, micro: int, pairs: bool, count: int, start: int) -> None:
    """And those of a step by the same micro-batch number of every rank, as many rows each."""
    shardings = [shard_batch(24, rank, world, micro_batches=micro, pairs=pairs) for rank in range(world)]
    ranks = [list(micro_batches(sharding, start, count)) for sharding in shardings]
    read = [at for batches in ranks for one in batches for at in one.positions[: one.num_real].tolist()]
    assert sorted(read) == list(range(start, count))
    steps = -(-max(count - start, 0) // shardings[0].step)
    assert {len(batches) for batches in ranks} == {steps * micro}
    for together in zip(*ranks, strict=True):
        assert len({(one.start, one.end, len(one.positions)) for one in together}) == 1
        assert sum(one.num_real for one in together) <= together[0].end - together[0].start


@pytest.mark.parametrize(("world", "micro", "pairs"), NUMBERS)
def test_the_images_of_a_step_do_not_depend_on_who_reads_them(world: int, micro: int, pairs: bool) -> None:
    """Nor do the neighbours that mixing pairs."""
    steps: dict[int, set[int]] = {}
    for rank in range(world):
        for one in micro_batches(shard_batch(144, rank, world, micro_batches=micro, pairs=pairs), 0, 400):
            real = one.positions[: one.num_real]
            steps.setdefault(one.start, set()).update(real.tolist())
            assert not pairs or np.array_equal(one.positions[::2] + 1, one.positions[1::2])
    assert steps == {first: set(range(first, min(first + 144, 400))) for first in (0, 144, 288)}


@pytest.mark.parametrize(("world", "micro", "pairs"), NUMBERS)
def test_a_ranks_positions_are_those_of_its_batches(world: int, micro: int, pairs: bool) -> None:
    sharding = shard_batch(24, world - 1, world, micro_batches=micro, pairs=pairs)
    read = [at for one in micro_batches(sharding, 24, 95) for at in one.positions[: one.num_real].tolist()]
    assert positions_of_rank(sharding, 24, 95).tolist() == read


@pytest.mark.parametrize(
    ("batch", "world", "micro", "pairs", "message"),
    [
        (64, 3, 1, False, "64 images cannot be shared by 3 ranks x 1 micro-batches; choose a multiple of 3"),
        (64, 4, 3, False, "64 images cannot be shared by 4 ranks x 3 micro-batches; choose a multiple of 12"),
        (
            6,
            2,
            1,
            True,
            "6 images cannot be shared in pairs, as mixup and cutmix need by 2 ranks x 1 micro-batches; choose a multiple of 4",
        ),
    ],
)
def test_a_batch_that_cannot_be_shared(batch: int, world: int, micro: int, pairs: bool, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_batch(batch, world, micro, pairs=pairs)
    assert str(caught.value) == f"data.batch: {message}"
