"""Doubtful labels are told at the start: names of classes that are alike, and images that are there twice."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.class_names import doubts, lacking
from data_pipeline.config import DataConfig
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.summary import summary
from tests.conftest import encode, picture
from tests.data_pipeline.sources.test_webdataset import shard

ALIKE = "classes that differ only in how they are written, and count as different ones: "
NONE = "named as if it were missing, and taken for a class: "
LIST = "named like a list of other classes, and taken for one of its own: "


@pytest.mark.parametrize(
    ("classes", "lines"),
    [
        (["cat", "dog", "-1.5", "cats"], []),
        (["Cat", "cat", "dog"], [f"{ALIKE}'Cat' and 'cat'"]),
        (["0", "0.0", "01", "1", "10"], [f"{ALIKE}'0' and '0.0', '01' and '1'"]),
        (["caf\u00e9", "cafe\u0301"], [f"{ALIKE}'caf\\xe9' and 'cafe\\u0301'"]),
        (["hot dog", "hot_dog", "hotdog", "1 2", "12"], [f"{ALIKE}'hot dog' and 'hot_dog' and 'hotdog'"]),
        (["cat", "cat\u200b", "'dog'", "dog"], [f"{ALIKE}'cat' and 'cat\\u200b', \"'dog'\" and 'dog'"]),
        (["-1", "1", "NaN", "?"], [f"{NONE}-1, NaN, ?"]),
        (["0", "0 1", "1"], [f"{LIST}0 1"]),
        (["['cat']", "['cat', 'dog']", "['dog']"], [f"{LIST}['cat', 'dog']"]),
        (["cat;", "cat;dog;", "dog;"], [f"{LIST}cat;dog;"]),
        ([*"abcdefghijABCDEFGHIJ?'\" ", "mm", "Mm"], [f"{ALIKE}'mm' and 'Mm'"]),
        (["-1", "0", "1"], []),
        (["'", '"', " "], []),
        (["ski", "mask", "ski mask", *map(str, range(20))], []),
        (["ski", "mask", "ski, mask", *map(str, range(20))], [f"{LIST}ski, mask"]),
        ([*"abcdABCD"], [f"{ALIKE}'a' and 'A', 'b' and 'B', 'c' and 'C' and 1 more"]),
    ],
)
def test_names_of_classes_that_are_probably_mistakes(classes: list[str], lines: list[str]) -> None:
    assert doubts(classes) == lines


def test_a_class_that_training_lacks_is_shown_beside_those_that_it_has() -> None:
    assert lacking("cat", ["Cat ", "dog"]) == "training has 'Cat ', perhaps the same"
    assert lacking("2", ["0", "1"]) == "training has 0, 1"
    assert lacking("x", ["a", "b", "c", "d"]) == "training has a, b, c, …"


def said(root: Path) -> list[str]:
    cfg = DataConfig(str(root))
    train = open_catalog(cfg, "train")
    return [line for line in summary(cfg, train, open_catalog(cfg, "val", train.classes)) if "byte by byte" in line]


def images(count: int) -> list[bytes]:
    return [encode(picture(16, 20, seed=number), "PNG") for number in range(count)]


BOTH = "data: validation images that are training images too, byte by byte, so that scores are too good: "
CLASSES = "data: images that are the same byte by byte, and of different classes: "


@pytest.mark.parametrize("layout", ["folders", "zip", "shards"])
def test_images_that_are_there_twice(layout: str, tmp_path: Path) -> None:
    """In both splits, or in two classes; twice in one class of a split does no harm."""
    names = [f"{split}/{name}/{n}.png" for split in ("train", "val") for name in ("a", "b") for n in range(2)]
    files = dict(zip(names, images(8), strict=True))
    assert said(lay(tmp_path / "whole", files, layout)) == []
    twice = {"train/b/x.png": files["val/b/0.png"], "train/b/y.png": files["train/b/0.png"]}
    (line,) = said(lay(tmp_path / "both", files | twice, layout))
    assert line.startswith(f"{BOTH}1 of 4, as ") and line.endswith(
        "; remove one of each, or list it in data.quarantine"
    )
    other = {"train/b/x.png": files["train/a/0.png"], "val/a/y.png": files["val/b/1.png"]}
    (line,) = said(lay(tmp_path / "classes", files | other, layout))
    assert line.startswith(f"{CLASSES}2 pairs, as ")
    if layout == "folders":
        assert "train/a/0.png and train/b/x.png" in line or "val/a/y.png and val/b/1.png" in line


@pytest.mark.parametrize("same", [False, True])
def test_large_images_that_begin_and_end_alike_are_compared_whole(same: bool, tmp_path: Path) -> None:
    pixels = np.zeros((200, 200, 3), np.uint8)
    other = pixels.copy()
    other[80:90] = 0 if same else 255  # beyond the first 64 KiB and the last 4
    small = [f"{split}/{name}/0.bmp" for split in ("train", "val") for name in ("a", "b")]
    files = {path: encode(picture(9, 9, seed=seed), "BMP") for seed, path in enumerate(small)}
    files |= {
        "train/a/x.bmp": encode(Image.fromarray(pixels), "BMP"),
        "val/b/x.bmp": encode(Image.fromarray(other), "BMP"),
    }
    assert len(said(lay(tmp_path / "set", files, "folders"))) == 2 * same


def lay(root: Path, files: dict[str, bytes], layout: str) -> Path:
    root.mkdir()
    if layout == "zip":
        with zipfile.ZipFile(root / "set.zip", "w") as made:
            for name, data in files.items():
                made.writestr(name, data, zipfile.ZIP_DEFLATED)
    elif layout == "shards":
        for split in ("train", "val"):
            members: dict[str, bytes] = {}
            for name, data in files.items():
                own, label, stem = name.removesuffix(".png").split("/")
                if own == split:
                    members |= {f"{label}{stem}.png": data, f"{label}{stem}.cls": label.encode()}
            shard(root / split / "0.tar", members)
    else:
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    return root
