"""The same batches, to the bit, from every layout, by any number of ranks, and after a stop with another number of them."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from data_pipeline.config import AugmentConfig, Balance, DataConfig
from data_pipeline.loader import Cursor, Loader
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sharding import RankInfo
from data_pipeline.sources.catalog import open_catalog
from tests.conftest import HOSTILE_NAMES, KINDS, picture, take
from tests.data_pipeline.dali.test_augment import EVERYTHING
from tests.support import object_stores
from tests.support.published import PUBLISHED

LAYOUTS = ("class folders", "csv", "parquet", "tar shards", "pack", "pack in s3", "tar shards in s3")
BATCH, IMAGES = 8, {"train": 44, "val": 10}
UNEVEN = 12  # images to train on of the uneven set
STOP = 16  # images, two updates


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs, which a pack keeps as they are, in class folders of hostile names."""
    root = tmp_path_factory.mktemp("class folders")
    for split, count in IMAGES.items():
        for number in range(count):
            file = root / split / HOSTILE_NAMES[number % 5] / f"{number:02d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(KINDS["plain.jpg"](picture(30 + number % 7, 60 - number, number)))
    return root


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server's."""
    with object_stores.moto("images") as address:
        yield address


@pytest.fixture(params=LAYOUTS)
def dataset(request: pytest.FixtureRequest, folders: Path, tmp_path: Path) -> DataConfig:
    """The same images in each layout."""
    if request.param == "class folders":
        return DataConfig(str(folders))
    if request.param.startswith("pack"):
        pack(DataConfig(str(folders)), tmp_path / "pack", PackConfig(shard_size="9"), workers=1)
        if request.param == "pack":
            return DataConfig(str(tmp_path / "pack"))
        return DataConfig(object_stores.upload(tmp_path / "pack", f"{request.getfixturevalue('bucket')}/a pack/ü"))
    if request.param.startswith("tar shards"):
        for split in IMAGES:
            write_shards(folders, split, tmp_path / split)
        if request.param == "tar shards":
            return DataConfig(str(tmp_path))
        return DataConfig(object_stores.upload(tmp_path, f"{request.getfixturevalue('bucket')}/shards"))
    rows = [(file, split) for split in IMAGES for file in sorted((folders / split).glob("*/*"))]
    table = pd.DataFrame(
        {
            "image": [str(file.relative_to(folders)) for file, _ in rows],
            "label": [file.parent.name for file, _ in rows],
            "split": [split for _, split in rows],
        }
    )
    path = tmp_path / f"labels.{request.param}"
    if request.param == "csv":
        table.to_csv(path, index=False)
    else:
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    return DataConfig(str(path), images=str(folders))


def write_shards(folders: Path, split: str, into: Path) -> None:
    """Fifteen images a shard, in the order of the class folders."""
    into.mkdir()
    files = sorted((folders / split).glob("*/*"))
    for start in range(0, len(files), 15):
        with tarfile.open(into / f"{start:03d}.tar", "w") as tar:
            for number, file in enumerate(files[start : start + 15], start):
                for suffix, data in (("jpg", file.read_bytes()), ("cls", file.parent.name.encode())):
                    info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def epoch_of(cfg: DataConfig, world: int, split: str = "train", seen: int = 0, count: int = 0) -> list[torch.Tensor]:
    """Images, labels, ids and targets [N, ...] of an epoch of `count` from `seen` on, as so many ranks read them."""
    ranks = []
    for rank in range(world):
        catalog = open_catalog(cfg, split)
        loader = Loader(cfg, catalog, RankInfo(rank=rank, world=world), training=split == "train", seed=7, epochs=2)
        loader.seek(Cursor(1, seen))
        ranks.append(take(loader))
    turn = 2 if split == "train" and cfg.augment.mixes else 1  # neighbouring positions that one rank reads
    updates = []
    for parts in zip(*ranks, strict=True):
        rows = [(b.images, b.labels, b.ids, b.labels if b.targets is None else b.targets) for b in parts]
        turns = [[column.unflatten(0, (-1, turn)) for column in columns] for columns in zip(*rows, strict=True)]
        updates.append([torch.stack(of_ranks, dim=1).flatten(0, 2) for of_ranks in turns])
    return [torch.cat(column)[: (count or IMAGES[split]) - seen] for column in zip(*updates, strict=True)]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def with_options(cfg: DataConfig, augment: dict[str, object]) -> DataConfig:
    options = AugmentConfig(min_area=0.2, **augment)  # type: ignore[arg-type]
    return DataConfig(cfg.path, images=cfg.images, batch=BATCH, size_px=24, threads=2, augment=options)


@pytest.fixture(scope="module")
def reference(folders: Path) -> list[torch.Tensor]:
    """Of class folders, by one rank, with every augmentation at once."""
    return epoch_of(with_options(DataConfig(str(folders)), EVERYTHING["all"]), 1)


def test_neither_layout_nor_ranks_nor_a_stop_change_a_bit(dataset: DataConfig, reference: list[torch.Tensor]) -> None:
    cfg = with_options(dataset, EVERYTHING["all"])
    for world in (1, 2, 4):
        assert equal(epoch_of(cfg, world), reference), world
    rest = [column[STOP:] for column in reference]
    for world in (1, 2, 4):
        assert equal(epoch_of(cfg, world, seen=STOP), rest), world
    assert reference[0].shape == (44, 3, 24, 24) and len(reference[0].unique(dim=0)) == 44


def test_neither_layout_nor_ranks_change_validation(dataset: DataConfig, folders: Path) -> None:
    wanted = epoch_of(with_options(DataConfig(str(folders)), {}), 1, "val")
    assert wanted[2].tolist() == list(range(IMAGES["val"]))
    for world in (1, 2, 4):
        assert equal(epoch_of(with_options(dataset, {}), world, "val"), wanted), world


@pytest.fixture(scope="module")
def uneven(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of 9, 1, 1, 1 and 1 images."""
    root = tmp_path_factory.mktemp("uneven")
    for folder in (folders / "train").iterdir():
        (root / folder.name).mkdir()
        for file in sorted(folder.iterdir())[: 9 if folder.name == HOSTILE_NAMES[0] else 1]:
            (root / folder.name / file.name).symlink_to(file)
    return root


@pytest.mark.parametrize("balance", ["sqrt", "uniform"])
def test_a_balanced_order_minds_neither_ranks_nor_a_stop(uneven: Path, balance: Balance) -> None:
    cfg = replace(with_options(DataConfig(str(uneven)), EVERYTHING["all"]), balance=balance)
    whole = epoch_of(cfg, 1, count=UNEVEN)
    assert len(whole[2]) == UNEVEN > len(whole[2].unique()) > 5
    for world in (1, 2, 4):
        for seen in (0, BATCH):
            assert equal(epoch_of(cfg, world, seen=seen, count=UNEVEN), [column[seen:] for column in whole]), world


def test_a_balanced_order_by_shards_minds_neither_ranks_nor_a_stop(uneven: Path, tmp_path: Path) -> None:
    pack(DataConfig(str(uneven)), tmp_path / "pack", PackConfig(shard_size="3", shuffle=True), workers=1)
    mixed = replace(with_options(DataConfig(str(tmp_path / "pack")), {}), balance="uniform")
    cfg = replace(mixed, shuffle_shards=2)
    whole = epoch_of(cfg, 1, count=UNEVEN)
    assert sorted(whole[2].tolist()) == sorted(epoch_of(mixed, 1, count=UNEVEN)[2].tolist())
    shards = (whole[2] // 3).tolist()  # of three images each, two of them at a time
    in_first = [shard in list(dict.fromkeys(shards))[:2] for shard in shards]
    assert in_first == sorted(in_first, reverse=True) and not all(in_first)
    for world in (2, 4):
        for seen in (0, BATCH):
            assert equal(epoch_of(cfg, world, seen=seen, count=UNEVEN), [column[seen:] for column in whole]), world


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_layouts_are_their_class_folders(layout: str, folders: Path, tmp_path: Path) -> None:
    ours = with_options(DataConfig(str(PUBLISHED[layout](folders, tmp_path / "published"))), {})
    theirs = with_options(DataConfig(str(folders)), {})
    whole = epoch_of(theirs, 1)
    for world in (1, 2, 4):
        assert equal(epoch_of(ours, world), whole), world
        assert equal(epoch_of(ours, world, seen=STOP), [column[STOP:] for column in whole]), world
    assert equal(epoch_of(ours, 2, "val"), epoch_of(theirs, 1, "val"))


def test_neither_ranks_nor_a_stop_change_an_order_by_shards(folders: Path, tmp_path: Path) -> None:
    pack(DataConfig(str(folders)), tmp_path / "pack", PackConfig(shard_size="9", shuffle=True), workers=1)
    cfg = replace(with_options(DataConfig(str(tmp_path / "pack")), {}), shuffle_shards=2)
    whole = epoch_of(cfg, 1)
    assert sorted(whole[2].tolist()) == list(range(44)) and len(set((whole[2][:18] // 9).tolist())) == 2
    for world in (2, 4):
        assert equal(epoch_of(cfg, world), whole)
        assert equal(epoch_of(cfg, world, seen=STOP), [column[STOP:] for column in whole]), world


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_augmentation_minds_a_stop_and_other_ranks(name: str, folders: Path) -> None:
    cfg = with_options(DataConfig(str(folders)), EVERYTHING[name])
    whole = epoch_of(cfg, 1)
    for world in (2, 4):
        assert equal(epoch_of(cfg, world, seen=STOP), [column[STOP:] for column in whole]), world
