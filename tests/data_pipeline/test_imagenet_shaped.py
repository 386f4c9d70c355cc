"""A set of ImageNet's size: 1.28 million images of 1,000 classes, which are all the same few bytes of one tar."""

import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources import catalog
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.sources.held_out import divided
from data_pipeline.sources.listing import Listing, Taken
from tests.conftest import KINDS, picture

CLASSES, IMAGES = 1000, 1_281_167
OPEN_S, FIRST_BATCH_S = 5, 10  # on two idle cores 1 and 2


@pytest.mark.slow
def test_a_million_images_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = KINDS["plain.jpg"](picture(12, 16))
    (tmp_path / "images.tar").write_bytes(jpeg)
    listed: list[str] = []

    def listing(root: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing:
        listed.append(split)
        whole = Listing(
            root,
            [f"images.tar/n{row % CLASSES:08d}/n{row % CLASSES:08d}_{row}.JPEG" for row in range(IMAGES)],
            [row % CLASSES for row in range(IMAGES)],
            [f"n{row:08d}" for row in range(CLASSES)],
            [root],
            ["images.tar"],
            np.tile(np.array([0, 0, len(jpeg)]), (IMAGES, 1)),
            Taken("a test"),
        )
        return divided(whole, DataConfig(val_share=0.04), split)

    monkeypatch.setattr(catalog, "list_samples", listing)
    cfg = DataConfig(str(tmp_path), batch=64, size_px=32, threads=1)
    scanned = open_catalog(cfg, "train")

    start_s = time.perf_counter()
    train = open_catalog(cfg, "train")
    val = open_catalog(cfg, "val", train.classes)
    assert listed == ["train", "val"]
    del val
    start_s = time.perf_counter()
    train = open_catalog(cfg, "train")
    val = open_catalog(cfg, "val", train.classes)
    opened_s = time.perf_counter() - start_s
    batch = next(iter(Loader(cfg, train)))
    batched_s = time.perf_counter() - start_s
    assert listed == ["train", "val"] and len(train) + len(val) == IMAGES and len(batch.labels) == 64
    assert train.paths == scanned.paths
    assert (opened_s < OPEN_S, batched_s < FIRST_BATCH_S) == (True, True), (opened_s, batched_s)
