"""That the ranks together read an epoch exactly once is noticed to be so, and noticed not to be so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import AugmentConfig, Balance
from data_pipeline.coverage import first_fault
from data_pipeline.loader import Cursor, Loader
from data_pipeline.sharding import RankInfo
from data_pipeline.sources.catalog import Catalog, open_catalog
from tests.conftest import config, take

START = Cursor()


def coverage_of(
    catalogs: list[Catalog],
    ranks: list[int],
    folder: Path,
    start: Cursor = START,
    augment: AugmentConfig | None = None,
    balance: Balance = "none",
) -> np.ndarray:
    """Coverage sums of each process that reads the rest of an epoch as rank `ranks[i]` of so many."""
    rows = []
    for catalog, rank in zip(catalogs, ranks, strict=True):
        cfg = replace(config(folder, batch=12, augment=augment), balance=balance)
        loader = Loader(cfg, catalog, RankInfo(rank=rank, world=len(ranks)), training=True, epochs=3)
        loader.seek(start)
        take(loader)
        rows.append(loader.coverage_sums())
    return np.stack(rows)


@pytest.fixture
def catalog(folder: Path) -> Catalog:
    return open_catalog(config(folder, batch=12), "train")


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [Cursor(), Cursor(2, 24)])
def test_every_image_once_is_proven(catalog: Catalog, folder: Path, world: int, start: Cursor) -> None:
    found = coverage_of([catalog] * world, list(range(world)), folder, start)
    assert found[:, 0].sum() == len(catalog) - start.seen
    assert first_fault(found) is None


def test_repeated_augmentation_is_proven(catalog: Catalog, folder: Path) -> None:
    found = coverage_of([catalog] * 2, [0, 1], folder, Cursor(1), AugmentConfig(repeats=3, mixup=0.2))
    assert first_fault(found) is None


@pytest.fixture
def uneven(catalog: Catalog) -> Catalog:
    """Two classes, one with a fifth of the images."""
    return replace(catalog, labels=(np.arange(len(catalog)) % 5 == 0).astype(np.int64))


@pytest.mark.parametrize("start", [Cursor(), Cursor(2, 24)])
def test_a_balanced_order_is_proven(uneven: Catalog, folder: Path, start: Cursor) -> None:
    found = coverage_of([uneven] * 2, [0, 1], folder, start, balance="uniform")
    assert found[:, 0].sum() == len(uneven) - start.seen
    assert first_fault(found) is None
    again = coverage_of([uneven] * 3, [0, 1, 1], folder, start, balance="uniform")
    assert "their shares overlap" in (first_fault(again) or "")


def test_a_repeated_image_in_place_of_another_is_noticed(uneven: Catalog, folder: Path) -> None:
    """The number is right and every image was read: only how often is wrong."""
    loader = Loader(replace(config(folder, batch=12), balance="uniform"), uneven, RankInfo(), training=True)
    take(loader)
    assert loader._epoch
    ids, times = np.unique(loader._epoch.order, return_counts=True)
    once_less, once_more = ids[times > 1][:2]
    row = next(rows for rows in loader._epoch._read if once_less in rows)
    row[list(row).index(once_less)] = once_more
    assert "rank 0 read" in (first_fault(loader.coverage_sums()[None]) or "")


def test_a_rank_started_twice(catalog: Catalog, folder: Path) -> None:
    assert "their shares overlap" in (first_fault(coverage_of([catalog] * 3, [0, 1, 1], folder)) or "")


def test_a_node_with_other_images(catalog: Catalog, folder: Path) -> None:
    other = replace(catalog, paths=[*catalog.paths[:-1], "another.jpg"])
    assert "rank 1 finds other images" in (first_fault(coverage_of([catalog, other], [0, 1], folder)) or "")


def test_a_rank_that_stops_early(catalog: Catalog, folder: Path) -> None:
    loader = Loader(config(folder, batch=12), catalog, RankInfo(), training=True)
    take(loader, 2)
    assert "rank 0 read 24 images" in (first_fault(loader.coverage_sums()[None]) or "")
