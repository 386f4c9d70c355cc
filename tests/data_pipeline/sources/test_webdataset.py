"""Shards as people make them: each image once, in the split that its shard's name speaks of, or one line."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.sources.catalog import Catalog, open_catalog
from tests.conftest import KINDS, picture

JPEG = KINDS["plain.jpg"](picture(12, 16))


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, count: int) -> dict[str, bytes]:
    """Images in turn of the classes 0 and 1."""
    named = range(first, first + count)
    return {f"{n:03d}.{kind}": data for n in named for kind, data in (("jpg", JPEG), ("cls", b"%d" % (n % 2)))}


def both(root: Path) -> tuple[Catalog, Catalog]:
    train = open_catalog(DataConfig(path=str(root)), "train")
    return train, open_catalog(DataConfig(path=str(root)), "val", train.classes)


def complaint(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        both(root)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("set-train-0000.tar", "set-validation-00.tar"),
        ("train_0.tar", "val_0.tar"),
        ("imagenet-train-000000.tar", "imagenet-test-000000.tar"),
        ("Training.tar", "TESTING.tar"),
        ("Train/0.tar", "Valid/0.tar"),
        ("data/train/0.tar", "data/val/0.tar"),
    ],
)
def test_names_divide_shards(train: str, val: str, tmp_path: Path) -> None:
    shard(tmp_path / train, samples(0, 6))
    shard(tmp_path / val, samples(100, 4))
    trained, validated = both(tmp_path)
    assert (len(trained), len(validated)) == (6, 4)
    assert all(val.rpartition("/")[2] in path for path in validated.paths)
    assert validated.taken.val_from.startswith(("1 tar shard by name", f"{val.rpartition('/')[0]}/"))


def test_shards_for_tests_are_left_alone_beside_those_for_validation(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        shard(tmp_path / f"{name}-0.tar", samples(100 * number, 4))
    train, val = both(tmp_path)
    assert {path[:5] for path in train.paths} == {"train"} and {path[:4] for path in val.paths} == {"val-"}
    assert val.taken.notes == ["left alone: 1 shard, as test-0.tar"]


def test_shards_without_splits_give_a_share_of_each_class(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", samples(0, 20))
    shard(tmp_path / "1.tar", samples(20, 20))
    train, val = both(tmp_path)
    assert sorted(train.paths + val.paths) == [f"{n // 20}.tar/{n:03d}.jpg" for n in range(40)]
    assert val.labels.tolist().count(0) == val.labels.tolist().count(1) == 2
    assert all(catalog.read(row) == JPEG for catalog in (train, val) for row in range(len(catalog)))


@pytest.mark.parametrize(
    ("names", "said"), [(("train-0", "other-0"), "other-0.tar names none"), (("val-0", "test-0"), "none names train")]
)
def test_shards_of_which_some_name_a_split_are_refused(names: tuple[str, str], said: str, tmp_path: Path) -> None:
    for number, name in enumerate(names):
        shard(tmp_path / f"{name}.tar", samples(100 * number, 4))
    assert (
        complaint(tmp_path) == f"data.path: the shards of ROOT name splits, but {said}; move them into train/ and val/"
    )


@pytest.mark.parametrize(
    ("squeeze", "undo"), [(gzip.compress, "gunzip"), (bz2.compress, "bunzip2"), (lzma.compress, "unxz")]
)
def test_a_compressed_shard_says_how_to_undo_it(squeeze: Callable[[bytes], bytes], undo: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        file = shard(tmp_path / split / "0.tar", samples(0, 4))
        file.write_bytes(squeeze(file.read_bytes()))
    assert complaint(tmp_path) == (
        "data.path: the shard ROOT/train/0.tar is compressed, so no image in it can be reached alone; decompress it "
        f"(`{undo} < OLD.tar > NEW.tar`), as images are compressed already"
    )


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar.zst"])
def test_a_compressed_shard_by_its_name(name: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / name).write_bytes(b"")
    assert f"ROOT/train/{name} is compressed" in complaint(tmp_path)


def test_what_other_programs_leave_is_no_sample(tmp_path: Path) -> None:
    twins = {"._000.jpg": b"\0", "._000.cls": b"\0", "__MACOSX/._001.jpg": b"\0", "./.DS_Store": b"\0"}
    shard(tmp_path / "train/0.tar", twins | samples(0, 6))
    shard(tmp_path / "val/0.tar", {f"./{name}": data for name, data in samples(0, 4).items()} | twins)
    train, val = both(tmp_path)
    assert (len(train), len(val), train.bad, val.bad) == (6, 4, {}, {})
    assert train.taken.notes == []


@pytest.mark.parametrize(
    ("shards", "line"),
    [
        (
            {"0.tar": {f"a.{n}.{kind}": JPEG if kind == "jpg" else b"1" for n in range(4) for kind in ("jpg", "cls")}},
            "the shard ROOT/0.tar has several labels for the key '/a', as a.0.cls, a.1.cls; a key ends at the first dot",
        ),
        ({"train/0.tar": samples(0, 4), "train/val-0.tar": samples(4, 4), "val/0.tar": samples(4, 4)}, "another split"),
        ({"train/train-0.tar": samples(0, 4), "val/train-0.tar": samples(4, 4)}, "another split; move it"),
    ],
)
def test_samples_that_would_be_lost_or_validate_what_trains_are_refused(
    shards: dict[str, dict[str, bytes]], line: str, tmp_path: Path
) -> None:
    for name, members in shards.items():
        shard(tmp_path / name, members)
    assert line in complaint(tmp_path)


def test_a_name_twice_and_an_empty_shard_are_refused(tmp_path: Path) -> None:
    file = shard(tmp_path / "0.tar", samples(0, 4))
    with tarfile.open(file, "a") as tar:
        tar.addfile(tarfile.TarInfo("000.jpg"))
    assert "1 images in the shards of ROOT have the name of another" in complaint(tmp_path)
    file.write_bytes(b"")
    assert "ROOT/0.tar is cut off" in complaint(tmp_path)


def test_images_without_labels_are_counted_and_left_out(tmp_path: Path) -> None:
    shard(
        tmp_path / "train/0.tar", samples(0, 6) | {"006.jpg": JPEG, "007.jpg": JPEG, "007.cls": b" \n", "008.cls": b"1"}
    )
    shard(tmp_path / "val/0.tar", samples(0, 4))
    train, _ = both(tmp_path)
    assert len(train) == 6
    assert train.taken.notes == ["without a .cls, so left out: 2 images, as 0.tar/006.jpg"]


def test_two_images_of_a_sample_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "train/0.tar", {"a.png": JPEG, "a.jpg": JPEG, "a.cls": b"0", **samples(0, 4)})
    shard(tmp_path / "val/0.tar", samples(0, 4))
    said = "data.path: the shard ROOT/train/0.tar has several images for the key '/a', as a.png, a.jpg; call the one"
    assert complaint(tmp_path).startswith(said)


def test_the_image_goes_before_other_pictures_of_its_sample(tmp_path: Path) -> None:
    mask = KINDS["rgb.png"](picture(8, 8))
    members = {f"{n}.{kind}": data for n in range(4)
               for kind, data in (("mask.png", mask), ("jpg", JPEG), ("seg.png", mask), ("cls", b"%d" % (n % 2)))}  # fmt: skip
    for split in ("train", "val"):
        shard(tmp_path / split / "0.tar", members)
    train, _ = both(tmp_path)
    assert [train.read(row) for row in range(len(train))] == [JPEG] * 4


# Claims


def claiming(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_label_or_header_of_100_gb_is_one_line(kind: bytes, tmp_path: Path) -> None:
    """The file is sparse: it takes no room on the disk, and would take all of the memory."""
    size = 100 << 30
    file = shard(tmp_path / "train/0.tar", samples(0, 4) | {"004.jpg": JPEG})
    shard(tmp_path / "val/0.tar", samples(0, 4))
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + 512 * -(-len(JPEG) // 512)
    with open(file, "r+b") as stream:
        stream.seek(end)
        stream.write(claiming("004.cls", size, kind))
        stream.truncate(end + size + 3 * 512)
    assert complaint(tmp_path) == (
        "data.path: the shard ROOT/train/0.tar cannot be read (a header or label of 107374182400 bytes); copy it again or "
        "remove it"
    )


def test_an_image_of_100_gb_is_one_bad_file(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.jpg").write_bytes(JPEG)
    with open(tmp_path / "train/cat/huge.jpg", "wb") as stream:
        stream.write(JPEG[:400])
        stream.truncate(100 << 30)
    assert both(tmp_path)[0].bad == {"cat/huge.jpg": "its 107,374,182,400 bytes are more than any image takes"}
