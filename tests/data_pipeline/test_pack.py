"""Packs hold the images they were made of, in bytes that neither the number of processes nor a kill can change."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.atomic_io import read_bytes
from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.pack.cli import PackConfig, pack, store
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.pack_format import Index, Pack, key, shard_name
from data_pipeline.summary import check_shards
from tests.conftest import ROOT, alpha, encode, picture
from tests.support import warm
from tests.support.runs import descendants, environment, state_of, tree

SHORT_SIDE = 40
OPTIONS = PackConfig(short_side=SHORT_SIDE, shard_size="100KB")


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return warm.run("data_pipeline.pack", *map(str, arguments), environment=environment(), cwd=cwd)


def start(log: Path, *arguments: str | Path) -> warm.Warm:
    return warm.Warm("data_pipeline.pack", *map(str, arguments), stdout=log, environment=environment())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The images of every kind, in three shards or more."""
    dst = tmp_path_factory.mktemp("packs") / "a pack"
    manifest, faults = pack(DataConfig(path=str(folder)), dst, OPTIONS, workers=2)
    assert not faults and manifest == json.loads((dst / "manifest.json").read_bytes())
    return dst


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNGs that take a while each, the first of them empty."""
    base = tmp_path_factory.mktemp("slow")
    for split, count in (("train", 40), ("val", 20)):
        for number in range(count):
            path = base / split / f"class {number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(picture(300, 400, seed=number), "PNG", compress_level=1))
    (base / "train/class 0/0.png").write_bytes(b"")
    return base


def reference(data: bytes, short_side: int) -> Image.Image:
    """Decode and resize an image by the plainest means."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = min(1, short_side / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def psnr_db(ours: Image.Image, theirs: Image.Image) -> float:
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return float(10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)))


def assert_like(jpeg: bytes, wanted: Image.Image, quality: int, least_db: float) -> None:
    """The JPEG differs little from `wanted` as encoded by itself, and hardly more from its pixels than that does."""
    ours, theirs = (Image.open(io.BytesIO(data)) for data in (jpeg, encode(wanted, "JPEG", quality=quality)))
    assert psnr_db(ours, theirs) > least_db
    assert psnr_db(ours, wanted) > psnr_db(theirs, wanted) - 0.6


# ---- what is stored


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_is_there_in_the_order_of_the_catalog(folder: Path, packed: Path, split: str) -> None:
    catalog = open_catalog(DataConfig(path=str(folder)), split)
    index = Pack.open(packed).index(split)
    assert (index.paths, index.classes) == (catalog.paths, catalog.classes)
    assert index.label.tolist() == catalog.labels.tolist()
    copied = 0
    for row in range(len(index)):
        source = catalog.read(row)
        stored = read_bytes(
            packed / split / shard_name(index.shard[row]), int(index.offset[row]), int(index.length[row])
        )
        ours, wanted = Image.open(io.BytesIO(stored)), reference(source, SHORT_SIDE)
        assert ours.format == "JPEG"
        assert ours.size == wanted.size == (index.width[row], index.height[row])
        if min(Image.open(io.BytesIO(source)).size) <= SHORT_SIDE and source.startswith(b"\xff\xd8"):
            assert stored == source
            copied += 1
        else:
            assert ours.mode == "RGB" and not ours.getexif() and "icc_profile" not in ours.info
            assert_like(stored, wanted, quality=90, least_db=40)
    counts = json.loads((packed / "manifest.json").read_bytes())["splits"][split]
    assert counts["images"] == len(index) == len(catalog)
    assert counts["copied"] == copied > 0
    assert counts["encoded"] == len(index) - copied > 0


def test_large_jpeg_looks_as_if_decoded_in_full() -> None:
    """Here the decoder reduces the image to a half or less before the filter does its part."""
    data = encode(picture(480, 640), "JPEG", quality=95)
    for short_side in (120, 60, 34):
        stored = store(data, PackConfig(short_side=short_side, quality=95))
        assert stored.encoded and min(stored.size) == short_side
        assert_like(stored.jpeg, reference(data, short_side), quality=95, least_db=37)


def test_sixteen_bits_are_scaled_and_alpha_is_dropped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    stored = store(encode(Image.fromarray(ramp), "PNG"), PackConfig(quality=95))
    assert np.abs(np.asarray(Image.open(io.BytesIO(stored.jpeg)))[..., 0] - ramp / 257).max() < 4
    image = picture(64, 48)
    stored = store(encode(alpha(image), "PNG"), PackConfig(quality=95))
    plain = store(encode(image, "PNG"), PackConfig(quality=95))
    assert stored.jpeg == plain.jpeg


def test_metadata_is_kept_with_copies_and_left_out_of_new_images() -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    data = encode(picture(60, 90), "JPEG", exif=tags.tobytes(), comment=b"a comment", icc_profile=bytes(500))
    assert store(data, PackConfig(short_side=60)).jpeg == data
    stored = store(data, PackConfig(short_side=30))
    assert stored.size == (30, 45)
    assert set(Image.open(io.BytesIO(stored.jpeg)).info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_bad_images_are_left_out_and_listed(tmp_path: Path) -> None:
    good, source = encode(picture(50, 70), "JPEG"), tmp_path / "source"
    png = encode(picture(50, 70), "PNG")
    spoilt = png[:200] + bytes(100) + png[300:]  # only a decoder can tell
    for split in ("train", "val"):
        for name, data in {"a/1.jpg": good, "a/2.jpg": b"", "b/3.png": spoilt, "b/4.jpg": good, "b/5.png": png}.items():
            (source / split / name).parent.mkdir(parents=True, exist_ok=True)
            (source / split / name).write_bytes(data)
    done = run(source, tmp_path / "pack", "--shard-size", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "the file is empty" in done.stdout and "train/a/2.jpg" in done.stdout
    manifest = Pack.open(tmp_path / "pack").manifest
    for split in ("train", "val"):
        part = manifest["splits"][split]
        assert {bad["path"] for bad in part["bad"]} == {"a/2.jpg", "b/3.png"} and all(bad["why"] for bad in part["bad"])
        assert (part["images"], part["copied"], part["encoded"]) == (3, 2, 1)
        assert [shard["images"] for shard in part["shards"]] == [2, 1]
        assert Pack.open(tmp_path / "pack").index(split).paths == ["a/1.jpg", "b/4.jpg", "b/5.png"]


def test_folder_is_divided_as_asked(tmp_path: Path) -> None:
    for number in range(60):
        path = tmp_path / "images" / f"class {number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(20, 20, seed=number), "JPEG"))
    done = run(tmp_path / "images", tmp_path / "pack", "--data.val_share", "0.4")
    assert done.returncode == 0, done.stderr
    for split in ("train", "val"):
        catalog = open_catalog(DataConfig(path=str(tmp_path / "images"), val_share=0.4), split)
        assert Pack.open(tmp_path / "pack").index(split).paths == catalog.paths


# ---- the format


def test_shards_keep_to_their_size(packed: Path) -> None:
    shards = sorted((packed / "train").glob("*.tar"))
    assert len(shards) > 2
    assert all(shard.stat().st_size <= 100_000 for shard in shards)
    assert [shard.name for shard in shards] == [f"{number:06d}.tar" for number in range(len(shards))]


def test_page_has_an_example_that_runs(packed: Path, tmp_path: Path) -> None:
    page = (ROOT / "data_pipeline/pack/README.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(example.split("\n\n", 1)[1].splitlines()) <= 10
    (tmp_path / "DST").symlink_to(packed)
    example += (
        "print(paths[row], len(paths))\nimport sys\nassert not any(m.startswith('data_pipeline') for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    index = Pack.open(packed).index("train")
    assert (done.returncode, done.stdout) == (0, f"{index.paths[3]} {len(index)}\n"), done.stderr


def test_webdataset_reads_it(packed: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    index = Pack.open(packed).index("train")
    shards = [str(packed / "train" / shard_name(number)) for number in range(index.shard.max() + 1)]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls"))
    assert [name for name, _, _ in samples] == [key(row) for row in range(len(index))]
    assert [label for _, _, label in samples] == index.label.tolist()
    assert [image.size for _, image, _ in samples] == list(zip(index.width, index.height, strict=True))


def test_index_keeps_any_name(tmp_path: Path) -> None:
    names = ["", "ü/猫.jpg", "a\nb", os.fsdecode(b"\xff\xfe.jpg"), "'\"\\"]
    numbers, label = np.arange(len(names)), np.zeros(len(names), int)
    index = Index(numbers, numbers, numbers, label, numbers, numbers, names, ["x"])  # type: ignore[arg-type]
    (tmp_path / "index.npz").write_bytes(index.to_bytes())
    again = Index.load(tmp_path / "index.npz")
    assert (again.paths, again.classes, again.offset.tolist()) == (names, ["x"], numbers.tolist())
    assert again.to_bytes() == index.to_bytes()


# ---- the same bytes


def test_number_of_processes_changes_nothing(folder: Path, packed: Path, tmp_path: Path) -> None:
    for workers in (1, 5):
        pack(DataConfig(path=str(folder)), tmp_path / str(workers), OPTIONS, workers=workers)
        assert tree(tmp_path / str(workers)) == tree(packed)


def test_killed_and_repeated_command_gives_the_same_bytes(slow_source: Path, tmp_path: Path) -> None:
    options = ("--short-side", "200", "--shard-size", "4", "--workers", "2")
    whole = run(slow_source, tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    dst = tmp_path / "killed"
    for notes in (1, 4, 8, 12):  # finished shards to wait for
        process = start(tmp_path / "log", slow_source, dst, *options)
        wait_until(lambda: len(list(tmp_path.glob("killed.partial/*.json"))) > notes or process.poll() is not None)  # noqa: B023
        family = list(descendants(process.pid))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not dst.exists()
        wait_until(lambda: all(state_of(pid) in "ZX" for pid in family))  # noqa: B023
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "killed.partial/pack/train").glob("*.tar")}
    with (tmp_path / "killed.partial/pack/val/000001.tar").open("r+b") as shard:
        shard.truncate(1000)  # a machine that went down may leave this
    assert run(slow_source, dst, *options).returncode == 0
    assert tree(dst) == tree(tmp_path / "whole")
    assert kept and all((dst / "train" / name).stat().st_ino == inode for name, inode in kept.items())
    assert not (tmp_path / "killed.partial").exists()


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_full_disk_is_one_line_and_no_end(slow_source: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    options = ("--shard-size", "4MB", "--workers", "2")
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline.pack", slow_source, tmp_path / "pack", *options],
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: DST: cannot write .*pack \(File too large\); .*\n", done.stderr)
    assert not (tmp_path / "pack").exists() and not list((tmp_path / "pack.partial").glob("*.tar"))
    assert run(slow_source, tmp_path / "pack", *options).returncode == 0


def test_vanished_source_is_one_line_and_no_end(
    slow_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that were there when their folder was scanned, and are not when they are to be packed."""
    source = shutil.copytree(slow_source, tmp_path / "source")

    def open_and_lose(cfg: DataConfig, split: str) -> Catalog:
        catalog = open_catalog(cfg, split)
        if split == "val":
            shutil.rmtree(source / "train/class 1")
        return catalog

    monkeypatch.setattr("data_pipeline.pack.cli.open_catalog", open_and_lose)
    with pytest.raises(UserError, match=r"SRC: cannot read .*class 1/.*\.png \(No such file or directory\)"):
        pack(DataConfig(path=str(source)), tmp_path / "pack", PackConfig())
    assert not (tmp_path / "pack").exists()


# ---- refusals


def test_repeated_command_leaves_the_pack_alone(folder: Path, packed: Path) -> None:
    before = tree(packed), (packed / "train/000000.tar").stat().st_mtime_ns
    leftover = packed.with_name("a pack.partial")  # of a process killed at the very end
    leftover.mkdir()
    shutil.copy(packed / "manifest.json", leftover / "plan.json")
    pack(DataConfig(path=str(folder)), packed, OPTIONS)
    assert not leftover.exists()
    assert (tree(packed), (packed / "train/000000.tar").stat().st_mtime_ns) == before


def test_other_options_are_refused(folder: Path, packed: Path, slow_source: Path, tmp_path: Path) -> None:
    before, cfg = tree(packed), DataConfig(path=str(folder))
    with pytest.raises(UserError, match=r"--quality was 90, now 80"):
        pack(cfg, packed, PackConfig(SHORT_SIDE, quality=80, shard_size="100KB"))
    with pytest.raises(UserError, match="from other train images"):
        pack(DataConfig(path=str(slow_source)), packed, OPTIONS)
    assert tree(packed) == before
    partial = tmp_path / "new.partial"
    partial.mkdir()
    plan = json.loads((packed / "manifest.json").read_bytes())
    (partial / "plan.json").write_text(json.dumps(plan | {"options": plan["options"] | {"short_side": 41}}))
    with pytest.raises(UserError, match=r"new\.partial was made otherwise \(--short-side was 41, now 40\)"):
        pack(cfg, tmp_path / "new", OPTIONS)
    (partial / "plan.json").write_text(json.dumps(plan | {"encoder": "Pillow 1"}))
    with pytest.raises(UserError, match="by Pillow 1, now Pillow"):
        pack(cfg, tmp_path / "new", OPTIONS)


def test_foreign_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    cfg = DataConfig(path=str(folder))
    for name in ("mine", "new.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text("[]")
    before = tree(tmp_path)
    for dst in (tmp_path / "mine", tmp_path / "new", tmp_path / "mine/plan.json", Path("/")):
        with pytest.raises(UserError, match="DST: "):
            pack(cfg, dst, OPTIONS)
    with pytest.raises(UserError, match="among the images of SRC"):
        pack(cfg, folder / "train/pack", OPTIONS)
    assert tree(tmp_path) == before


def test_second_process_is_refused(slow_source: Path, tmp_path: Path) -> None:
    options = ("--shard-size", "4", "--workers", "1")
    first = start(tmp_path / "log", slow_source, tmp_path / "pack", *options)
    wait_until(lambda: (tmp_path / "pack.partial/plan.json").exists() or first.poll() is not None)
    first.send_signal(signal.SIGSTOP)
    try:
        second = run(slow_source, tmp_path / "pack", *options)
    finally:
        first.send_signal(signal.SIGCONT)
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert "another process is at work" in second.stderr
    assert first.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("SRC",), "dst"),
        (("SRC", "DST", "--short-side", "wide"), "--short-side: wide does not fit; give a whole number"),
        (("SRC", "DST", "--quality", "96"), "--quality: 96 is out of range"),
        (("SRC", "DST", "--shard-size", "5 miles"), "--shard-size: 5 miles is no size"),
        (("SRC", "DST", "--shard-size", "0"), "--shard-size: 0 is too little"),
        (("nowhere", "DST"), "nowhere"),
        (("SRC", "DST", "--workers", "0"), "--workers: 0 is not positive"),
        (("SRC", "DST", "--colour"), "--colour"),
    ],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "SRC").symlink_to(folder)
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and said in done.stderr


def test_tar_members_are_plain(packed: Path) -> None:
    with tarfile.open(packed / "train/000000.tar", "r:") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:4]] == ["00000000.jpg", "00000000.cls", "00000001.jpg", "00000001.cls"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }


def test_shuffled_packs_have_all_classes_in_each_shard_and_always_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        pack(DataConfig(path=str(folder)), tmp_path / name, replace(OPTIONS, shuffle=True), workers=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    plain, mixed = (open_catalog(DataConfig(path=str(path)), "train") for path in (folder, tmp_path / "a"))
    assert sorted(plain.paths) == sorted(mixed.paths) != mixed.paths
    with pytest.raises(UserError, match="--shuffle was True, now None"):
        pack(DataConfig(path=str(folder)), tmp_path / "a", OPTIONS, workers=1)
    capsys.readouterr()
    check_shards(replace(mixed, labels=mixed.spans[:, 0]), 1)  # as if sorted by class
    assert "so that batches are one-sided" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no shards"):
        check_shards(plain, 1)
