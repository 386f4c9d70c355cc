"""Data that fail while they are read: files that vanish, shards cut short, storage that does not answer, a full cache."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import read_ahead
from data_pipeline.config import Balance
from data_pipeline.loader import IGNORE_LABEL, Cursor, Loader
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sharding import RankInfo
from data_pipeline.sources.catalog import open_catalog
from tests.conftest import config, in_order, take
from tests.end_to_end.test_faults import mounted
from tests.support.runs import STEPS, Job, dotted, images, render_images, rows, settings_of
from trainer.checkpoint.store import Store


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """42 images to train on and 14 to validate, of noise, in class folders."""
    return render_images(tmp_path / "data", train=42, val=14)


def opened(root: Path, batch: int = 6) -> Loader:
    cfg = config(root, batch=batch)
    return Loader(cfg, open_catalog(cfg, "train"), RankInfo(), training=True)


def epoch_of(loader: Loader) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loader.seek(Cursor())
    return in_order([take(loader)])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as a pack, whose shards are also those of WebDataset layout."""
    folder = tmp_path_factory.mktemp("packed")
    images = render_images(folder / "data", train=42, val=14)
    pack(config(images, batch=6), folder / "pack", PackConfig(shard_size="20"), workers=1)
    return folder / "pack"


@pytest.fixture(params=["pack", "tar shards"])
def shards(request: pytest.FixtureRequest, packed: Path, tmp_path: Path) -> Path:
    """Images of which each shard holds 20 at most, with an index and without."""
    without_index = shutil.ignore_patterns("manifest.json", "index.npz") if request.param == "tar shards" else None
    return shutil.copytree(packed, tmp_path / "shards", ignore=without_index)


# ---- shards that lose their end, or become others ------------------------------------------------------------------


def assert_lost(loader: Loader, whole: tuple[torch.Tensor, ...], lost: set[int], why: str) -> None:
    """The `lost` samples, and no others, do not count and are named once, in two epochs; nothing else changes."""
    gone = torch.tensor([int(sample) in lost for sample in whole[2]])
    for epoch in range(2):
        images, labels, ids = epoch_of(loader)
        assert torch.equal(ids, whole[2])
        assert torch.equal(labels, whole[1].masked_fill(gone, IGNORE_LABEL))
        assert torch.equal(images[~gone], whole[0][~gone])
        named = dict(loader.take_bad())
        assert named.keys() == ({loader.catalog.paths[sample] for sample in lost} if epoch == 0 else set())
        assert all(re.search(why, reason) for reason in named.values()), named


def test_a_shard_cut_short_while_it_is_read(shards: Path) -> None:
    """Samples before the cut are read as before; those behind it, or across it, are named after their shard."""
    loader = opened(shards)
    whole = epoch_of(loader)
    assert loader.take_bad() == []
    shard, offset, length = loader.catalog.spans[len(loader.catalog) // 3].tolist()
    cut = offset + length // 2
    os.truncate(loader.catalog.root / loader.catalog.shards[shard], cut)
    ends = loader.catalog.spans[:, 1] + loader.catalog.spans[:, 2]
    lost = {row for row, end in enumerate(ends) if loader.catalog.spans[row, 0] == shard and end > cut}
    assert 1 < len(lost) < len(loader.catalog)
    assert_lost(loader, whole, lost, "its shard is cut off")


def test_a_shard_that_is_gone(shards: Path) -> None:
    loader = opened(shards)
    whole = epoch_of(loader)
    (loader.catalog.root / loader.catalog.shards[0]).unlink()
    lost = {row for row, span in enumerate(loader.catalog.spans) if span[0] == 0}
    assert_lost(loader, whole, lost, "No such file or directory")


def test_a_shard_replaced_by_another_ends_nothing(shards: Path) -> None:
    """Its members lie elsewhere: the bytes at the old places are no images, and nothing reaches a decoder that would crash."""
    loader = opened(shards)
    whole = epoch_of(loader)
    shard = loader.catalog.root / loader.catalog.shards[0]
    shard.write_bytes(bytes(700) + shard.read_bytes())
    moved = {row for row, span in enumerate(loader.catalog.spans) if span[0] == 0}
    assert_lost(loader, whole, moved, "not a JPEG|broken|cut off|truncated|misplaced")


# ---- storage that does not answer ----------------------------------------------------------------------------------

HOLDER = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(path: Path) -> Iterator[Callable[[], None]]:
    """Opening `path` waits, as if its server were down, until what is given is called: another process has a lease on it."""
    command = [sys.executable, "-S", "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdin and holder.stdout
        try:
            if holder.stdout.readline() != b"held\n":
                pytest.skip("this file system knows no leases")
            yield holder.stdin.close
        finally:
            holder.kill()


def image_of(loader: Loader, update: int) -> tuple[int, Path]:
    """A sample that this update reads, and its file."""
    sample = int(epoch_of(loader)[2][update * loader.cfg.batches[0]])
    return sample, loader.catalog.root / loader.catalog.paths[sample]


@pytest.mark.parametrize("update", [0, 4])
def test_storage_that_answers_late(
    update: int, folders: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is waited for, and said which file for; then everything is as if it had answered at once."""
    loader = opened(folders)
    whole = epoch_of(loader)
    _, path = image_of(loader, update)
    monkeypatch.setattr(read_ahead, "_PATIENCE_S", 0.5)
    with held(path) as let_go:
        timer = threading.Timer(1.3, let_go)
        timer.start()
        late = epoch_of(loader)
        timer.join()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(late, whole, strict=True))
    assert loader.take_bad() == [] and loader.bad_images == 0
    said = capfd.readouterr().err.splitlines()
    assert said[:2] == [
        f"rank 0 has waited {seconds} s for {path}; storage does not answer" for seconds in ("0.5", "1")
    ]


def test_a_pipe_that_nobody_writes(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In place of a file that was scanned, it is named while it is waited for, and once it answers is no image."""
    loader = opened(folders)
    whole = epoch_of(loader)
    sample, path = image_of(loader, 2)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(read_ahead, "_PATIENCE_S", 0.3)
    timer = threading.Timer(1, lambda: os.close(os.open(path, os.O_WRONLY)))
    timer.start()
    assert_lost_once(loader, whole, sample, "Illegal seek")
    timer.join()
    assert f"rank 0 has waited 0.3 s for {path}; storage does not answer\n" in capfd.readouterr().err


def assert_lost_once(loader: Loader, whole: tuple[torch.Tensor, ...], sample: int, why: str) -> None:
    _, labels, ids = epoch_of(loader)
    assert torch.equal(labels, whole[1].masked_fill(ids == sample, IGNORE_LABEL))
    assert loader.take_bad() == [(loader.catalog.paths[sample], why)]


def test_a_pipe_among_the_images_is_not_opened(folders: Path) -> None:
    os.mkfifo(folders / "train/red/pipe.jpg")
    catalog = open_catalog(config(folders, batch=6), "train")
    assert catalog.bad == {"red/pipe.jpg": "a named pipe"} and len(catalog) == 42


# ---- how many are bad ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["none", "uniform"])
def test_ranks_together_count_each_bad_image_once(folders: Path, balance: Balance) -> None:
    """In each epoch another rank may meet it, or both; what may be skipped is a share of the images, not of the epochs."""
    cfg = replace(config(folders, batch=6), balance=balance)
    catalog = open_catalog(cfg, "train")
    catalog = replace(catalog, labels=(np.arange(len(catalog)) < 6).astype(np.int64))
    for path in catalog.paths[:2]:
        (catalog.root / path).unlink()
    (catalog.root / catalog.paths[2]).write_bytes(b"no image")
    ranks = [Loader(cfg, catalog, RankInfo(rank=rank, world=2), training=True, epochs=6) for rank in range(2)]
    for epoch in range(6):
        for loader in ranks:
            loader.seek(Cursor(epoch))
            take(loader)
        assert sum(loader.bad_images for loader in ranks) == 3, f"in epoch {epoch}"
    names = [path for loader in ranks for path, _ in loader.take_bad()]
    assert set(names) == set(catalog.paths[:3]) and max(map(names.count, names)) == 2


# ---- a cache that takes nothing ------------------------------------------------------------------------------------


def forgetful_lines(
    cache: Path, folders: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> list[str]:
    """Lines that are printed where both splits are scanned twice, although all of their images are found."""
    monkeypatch.setenv("SLUICE_CACHE", str(cache))
    for split, count in (("train", 42), ("val", 14)) * 2:
        assert len(open_catalog(config(folders, batch=6), split)) == count
    return capfd.readouterr().err.splitlines()


def test_a_full_cache_is_named_once(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "cache", "-t", "tmpfs", "-o", "size=64k", "none") as cache:
        (cache / "filler").write_bytes(bytes(64 << 10))
        assert forgetful_lines(cache, folders, monkeypatch, capfd) == [
            f"scanning {folders} anew each time: cache: cannot write to {cache}/scans (No space left on device)"
        ]
        assert not list(cache.glob("scans/*.npz")) and not list(cache.glob("scans/.*.partial"))
        (cache / "filler").unlink()
        assert forgetful_lines(cache, folders, monkeypatch, capfd) == []
        assert len(list(cache.glob("scans/*.npz"))) == 2


def test_a_cache_for_reading_only_is_named_once(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    with mounted(cache, "-t", "tmpfs", "-o", "ro", "none"):
        said = forgetful_lines(cache, folders, monkeypatch, capfd)
    assert len(said) == 1 and said[0].startswith(f"scanning {folders} anew each time: cache: cannot write to {cache}")


# ---- training ------------------------------------------------------------------------------------------------------


def train_and_lose(ranks: int, base: Path, folder: Path, count: int, share: str) -> tuple[Job, Path, set[str]]:
    """A training with so many of its images removed within the first epoch, as far as it came."""
    data, run = shutil.copytree(images(base), folder / "data"), folder / "run"
    options = settings_of(base, run) | {"data.path": str(data), "data.max_bad_share": share}
    job = Job(ranks, folder / "log", "trainer", *dotted(options))
    job.wait_for_step(run, 1)
    gone = sorted((data / "train").rglob("*.jpg"))[:count]
    for path in gone:
        path.unlink()
    return job, run, {str(path.relative_to(data / "train")) for path in gone}


def test_training_survives_images_that_vanish(base: Path, tmp_path: Path) -> None:
    job, run, gone = train_and_lose(2, base, tmp_path, 2, "0.04")
    assert job.wait() == 0, job.output()
    assert Store(run).progress().finished
    for path in gone:
        said = re.findall(
            rf"rank (\d) cannot read {path}: No such file or directory; the image does not count\n", job.output()
        )
        assert 1 <= len(said) == len(set(said)), "each rank that meets it says so once"
    found = [row["data/bad_images"] for row in rows(run) if row["step"] == STEPS]
    assert max(found) == 2


def test_training_ends_where_too_many_vanish(base: Path, tmp_path: Path) -> None:
    job, run, _ = train_and_lose(1, base, tmp_path, 10, "0.1")
    assert job.wait() == 2, job.output()
    last = job.output().splitlines()[-1]
    assert re.match(
        r"error: data\.max_bad_share: \d+ of the 57 images in .* cannot be read; mend them, or allow more", last
    )
    assert Store(run).newest() is not None
