"""Folders of images become catalogs, or one line that says what is wrong with them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.sources.catalog import Catalog, _scan, open_catalog
from data_pipeline.sources.listing import Listing
from tests.conftest import HOSTILE_NAMES, KINDS, picture

JPEG = KINDS["plain.jpg"](picture(12, 16))


def fill(root: Path, *classes: str, images: int = 3) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            (root / name / f"{number}.jpg").write_bytes(JPEG)
    return root


def opened(root: Path, split: str = "train", classes: list[str] | None = None, val_share: float = 0.1) -> Catalog:
    return open_catalog(DataConfig(path=str(root), val_share=val_share), split, classes)


def rows(catalog: Catalog) -> list[tuple[str, str]]:
    labels: Sequence[int] = catalog.labels.tolist()
    return [(path, catalog.classes[label]) for path, label in zip(catalog.paths, labels, strict=True)]


def complaint(root: Path, split: str = "train", classes: list[str] | None = None, val_share: float = 0.1) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, split, classes, val_share)
    message = str(caught.value)
    assert "\n" not in message and re.match(r"data\.\w+: ", message)
    return message


def test_rows_spread_from_the_first_to_the_last(tmp_path: Path) -> None:
    catalog = opened(fill(tmp_path, "train/a", "train/b", "val/a", "val/b", images=5))
    assert len(catalog) == 10
    assert catalog.spread(4) == [0, 3, 6, 9] and catalog.spread(3) == [0, 4, 9] and catalog.spread(1) == [0]
    assert catalog.spread(10) == catalog.spread(99) == list(range(10))


# train/ and val/


def test_hostile_names_nested_folders_and_every_kind_of_file(folder: Path, streams: dict[str, bytes]) -> None:
    train, val = opened(folder), opened(folder, "val")
    assert train.classes == val.classes == sorted(HOSTILE_NAMES)
    assert (len(train), len(val)) == (2 * len(streams), len(streams))
    assert train.bad == val.bad == {}
    assert train.labels.dtype == np.int64
    for catalog in (train, val):
        for sample, (path, name) in enumerate(rows(catalog)):
            assert path.split("/")[0] == name
            assert catalog.read(sample) == streams[path.split("/")[-1].split(" ", 1)[1]]
    assert sum("sub folder/" in path for path in train.paths) == 10


def test_rows_are_sorted_by_class_and_path(tmp_path: Path) -> None:
    fill(tmp_path / "train", "b", "a", "a c", "B", images=12)
    fill(tmp_path / "val", "b")
    catalog = opened(tmp_path)
    assert catalog.classes == ["B", "a", "a c", "b"]
    names = sorted(f"{number}.jpg" for number in range(12))
    assert rows(catalog) == [(f"{name}/{file}", name) for name in catalog.classes for file in names]


def test_a_class_without_validation_images_keeps_its_label(tmp_path: Path) -> None:
    fill(tmp_path / "train", "ant", "bee", "cat")
    fill(tmp_path / "val", "ant", "cat")
    val = opened(tmp_path, "val")
    assert val.classes == ["ant", "bee", "cat"]
    assert val.labels.tolist() == [0, 0, 0, 2, 2, 2]


def test_given_classes_decide_the_labels(tmp_path: Path) -> None:
    fill(tmp_path / "val", "ant", "cat")
    val = opened(tmp_path, "val", ["cat", "bee", "ant"])
    assert val.classes == ["cat", "bee", "ant"]
    assert val.labels.tolist() == [0, 0, 0, 2, 2, 2]


def test_what_is_no_image_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", ".hidden")
    fill(tmp_path / "val", "a")
    for name in ("notes.txt", "labels.csv", "b.jpg.part", "jpg", "._0.jpg", ".hidden.jpg"):
        (tmp_path / "train/a" / name).write_bytes(JPEG)
    (tmp_path / "train/readme.jpg").write_bytes(JPEG)
    catalog = opened(tmp_path)
    assert catalog.classes == ["a"]
    assert catalog.paths == ["a/0.jpg", "a/1.jpg", "a/2.jpg"]
    assert catalog.bad == {}


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "a", "b")
    fill(tmp_path / "data/train", "a")
    (tmp_path / "data/train/a/more").symlink_to(tmp_path / "elsewhere/a")
    (tmp_path / "data/train/b").symlink_to(tmp_path / "elsewhere/b")
    (tmp_path / "data/val").symlink_to(tmp_path / "elsewhere")
    assert opened(tmp_path / "data").labels.tolist() == [0] * 6 + [1] * 3
    assert len(opened(tmp_path / "data", "val")) == 6


# Bad files


def test_bad_files_are_listed_with_reasons_and_left_out(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b")
    fill(tmp_path / "val", "a")
    bad = {
        "a/empty.jpg": b"",
        "a/half.jpg": JPEG[:-20],
        "b/a text.png": b"not found\n",
        "b/sub/animation.jpg": b"GIF89a" + bytes(50),
    }
    for path, stream in bad.items():
        (tmp_path / "train" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / path).write_bytes(stream)
    (tmp_path / "train/b/gone.jpg").symlink_to("nowhere.jpg")
    catalog = opened(tmp_path)
    assert len(catalog) == 6
    assert catalog.bad == {
        "a/empty.jpg": "the file is empty",
        "a/half.jpg": "truncated JPEG",
        "b/a text.png": "not a JPEG, PNG, BMP or WebP stream",
        "b/sub/animation.jpg": "not a JPEG, PNG, BMP or WebP stream, but GIF",
        "b/gone.jpg": "No such file or directory",
    }


def test_large_files_are_judged_by_both_ends(tmp_path: Path) -> None:
    large = KINDS["rgb.png"](picture(300, 400))
    assert len(large) > 1 << 17
    fill(tmp_path / "val", "a")
    folder = fill(tmp_path / "train", "a") / "a"
    (folder / "whole.png").write_bytes(large)
    (folder / "half.png").write_bytes(large[: len(large) // 2])
    (folder / "big header.jpg").write_bytes(KINDS["big header.jpg"](picture(300, 400)))
    (folder / "trailer.jpg").write_bytes(KINDS["plain.jpg"](picture(300, 400)) + bytes(100_000))
    catalog = opened(tmp_path)
    assert len(catalog) == 6
    assert catalog.bad == {"a/half.png": "truncated PNG"}


def test_a_file_that_arrives_during_the_scan_is_seen_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "train", "a")
    fill(tmp_path / "val", "a")
    os.utime(tmp_path / "train/a", (0, 0))  # file systems tell times apart by milliseconds at best

    def interrupted(listing: Listing) -> Catalog:
        fill(tmp_path / "train", "a", images=4)
        return _scan(listing)

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.sources.catalog._scan", interrupted)
        assert len(opened(tmp_path)) == 3
    assert len(opened(tmp_path)) == 4


# One folder, divided


def test_a_divided_folder_is_disjoint_and_complete(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b", images=1000)
    train, val = opened(tmp_path, val_share=0.2), opened(tmp_path, "val", val_share=0.2)
    assert sorted(train.paths + val.paths) == sorted(f"{name}/{n}.jpg" for name in "ab" for n in range(1000))
    assert not set(train.paths) & set(val.paths)
    # Five standard deviations of a binomial distribution.
    assert abs(len(val) - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5
    held_out = [{path[2:] for path in val.paths if path.startswith(name)} for name in "ab"]
    assert all(abs(len(files) - 200) < 5 * (1000 * 0.2 * 0.8) ** 0.5 for files in held_out)
    assert held_out[0] != held_out[1]


def test_the_division_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    first, second = (fill(tmp_path / name, "a", "b", images=50) for name in ("one", "another place"))
    assert opened(first, "val").paths == opened(second, "val").paths
    assert opened(first).fingerprint() == opened(second).fingerprint()


def test_everything_may_be_held_out(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    assert len(opened(tmp_path, "val", val_share=1)) == 6


# Fingerprints


def test_the_fingerprint_follows_names_and_labels(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b")
    fill(tmp_path / "val", "a", "b")
    same = opened(tmp_path).fingerprint()
    assert same == opened(tmp_path).fingerprint()
    seen = {same, *(opened(tmp_path, classes=[*names]).fingerprint() for names in ("ba", "xab"))}
    (tmp_path / "train/a/2.jpg").rename(tmp_path / "train/a/3.jpg")
    seen.add(opened(tmp_path).fingerprint())
    (tmp_path / "train/a/3.jpg").rename(tmp_path / "train/b/3.jpg")
    seen.add(opened(tmp_path).fingerprint())
    (tmp_path / "train/b/3.jpg").unlink()
    seen.add(opened(tmp_path).fingerprint())
    assert len(seen) == 6


# Mistakes


def test_a_missing_folder(tmp_path: Path) -> None:
    message = complaint(tmp_path / "no such folder")
    assert str(tmp_path / "no such folder") in message and "is not a folder; give one" in message


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "cats.rar").write_bytes(b"PK")
    assert f"{tmp_path / 'cats.rar'} is not a folder" in complaint(tmp_path / "cats.rar")


def test_validation_alone(tmp_path: Path) -> None:
    fill(tmp_path / "val", "a", "b")
    for split in ("train", "val"):
        message = complaint(tmp_path, split)
        assert f"{tmp_path} has no train/" in message and "add it" in message
    assert len(opened(tmp_path, "val", ["a", "b"])) == 6, "labels are those of training, unless they are given"


def test_an_empty_folder(tmp_path: Path) -> None:
    message = complaint(tmp_path)
    assert f"{tmp_path} has no class folders; put" in message


def test_an_empty_train_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    fill(tmp_path / "val", "a")
    assert f"{tmp_path / 'train'} has no class folders; put" in complaint(tmp_path)


def test_a_class_that_training_lacks(tmp_path: Path) -> None:
    fill(tmp_path / "train", "ant", "bee")
    fill(tmp_path / "val", "ant", "bee", "cat")
    message = complaint(tmp_path, "val")
    assert str(tmp_path / "val/cat") in message and "remove it or add it" in message
    assert len(opened(tmp_path)) == 6


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/notes.txt").write_text("none yet")
    fill(tmp_path / "val", "a")
    message = complaint(tmp_path)
    assert (
        f"no images in {tmp_path / 'train'}" in message
        and "put .bmp, .jfif, .jpe, .jpeg, .jpg, .png, .webp files" in message
    )


@pytest.mark.parametrize(("split", "val_share"), [("train", 1.0), ("val", 0.1)])
def test_a_share_that_leaves_nothing(tmp_path: Path, split: str, val_share: float) -> None:
    fill(tmp_path, "a", "b", images=1)
    message = complaint(tmp_path, split, val_share=val_share)
    assert message.startswith(f"data.val_share: {val_share} ") and str(tmp_path) in message
    assert f"for {split}; give another" in message


def test_only_bad_images(tmp_path: Path) -> None:
    fill(tmp_path / "val", "a")
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/x.jpg").write_bytes(b"")
    (tmp_path / "train/a/y.jpg").write_bytes(JPEG[:50])
    message = complaint(tmp_path)
    assert f"none of the 2 images in {tmp_path / 'train'} can be read" in message
    assert "a/x.jpg: the file is empty" in message and "give intact ones" in message
