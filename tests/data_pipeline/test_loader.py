"""The loader, through the real DALI graph: pixels against torchvision and PIL, positions, memory, resuming, bad files."""

import gc
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.backend import TensorListCPU
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize  # type: ignore[import-untyped]
from torchvision.transforms import functional as tv
from torchvision.transforms.functional import rotate  # type: ignore[import-untyped]

from data_pipeline import coverage, host_batch, sampling
from data_pipeline.common.errors import UserError
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.dali import graph
from data_pipeline.dali.graph import images_of
from data_pipeline.loader import IGNORE_LABEL, Batch, Cursor, Loader
from data_pipeline.sharding import RankInfo
from data_pipeline.sources.catalog import Catalog, open_catalog
from tests.conftest import KINDS, config, decoded, in_order, picture, take

SEED = 1
ROTATED = AugmentConfig(min_area=0.2, rotate_deg=30)


def opened(
    cfg: DataConfig, rank_info: RankInfo | None = None, *, training: bool = True, accumulate: int = 1, epochs: int = 1
) -> Loader:
    catalog = open_catalog(cfg, "train" if training else "val")
    return Loader(
        cfg, catalog, rank_info or RankInfo(), training=training, seed=SEED, epochs=epochs, accumulate=accumulate
    )


def epoch_of(
    cfg: DataConfig, world: int = 1, *, training: bool = True, accumulate: int = 1, cursor: Cursor | None = None
) -> list[list[Batch]]:
    """The batches of each rank."""
    ranks = []
    for rank in range(world):
        loader = opened(cfg, RankInfo(rank=rank, world=world), training=training, accumulate=accumulate, epochs=2)
        loader.seek(cursor or Cursor())
        ranks.append(take(loader))
    return ranks


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.ids, b.ids)
        and (a.num_real, a.total) == (b.num_real, b.total)
        for a, b in zip(first, second, strict=True)
    )


# Pixels


def difference(image: torch.Tensor, reference: Image.Image) -> NDArray[np.int64]:
    """Absolute differences [H, W, 3] of levels in 0..255."""
    return np.abs(image.permute(1, 2, 0).numpy().astype(np.int64) - np.asarray(reference))


def window_of(
    position: int, sample: Image.Image, cfg: DataConfig, epoch: int = 0
) -> tuple[tuple[int, int, int, int], bool, float]:
    """Left, top, right, bottom; whether mirrored; angle."""
    u = sampling.uniforms(SEED, epoch, np.array([position]))
    geometry = sampling.training_geometry(u, np.array([sample.size[::-1]], np.int32), cfg.augment)
    top, left, bottom, right = geometry.roi[0].astype(int).tolist()
    return (min(left, right), top, max(left, right), bottom), left > right, float(geometry.angle_deg[0])


@pytest.fixture(params=["kernel", "dali"])
def resizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resize on a CPU: by our kernel, or by DALI where that does not work."""
    if request.param == "dali":
        monkeypatch.setattr(graph, "cpu_kernel", lambda: None)


@pytest.mark.usefixtures("resizer")
@pytest.mark.parametrize("size_px", [32, 96])
def test_validation_pixels_are_torchvisions(folder: Path, size_px: int) -> None:
    """Every kind of file, made smaller and larger: no level differs by more than 1, the mean by less than 0.25."""
    cfg = config(folder, batch=9, size_px=size_px)
    loader = opened(cfg, training=False)
    transform = Compose([Resize(round(size_px / 0.875)), CenterCrop(size_px)])
    images, _, ids = in_order([take(loader)])
    assert ids.tolist() == list(range(len(KINDS)))
    for image, sample in zip(images, ids.tolist(), strict=True):
        levels = difference(image, transform(decoded(loader.catalog, sample)))
        assert levels.max() <= 1 and levels.mean() < 0.25, loader.catalog.paths[sample]


@pytest.mark.usefixtures("resizer")
def test_simple_crops_are_torchvisions(folder: Path) -> None:
    """The short side resized, a mirrored rim of 4 pixels, a square anywhere; crops reach into the rim at each side."""
    cfg = config(folder, batch=12, size_px=32, augment=AugmentConfig(crop="simple", vertical_flip=0.5))
    loader = opened(cfg)
    images, _, ids = in_order([take(loader)])
    u = sampling.uniforms(SEED, 0, np.arange(len(ids)))
    corners = set()
    for image, sample, row in zip(images, ids.tolist(), u, strict=True):
        resized = tv.pad(tv.resize(decoded(loader.catalog, sample), 32), [4], padding_mode="reflect")
        top, left = int(row[22] * (resized.height - 31)), int(row[23] * (resized.width - 31))
        expected = tv.crop(resized, top, left, 32, 32)
        expected = tv.hflip(expected) if row[20] < 0.5 else expected
        expected = tv.vflip(expected) if row[24] < 0.5 else expected
        levels = difference(image, expected)
        # DALI's own resize knows nothing beside the window: pixels at its edge may differ more.
        assert (levels > 1).mean() <= (0 if graph.cpu_kernel() else 0.05) and levels.mean() < 0.25
        corners.add((int(np.sign(top - 4)), int(np.sign(left - 4))))
    assert corners >= {(-1, -1), (-1, 1), (1, -1), (1, 1)}


@pytest.mark.parametrize("size_px", [64, 224])
def test_validation_pixels_of_real_images_are_torchvisions(imagenette: Path, size_px: int) -> None:
    cfg = config(imagenette, batch=50, size_px=size_px)
    catalog = every(20, open_catalog(cfg, "val"))
    transform = Compose([Resize(round(size_px / 0.875)), CenterCrop(size_px)])
    images, _, ids = in_order([take(Loader(cfg, catalog, RankInfo(), training=False))])
    levels = np.stack([difference(image, transform(decoded(catalog, i))) for i, image in enumerate(images)])
    assert len(ids) == len(levels) == 99
    assert levels.mean() < 0.2 and np.percentile(levels, 99) <= 1 and levels.max() <= 2


@pytest.mark.usefixtures("resizer")
@pytest.mark.parametrize("size_px", [32, 96])
def test_training_pixels_are_those_of_their_window(folder: Path, size_px: int) -> None:
    """As PIL's resize with a box, whose filter too sees the pixels around the window.

    Beyond the edge of an image PIL sees nothing, DALI its outermost pixels again: the outermost ones may differ more.
    """
    cfg = config(folder, batch=9, size_px=size_px)
    loader = opened(cfg)
    loader.seek(Cursor(3))
    images, _, ids = in_order([take(loader)])
    mirrored_ones = 0
    for position, (image, sample) in enumerate(zip(images, ids.tolist(), strict=True)):
        source = decoded(loader.catalog, sample)
        box, mirrored, _ = window_of(position, source, cfg, epoch=3)
        reference = source.resize((size_px, size_px), Image.Resampling.BILINEAR, box=box)
        if mirrored:
            reference = reference.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        levels = difference(image, reference)
        assert levels[1:-1, 1:-1].max() <= 2 and levels.max() <= 8, loader.catalog.paths[sample]
        assert levels.mean() < 0.35, loader.catalog.paths[sample]
        mirrored_ones += mirrored
    assert 10 < mirrored_ones < 38


def test_training_pixels_of_real_images_are_nearly_those_of_a_crop(imagenette: Path) -> None:
    """torchvision crops, then resizes: at the edges of the window it cannot see what DALI's filter sees beyond them."""
    cfg = config(imagenette, batch=50, size_px=128)
    catalog = every(90, open_catalog(cfg, "train"))
    images, _, ids = in_order([take(Loader(cfg, catalog, RankInfo(), training=True, seed=SEED))])
    levels = []
    for position, (image, sample) in enumerate(zip(images, ids.tolist(), strict=True)):
        source = decoded(catalog, sample)
        box, mirrored, _ = window_of(position, source, cfg)
        crop = source.crop(box).resize((128, 128), Image.Resampling.BILINEAR)
        levels.append(difference(image, crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop))
    table = np.stack(levels)
    assert table.mean() < 0.3 and np.percentile(table, 99) <= 2
    assert table[:, 4:-4, 4:-4].mean() < 0.2 and table[:, 4:-4, 4:-4].max() <= 2


@pytest.mark.usefixtures("resizer")
def test_rotated_pixels_are_torchvisions(folder: Path) -> None:
    cfg = config(folder, batch=9, size_px=64, augment=ROTATED)
    loader = opened(cfg)
    images, _, ids = in_order([take(loader)])
    for position, (image, sample) in enumerate(zip(images, ids.tolist(), strict=True)):
        source = decoded(loader.catalog, sample)
        box, mirrored, angle = window_of(position, source, cfg)
        reference = source.resize((64, 64), Image.Resampling.BILINEAR, box=box)
        if mirrored:
            reference = reference.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        levels = difference(image, rotate(reference, angle))
        # Halfway between two pixels, rounding decides which is the nearest.
        assert (levels.max(axis=-1) > 2).mean() < 0.002 and levels.mean() < 0.35, loader.catalog.paths[sample]


@pytest.mark.usefixtures("resizer")
def test_a_flip_is_the_mirror_image(folder: Path) -> None:
    """But for a rounding of the filter's weights, once in ten thousand levels."""
    always, never = (config(folder, batch=12, augment=AugmentConfig(min_area=0.2, flip=chance)) for chance in (1, 0))
    mirrored, plain = (in_order(epoch_of(cfg))[0] for cfg in (always, never))
    levels = (mirrored.flip(-1).int() - plain.int()).abs()
    assert levels.max() <= 1 and levels.float().mean() < 1e-4


# Memory


@pytest.mark.parametrize("training", [True, False])
def test_images_are_channels_last_in_dalis_memory(
    folder: Path, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointers = []
    run = Pipeline.run

    def spy(pipeline: Pipeline) -> tuple[object, ...]:
        (output,) = run(pipeline)
        pointers.append(output.as_tensor().data_ptr())
        return (output,)

    monkeypatch.setattr(Pipeline, "run", spy)
    loader = opened(config(folder, batch=10, size_px=40), training=training)
    for number, batch in enumerate(loader):
        assert batch.images.shape == (10, 3, 40, 40) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.data_ptr() == pointers[number]
        assert batch.labels.shape == batch.ids.shape == (10,)
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
    assert len(pointers) == loader.steps_per_epoch()


def test_batches_that_are_kept_stay_as_they_are(folder: Path) -> None:
    loader = opened(config(folder, batch=4, size_px=64))
    kept = list(loader)
    copies = [batch.images.clone() for batch in kept]
    loader.seek(Cursor())
    again = list(loader)
    for batch, copy, second in zip(kept, copies, again, strict=True):
        assert torch.equal(batch.images, copy) and torch.equal(batch.images, second.images)
    assert len({batch.images.data_ptr() for batch in kept + again}) == 2 * len(kept)


def test_the_thread_that_trains_makes_no_inputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It feeds DALI what other threads have made, in the form in which DALI keeps it."""
    threads, fed = [], []

    def inputs_of(*arguments: Any) -> graph.Inputs:
        threads.append(threading.current_thread())
        return made(*arguments)

    def feed(pipeline: Pipeline, name: str, data: object, *arguments: Any) -> None:
        fed.append(type(data))
        feed_input(pipeline, name, data, *arguments)

    made, feed_input = graph.inputs_of, Pipeline._feed_input
    monkeypatch.setattr(graph, "inputs_of", inputs_of)
    monkeypatch.setattr(Pipeline, "_feed_input", feed)
    take(opened(config(folder, batch=12, augment=ROTATED)))
    assert len(threads) == 4 and threading.main_thread() not in threads
    assert fed == [TensorListCPU] * 4 * 4


# Positions


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [12, 36, 60])
def test_every_image_once_an_epoch(folder: Path, training: bool, world: int, batch: int) -> None:
    cfg = config(folder, batch=batch, size_px=8)
    ranks = epoch_of(cfg, world, training=training)
    catalog = open_catalog(cfg, "train" if training else "val")
    _, labels, ids = in_order(ranks)
    assert sorted(ids.tolist()) == list(range(len(catalog)))
    assert torch.equal(labels, torch.from_numpy(catalog.labels)[ids])
    assert len({len(batches) for batches in ranks}) == 1
    for together in zip(*ranks, strict=True):
        assert all(one.images.shape[0] == batch // world for one in together)
        assert all(one.total == together[0].total for one in together)
        assert sum(one.num_real for one in together) == together[0].total
        for one in together:
            assert (one.labels[one.num_real :] == IGNORE_LABEL).all() and (one.labels[: one.num_real] >= 0).all()


def test_validation_of_a_batch_that_ranks_cannot_share(folder: Path) -> None:
    ranks = epoch_of(config(folder, batch=10, size_px=8), 4, training=False)
    assert all(batch.images.shape[0] == 3 for batches in ranks for batch in batches)
    assert in_order(ranks)[2].tolist() == list(range(len(KINDS)))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1), (3, 2)])
@pytest.mark.parametrize("batch", [12, 36])
def test_pixels_of_a_position_do_not_depend_on_who_reads_it(
    folder: Path, world: int, accumulate: int, batch: int
) -> None:
    cfg = config(folder, batch=batch, augment=ROTATED)
    alone, ids = in_order(epoch_of(cfg))[::2]
    shared, shared_ids = in_order(epoch_of(cfg, world, accumulate=accumulate))[::2]
    assert torch.equal(ids, shared_ids)
    assert torch.equal(alone, shared)


def test_the_cursor_and_totals_count_whole_updates(folder: Path) -> None:
    loader = opened(config(folder, batch=20, size_px=8), RankInfo(rank=1, world=2), accumulate=2)
    seen = [(batch.num_real, batch.total, loader.cursor.seen) for batch in loader]
    assert seen == [(5, 20, 20), (5, 20, 20), (5, 20, 40), (5, 20, 40), (4, 8, 48), (0, 8, 48)]
    assert loader.steps_per_epoch() == 3


def test_epochs_differ_in_order_and_windows(folder: Path) -> None:
    cfg = config(folder, batch=48, size_px=8)
    (first,), (second,) = epoch_of(cfg)[0], epoch_of(cfg, cursor=Cursor(1))[0]
    assert first.ids.tolist() != second.ids.tolist()
    assert not torch.equal(first.images[first.ids.argsort()], second.images[second.ids.argsort()])


def test_each_epoch_has_its_size(folder: Path) -> None:
    cfg = config(folder, batch=48, size_px=[16, 24])
    loader, sizes = opened(cfg, epochs=5), []
    for epoch in range(5):
        loader.seek(Cursor(epoch))
        sizes += [tuple(batch.images.shape[2:]) for batch in loader]
    assert sizes == [(16, 16)] * 3 + [(24, 24)] * 2
    assert all(batch.images.shape[2:] == (24, 24) for batch in opened(cfg, training=False))
    assert all(batch.images.shape[2:] == (40, 40) for batch in opened(replace(cfg, eval_size_px=40), training=False))


def test_each_epoch_has_its_batch(folder: Path) -> None:
    """Batches grow with the sizes; the images of a position stay, and each epoch is read once."""
    cfg = config(folder, batch=[12, 24], size_px=[16, 24])
    loaders = [opened(cfg, RankInfo(rank=rank, world=2), epochs=4) for rank in range(2)]
    for epoch, (batch, size_px) in enumerate([(12, 16), (12, 16), (24, 24), (24, 24)]):
        ranks = []
        for loader in loaders:
            loader.seek(Cursor(epoch))
            ranks.append(take(loader))
        assert {tuple(one.images.shape) for batches in ranks for one in batches} == {(batch // 2, 3, size_px, size_px)}
        assert len(ranks[0]) == loaders[0].steps_per_epoch(epoch) == 48 / batch
        steady = epoch_of(replace(cfg, batch=48, size_px=size_px), cursor=Cursor(epoch))
        for grown, alone in zip(in_order(ranks), in_order(steady), strict=True):
            assert torch.equal(grown, alone)
        assert coverage.first_fault(np.array([loader.coverage_sums() for loader in loaders])) is None
    assert all(one.images.shape[0] == 24 for one in opened(cfg, training=False))


def test_every_batch_must_be_shared(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.batch: 9 images cannot be shared by 2 ranks"):
        opened(config(folder, batch=[12, 9]), RankInfo(rank=0, world=2))


@pytest.mark.parametrize(("world", "accumulate", "multiple"), [(3, 1, 3), (4, 3, 12)])
def test_a_batch_that_cannot_be_shared_is_refused(folder: Path, world: int, accumulate: int, multiple: int) -> None:
    with pytest.raises(UserError, match=rf"data.batch: 64 .* {world} ranks x {accumulate} .* multiple of {multiple}$"):
        opened(config(folder, batch=64), RankInfo(rank=0, world=world), accumulate=accumulate)


# Resuming


@pytest.mark.parametrize("seen", [0, 12, 24, 48, 60])
@pytest.mark.parametrize("world", [1, 2])
def test_seeking_gives_the_same_remainder(folder: Path, seen: int, world: int) -> None:
    cfg = config(folder, batch=12, augment=ROTATED)
    for rank, whole in enumerate(epoch_of(cfg, world, cursor=Cursor(1))):
        loader = opened(cfg, RankInfo(rank=rank, world=world), epochs=2)
        loader.seek(Cursor(1, seen))
        assert equal(take(loader), whole[seen // 12 :])


@pytest.mark.parametrize("seen", [5, 12, 31])
def test_seeking_anywhere_at_another_number_of_ranks_and_batch(folder: Path, seen: int) -> None:
    images, labels, ids = in_order(epoch_of(config(folder, batch=12, augment=ROTATED), 3))
    rest = in_order(epoch_of(config(folder, batch=8, augment=ROTATED), 2, cursor=Cursor(0, seen)))
    assert torch.equal(rest[0], images[seen:])
    assert torch.equal(rest[1], labels[seen:])
    assert torch.equal(rest[2], ids[seen:])


def test_a_loader_goes_on_where_it_stopped(folder: Path) -> None:
    cfg = config(folder, batch=12)
    (whole,) = epoch_of(cfg)
    loader = opened(cfg, epochs=2)
    assert equal(take(loader, 1) + take(loader, 2) + take(loader), whole)
    assert take(loader) == []


def test_abandoned_iterations_leave_no_trace(folder: Path) -> None:
    cfg = config(folder, batch=4, augment=ROTATED)
    (whole,) = epoch_of(cfg)
    loader = opened(cfg, epochs=2)
    abandoned: list[Iterator[Batch]] = []
    for batches in (1, 3, 7):
        loader.seek(Cursor())
        assert equal(take(loader, batches), whole[:batches])
        loader.seek(Cursor())
        abandoned.append(iter(loader))  # and kept alive
        assert equal([next(abandoned[-1])], whole[:1])
    for _ in range(2):
        loader.seek(Cursor())
        assert equal(take(loader), whole)


def test_a_second_iteration_ends_the_first(folder: Path) -> None:
    """In place of each taking what the other lacks."""
    cfg = config(folder, batch=12)
    (whole,) = epoch_of(cfg)
    loader = opened(cfg, epochs=2)
    first = iter(loader)
    assert equal([next(first)], whole[:1])
    second = iter(loader)
    assert equal([next(second)], whole[1:2])
    with pytest.raises(RuntimeError, match="another iteration of this Loader has begun"):
        next(first)
    assert equal(list(second), whole[2:]) and list(loader) == []


def test_loaders_of_the_same_data_do_not_mind_each_other(folder: Path) -> None:
    cfg = config(folder, batch=12)
    (whole,) = epoch_of(cfg)
    for one, other in zip(opened(cfg, epochs=2), opened(cfg, epochs=2), strict=True):
        assert equal([one], [other]) and any(equal([one], [batch]) for batch in whole)


def test_an_abandoned_iteration_does_not_count_its_bad_images_to_the_next(copied: Path) -> None:
    """An iteration has threads of its own, which still read for it."""
    loader = opened(config(copied, batch=4), epochs=2)
    order = [int(sample) for batch in take(loader) for sample in batch.ids]
    loader.seek(Cursor())
    spoil(loader.catalog.root / loader.catalog.paths[order[0]], "deleted")
    take(loader, 1)
    assert loader.bad_images == 1
    loader.seek(Cursor(0, 4))
    take(loader)
    assert loader.bad_images == 0 and len(loader.take_bad()) == 1


def test_a_forked_process_does_not_collect_a_loader(folder: Path) -> None:
    """DALI's pipelines cannot be ended there, and a worker of a torch DataLoader collects garbage as any process does."""
    batches = iter(opened(config(folder, batch=4)))
    cycle: list[object] = [next(batches), batches]
    cycle.append(cycle)
    del cycle, batches
    child = os.fork()
    if not child:
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Files that go bad after they were found good


def every(step: int, catalog: Catalog) -> Catalog:
    return replace(catalog, paths=catalog.paths[::step], labels=catalog.labels[::step])


def spoil(path: Path, how: str) -> str:
    """Damage a file; returns what is to be said about it."""
    whole = path.read_bytes()
    if how == "deleted":
        path.unlink()
        return "No such file or directory"
    if how == "a folder":
        path.unlink()
        path.mkdir()
        return "Is a directory"
    damaged, why = {
        "emptied": (b"", "the file is empty"),
        "truncated": (whole[: len(whole) * 3 // 4], "truncated|cut off"),
        "a text": (b"out of order\n", "not a JPEG, PNG, BMP or WebP stream"),
        "corrupted": (whole[:600] + bytes(len(whole) - 1200) + whole[-600:], "its image data are damaged"),
    }[how]
    path.write_bytes(damaged)
    return why


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the images to be spoilt, with names that are not."""
    return Path(shutil.copytree(folder, tmp_path / "data"))


@pytest.mark.parametrize("how", ["deleted", "a folder", "emptied", "truncated", "a text", "corrupted"])
@pytest.mark.parametrize("training", [True, False])
def test_a_file_gone_bad_is_replaced_and_named_once(copied: Path, how: str, training: bool) -> None:
    cfg = config(copied, batch=10, augment=ROTATED)
    loader = opened(cfg, training=training)
    images, labels, ids = in_order([take(loader)])
    sample = next(i for i, path in enumerate(loader.catalog.paths) if path.endswith(" rgb.png"))
    why = spoil(loader.catalog.root / loader.catalog.paths[sample], how)
    assert loader.take_bad() == []
    for epoch in range(2):
        loader.seek(Cursor())
        their_images, their_labels, their_ids = in_order([take(loader)])
        assert torch.equal(their_ids, ids)
        assert torch.equal(their_labels, labels.masked_fill(ids == sample, IGNORE_LABEL))
        assert torch.equal(their_images[ids != sample], images[ids != sample])
        assert (their_images[ids == sample] == their_images[ids == sample][..., :1, :1]).all() or cfg.augment.rotate_deg
        bad = loader.take_bad()
        assert len(bad) == (1 if epoch == 0 else 0)
        for path, reason in bad:
            assert path == loader.catalog.paths[sample] and re.match(why, reason)


def test_a_batch_of_nothing_but_damage(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(6):
            (tmp_path / split / "a" / f"{number}.png").write_bytes(KINDS["rgb.png"](picture(40, 50, number)))
    cfg = config(tmp_path, batch=3)
    loader = opened(cfg)
    for sample in range(6):
        assert spoil(loader.catalog.root / loader.catalog.paths[sample], "corrupted")
    batches = take(loader)
    assert [batch.labels.tolist() for batch in batches] == [[IGNORE_LABEL] * 3] * 2
    assert [batch.num_real for batch in batches] == [3, 3]
    assert sorted(path for path, _ in loader.take_bad()) == loader.catalog.paths


def test_a_file_replaced_by_another_is_cut_by_its_own_size(copied: Path) -> None:
    cfg = config(copied, batch=12)
    loader = opened(cfg, training=False)
    path = loader.catalog.root / loader.catalog.paths[0]
    path.write_bytes(KINDS["rgb.png"](picture(20, 300)))
    image = in_order([take(loader)])[0][0]
    transform = Compose([Resize(round(32 / 0.875)), CenterCrop(32)])
    assert difference(image, transform(decoded(loader.catalog, 0))).max() <= 1


def test_other_errors_of_dali_are_not_taken_for_bad_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window without its right edge is our own mistake."""

    def unfinished(*arguments: Any) -> sampling.Geometry:
        geometry = training_geometry(*arguments)
        return geometry._replace(roi=geometry.roi[:, :3])

    training_geometry = sampling.training_geometry
    monkeypatch.setattr(sampling, "training_geometry", unfinished)
    loader = opened(config(folder, batch=12))
    with pytest.raises(RuntimeError, match="resize"):
        take(loader)
    assert loader.take_bad() == []


# Devices


def devices(*, shift: bool = False, rotate: bool, on_gpu: bool) -> dict[str, str]:
    """Operator -> device, read from the serialised graph; no GPU is needed for that."""
    pipeline = pipeline_def(images_of)(
        lambda: ([],) * 4,
        size_px=32,
        shift=shift,
        rotate=rotate,
        operators=[],
        on_gpu=on_gpu,
        batch_size=4,
        num_threads=1,
        device_id=None,
    )
    pattern = rb"device\W+string\W+(?:\w\W+)?(cpu|gpu|mixed)\W.*?_display_name\W+string\W+(?:\w\W+)?(\w+)"
    found = re.findall(pattern, pipeline.serialize(), re.DOTALL)
    return {name.decode(): device.decode() for device, name in found}


def test_operators_run_where_they_should() -> None:
    on_gpu = {"external_source": "cpu", "image": "mixed", "resize": "gpu", "rotate": "gpu"}
    assert devices(rotate=True, on_gpu=True) == on_gpu
    assert devices(rotate=True, on_gpu=False) == dict.fromkeys(on_gpu, "cpu")
    of_a_shift = {"slice": "gpu", "flip": "gpu", "cat": "gpu"}
    assert of_a_shift.items() <= devices(shift=True, rotate=False, on_gpu=True).items()
    assert devices(rotate=False, on_gpu=True).keys() == on_gpu.keys() - {"rotate"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("training", [True, False])
def test_a_gpu_gives_the_pixels_of_a_cpu(folder: Path, training: bool) -> None:
    """Decoders may round differently: the mean differs by less than 2 levels, 99 % of the levels by at most 12."""
    cfg = config(folder, batch=10, size_px=64)
    gpu = RankInfo(device=torch.device("cuda", 0))
    loader = opened(cfg, gpu, training=training)
    kept = list(loader)
    assert all(batch.images.device == batch.labels.device == gpu.device for batch in kept)
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in kept)
    images, labels, ids = (part.cpu() for part in in_order([kept]))
    expected = in_order(epoch_of(cfg, training=training))
    assert torch.equal(labels, expected[1]) and torch.equal(ids, expected[2])
    levels = (images.int() - expected[0].int()).abs().float()
    assert levels.mean() < 2 and levels.flatten().kthvalue(int(0.99 * levels.numel())).values <= 12
    loader.seek(Cursor())
    assert torch.equal(in_order([list(loader)])[0].cpu(), images)


# Huge images


def test_batches_of_huge_images_are_decoded_a_few_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same pixels, the damaged ones included; how many are decoded at once follows from their headers."""
    for split in ("train", "val"):
        shutil.copytree(folder / split, tmp_path / "images" / split)
    image = next((tmp_path / "images/train").rglob("*rgb.png"))
    data = image.read_bytes()
    image.write_bytes(data[: len(data) // 2] + bytes(100) + data[len(data) // 2 + 100 :])
    cfg = config(tmp_path / "images", batch=16, augment=ROTATED)
    whole = take(opened(cfg))
    assert sum((batch.labels == IGNORE_LABEL).sum() for batch in whole) == 1
    most, cut, parts = 20_000, host_batch._cut, []

    def noted(sizes: NDArray[np.int32]) -> Iterator[slice]:
        for part in cut(sizes):
            parts.append(part)
            assert sizes[part].astype(int).prod(axis=1).sum() <= most or part.stop == part.start + 1
            yield part

    monkeypatch.setattr(host_batch, "_MOST_PIXELS", most)
    monkeypatch.setattr(host_batch, "_cut", noted)
    few = take(opened(cfg))
    assert len(few) == len(whole) == 3 and len(parts) > 9
    for one, other in zip(whole, few, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
