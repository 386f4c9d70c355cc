"""The folders that people bring: taken as they are meant, or refused with a line that says what to give."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.config import Balance, DataConfig
from data_pipeline.sources.catalog import Catalog, open_catalog, open_images
from data_pipeline.summary import refuse_single_class, summary
from tests.conftest import KINDS, picture

JPEG = KINDS["plain.jpg"](picture(12, 16))
TWIN = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(80)


def lay(root: Path, files: dict[str, int | bytes]) -> Path:
    """Folder -> so many images in it, each with other bytes, or file -> content."""
    for name, what in files.items():
        path = root / name
        if isinstance(what, bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(what)
            continue
        path.mkdir(parents=True, exist_ok=True)
        for number in range(what):
            (path / f"{path.name}{number}.jpg").write_bytes(JPEG + f"{name}{number}".encode(errors="surrogateescape"))
    return root


def both(root: Path, **options: float) -> tuple[Catalog, Catalog]:
    cfg = DataConfig(path=str(root), **options)  # type: ignore[arg-type]
    train = open_catalog(cfg, "train")
    refuse_single_class(train)
    return train, open_catalog(cfg, "val", train.classes)


def said(root: Path) -> str:
    return "\n".join(summary(DataConfig(path=str(root)), *both(root)))


def two(*splits: str, count: int = 3) -> dict[str, int | bytes]:
    """The classes cat and dog in each of the folders."""
    return {f"{split}/{name}".lstrip("/"): count for split in splits for name in ("cat", "dog")}


TAKEN: dict[str, tuple[dict[str, int | bytes], int, int, str]] = {
    "Training, Testing": (two("Training", "Testing"), 6, 6, "Testing/"),
    "TRAIN, VAL": (two("TRAIN", "VAL"), 6, 6, "VAL/"),
    "train, valid, test": (two("train", "valid", "test"), 6, 6, "valid/"),
    "train, test": (two("train", "test"), 6, 6, "test/"),
    "training, validation, evaluation": (two("training", "validation", "evaluation"), 6, 6, "validation/"),
    "train, dev": (two("train", "dev"), 6, 6, "dev/"),
    "ImageNet's": (
        {**two("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val"), "ILSVRC/Annotations/a.xml": b"", "a.csv": b""},
        6,
        6,
        "ILSVRC/Data/CLS-LOC/val/",
    ),
    "Stanford's dogs": (
        {**two("Images"), "Annotation/cat/cat0": b"", "lists/train_list.mat": b""},
        4,
        2,
        "10 % of each class",
    ),
    "the folders of Intel's scenes": (
        {**two("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred": 4},
        6,
        6,
        "seg_test/seg_test/",
    ),
    "words that all share": (two("alphabet_train/alphabet_train", "alphabet_test"), 6, 6, "alphabet_test/"),
    "train2017, val2017": (two("train2017", "val2017"), 6, 6, "val2017/"),
    "trainset, testset": (two("trainset", "testset"), 6, 6, "testset/"),
    "nested": (two("data/flowers/train", "data/flowers/val"), 6, 6, "data/flowers/val/"),
    "nested beside what a Mac leaves": (
        {**two("chest/train", "chest/test"), "__MACOSX/chest/train/cat/._cat0.jpg": TWIN, ".DS_Store": b""},
        6,
        6,
        "chest/test/",
    ),
    "nested classes": ({**two("photos"), "README.txt": b"", "annotations/a.xml": b""}, 4, 2, "10 % of each class"),
    "train and unlabelled test": ({**two("train"), "test": 5}, 4, 2, "10 % of each class"),
    "unlabelled test in a folder": ({**two("train"), "test/unknown": 5}, 4, 2, "10 % of each class"),
    "train alone": (two("train"), 4, 2, "10 % of each class"),
    "pictures of trains": ({"bus": 3, "car": 3, "train": 3}, 6, 3, "10 % of each class"),
    "images a folder deeper in each class": (
        {"train/cat/images": 2, "train/dog/images": 2, "val/cat": 1, "val/dog": 1},
        4,
        2,
        "val/",
    ),
    "twins": ({**two("train", "val"), "train/cat/._cat0.jpg": TWIN, "val/dog/._dog0.jpg": TWIN}, 6, 6, "val/"),
    "hidden folders": (
        {**two("train", "val"), "train/cat/.ipynb_checkpoints/cat0-checkpoint.jpg": JPEG, "train/.cache": 3},
        6,
        6,
        "val/",
    ),
    "a server's thumbnails": (
        {**two("train", "val"), "train/cat/@eaDir/cat0.jpg/SYNOPHOTO_THUMB.jpg": JPEG},
        6,
        6,
        "val/",
    ),
    "jfif, jpe": (
        {**two("train", "val"), "train/fox/a.jfif": JPEG, "train/fox/b.JPE": JPEG, "val/fox": 1},
        8,
        7,
        "val/",
    ),
    "the archive that it came in": ({**two("flowers"), "flowers.tgz": b"\x1f\x8b", "flowers.zip": b"PK"}, 4, 2, "10 %"),
    "exact names beside others": ({**two("train", "val"), "train_images": 2, "val_notes/x.txt": b""}, 6, 6, "val/"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_folders_are_taken_as_they_are_meant(case: str, tmp_path: Path) -> None:
    files, train_count, val_count, val_from = TAKEN[case]
    train, val = both(lay(tmp_path, files))
    assert (len(train), len(val)) == (train_count, val_count)
    assert train.bad == val.bad == {}
    assert val.taken.val_from.startswith(val_from)
    for catalog in (train, val):
        for path, label in zip(catalog.paths, catalog.labels.tolist(), strict=True):
            assert path.split("/")[0] == catalog.classes[label]
    if train.root == val.root:
        assert not set(train.paths) & set(val.paths)


REFUSED: dict[str, tuple[dict[str, int | bytes], str]] = {
    "one class": ({"cat": 3}, "ROOT has images of one class only, cat"),
    "one class that has images": ({"cat": 3, "dog/notes.txt": b""}, "ROOT has images of one class only, cat"),
    "parts around the classes": (two("part a", "part b"), "ROOT/part a holds folders in place of images (cat, dog)"),
    "two datasets": (
        two("lungs/train", "lungs/val", "brains/train", "brains/val"),
        "ROOT/brains holds folders in place",
    ),
    "folds": (two("fold_0", "fold_1"), "the folders of ROOT (fold_0, fold_1) are named like parts of one set"),
    "parts": ({"images_part_1": 3, "images_part_2": 3}, "are named like parts of one set"),
    "train twice": (two("train", "Training", "val"), "ROOT has Training and train, which both look like train/"),
    "validation twice": (two("train", "val", "valid"), "ROOT has val and valid, which both look like val/"),
    "several sets": (
        two("a_train", "a_test", "b_train", "b_test"),
        "ROOT holds several datasets (a_train, b_train, …)",
    ),
    "test alone": ({"test": 3, "control": 3}, "ROOT has no train/ beside test/"),
    "validation alone": (two("valid"), "ROOT has no train/ beside valid/"),
    "no class folders in train": ({"train": 3, "val": 3}, "ROOT/train has no class folders"),
    "a class of validation alone": (
        {**two("train", "val"), "val/fox": 1},
        "ROOT/val/fox is a class that training lacks",
    ),
    "an archive": ({"images.7z": b"7z"}, "ROOT/images.7z is compressed"),
    "several tables": ({"train": 3, "a.csv": b"x,y\n", "b.csv": b"x,y\n"}, "several tables (ROOT/a.csv, ROOT/b.csv)"),
    "pictures, and masks of them": (
        {f"{split}/{name}": 2 for split in ("train", "test") for name in ("images", "masks")},
        "the folders of ROOT/train (images, masks) are named like parts of one set",
    ),
    "kinds that are not read": (
        {"cat/a.gif": b"GIF8", "dog/b.tif": b"II"},
        "no images in ROOT (of kinds that are not read, until converted to PNG or JPEG: 1 .gif file and 1 .tif file)",
    ),
    "as detectors have it": (
        {"train/images": 3, "train/labels/0.txt": b"0", "valid/images": 2},
        "named like parts of one set",
    ),
    "train beside classes": (two("train", ""), "ROOT has train/ and no val/ beside cat/, dog/"),
    "pictures and their masks": (two("", "ill/images", "ill/masks"), "ROOT/ill holds folders in place of images"),
    "validation in training": (two("train", "val", "train/val"), "ROOT/train/val holds folders in place of images"),
    "another case of a class": ({**two("train"), "val/Cat": 1, "val/dog": 1}, "ROOT/val/Cat is a class that training"),
    "validation without classes": (
        {**two("train"), "val/images": 3},
        "the folders of ROOT/val (images) are named like parts",
    ),
    "classes that hold whole datasets": (
        {**two("a/a/train", "a/a/test"), **two("b/b")},
        "ROOT/a/a holds folders in place of images (test, train)",
    ),
    "a table with other classes": (
        {
            "00": 12,
            "01": 12,
            "l.csv": b"image,label\n" + b"".join(b"0%d%d,%d\n" % (n % 2, n // 2, n // 2 % 4) for n in range(24)),
        },
        "ROOT/l.csv gives the images in the folders of ROOT classes that are not those folders; give the table",
    ),
    "thumbnails of what a table names": (
        {
            **{f"{name}/{n}.jpg": JPEG for name in ("images", "thumbs") for n in range(4)},
            "l.csv": b"id,kind\n0,a\n1,b\n2,a\n3,b\n",
        },
        "images that ROOT/l.csv names could be several files, as 0: images/0.jpg, thumbs/0.jpg; give the folder",
    ),
    "pictures beside parts of their annotation": (
        {
            "VOC/JPEGImages": 3,
            "VOC/SegmentationClass": 2,
            "VOC/Annotations/0.xml": b"",
            "VOC/ImageSets/train.txt": b"0",
        },
        "the folders of ROOT/VOC (Annotations, ImageSets, JPEGImages, …) are named like parts of one set",
    ),
    "pictures beside labels that are no table": (
        {"images": 3, "labels.xlsx": b"PK"},
        "the folders of ROOT (images) are named like parts of one set, not like classes; give a CSV table of labels as "
        "data.path (labels.xlsx may have them)",
    ),
    "pictures beside their metadata": (
        {"train": 3, "train/metadata.jsonl": b"{}"},
        "or give a CSV table of image names and labels (metadata.jsonl may have them)",
    ),
    "images without a suffix": (
        {f"{name}/{number}": JPEG for name in ("cat", "dog") for number in range(2)},
        "no images in ROOT (not named as images, so left out: 4 files, as cat/0)",
    ),
    "a class of other letters": (
        {**two("train"), "train/caf\u00e9": 2, "val/cafe\u0301": 2},
        "is a class that training lacks (training has 'caf\\xe9', perhaps the same); ",
    ),
    "classes from 1 on": (
        {"train/0": 2, "train/1": 2, "val/1": 2, "val/2": 2},
        "ROOT/val/2 is a class that training lacks (training has 0, 1)",
    ),
    "both shards and folders": ({**two(""), "0.tar": b""}, "ROOT holds both shards and folders of images (cat, dog)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_misread_is_refused(case: str, tmp_path: Path) -> None:
    files, line = REFUSED[case]
    with pytest.raises(UserError) as caught:
        both(lay(tmp_path, files))
    message = str(caught.value).replace(str(tmp_path), "ROOT")
    assert re.match(r"data\.(path|images): ", message) and line in message and "; " in message, message


NOTED: dict[str, tuple[dict[str, int | bytes], str]] = {
    "kinds that are not read": (
        {**two("train", "val"), "train/cat/a.gif": b"GIF8", "train/dog/b.TIF": b"II", "train/dog/c.tif": b"II"},
        "data: of kinds that are not read, until converted to PNG or JPEG: 1 .gif file and 2 .tif files",
    ),
    "classes without images": (
        {**two("train", "val"), "train/fox/x.txt": b""},
        "data: no training images of 1 of 3 classes: fox",
    ),
    "classes without validation": (
        {**two("train"), "val/cat": 2},
        "data: no validation images of 1 of 2 classes: dog",
    ),
    "images beside the classes": (
        {**two("train", "val"), "train/x.jpg": JPEG},
        "data: in no class folder of ROOT/train, so left out: 1 image, as x.jpg",
    ),
    "test beside val": (two("train", "val", "test"), "data: test/ is left alone, as val/ is there"),
    "unlabelled test": (
        {**two("train"), "test": 2},
        "data: test/ is left alone, as it has none of the class folders of train/",
    ),
    "folders beside the splits": ({**two("train", "val"), "extra": 2}, "data: left alone beside the splits: extra/"),
    "a table of the same classes": (
        {
            **two(""),
            "l.csv": b"image,label,width\n"
            + b"".join(b"%s%d,%s,9\n" % (c, n, c) for c in (b"cat", b"dog") for n in range(3)),
        },
        "data: left alone, as the folders are the classes: l.csv",
    ),
    "a table of tests": (
        {
            "train": 4,
            "train.csv": b"image,label\n" + b"".join(b"train%d,%d\n" % (n, n % 2) for n in range(4)),
            "test.csv": b"",
        },
        "data: left alone beside train.csv: test.csv",
    ),
    "files of other names": (
        {**two("train", "val"), "train/cat/a": JPEG, "train/cat/b": JPEG, "train/dog/a.jpg.1": JPEG, "val/x.txt": b""},
        "data: not named as images, so left out: 3 files, as cat/a, dog/a.jpg.1",
    ),
    "hidden classes": (
        {**two("train", "val"), "train/.net/a.jpg": JPEG, "train/.git/x": b""},
        "data: hidden, so left out: .net/",
    ),
    "folders in class folders": (
        {**two("train", "val"), "train/cat/fox": 2},
        "data: in folders inside class folders, and of their classes: 2 images, as cat/fox/fox0.jpg",
    ),
    "masks of images": (
        {**two("train", "val"), "train/cat/cat0_mask.png": JPEG, "train/cat/x_mask.png": JPEG},
        "data: named like masks of other images, and taken for images: 1 file, as cat/cat0_mask.png; move them away unless "
        "they are",
    ),
    "classes that differ in case": (
        {**two("train", "val"), "train/Cat": 2, "train/DOG ": 1},
        "data: classes that differ only in how they are written, and count as different ones: 'Cat' and 'cat', 'DOG ' and 'dog'",
    ),
    "labels in other files": (
        {**two("train", "val"), "train/metadata.jsonl": b"", "readme.txt": b""},
        "data: left alone, as the folders are the classes: metadata.jsonl",
    ),
    "few for validation": (two("train", "val"), "data: only 6 validation images: a single one is 16.7 % of top-1"),
}


@pytest.mark.parametrize("case", NOTED)
def test_what_is_left_aside_is_said_in_a_line(case: str, tmp_path: Path) -> None:
    files, line = NOTED[case]
    assert line in said(lay(tmp_path, files)).replace(str(tmp_path), "ROOT").splitlines()


def test_files_beside_images_without_labels_are_said(tmp_path: Path) -> None:
    lay(tmp_path, {"a": 2, "b.gif": b"GIF8", "a/c": JPEG})
    assert open_images(DataConfig(str(tmp_path))).taken.notes == [
        "of kinds that are not read, until converted to PNG or JPEG: 1 .gif file",
        "not named as images, so left out: 1 file, as a/c",
    ]


def test_names_cannot_reach_the_terminal(tmp_path: Path) -> None:
    text = said(lay(tmp_path, {"\x1b[31mcat": 2, "b\nc": 2, "d\udcff": 2}))
    assert "3 classes of 1 training image each: \\x1b[31mcat, b\\nc, d\\udcff" in text.splitlines()


def test_the_start_says_how_often_an_epoch_takes_the_images_of_a_class(tmp_path: Path) -> None:
    root = lay(tmp_path, {"train/cat": 8, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    train, val = both(root)
    plain = summary(DataConfig(str(root)), train, val)
    both_ways: tuple[tuple[Balance, str], ...] = (
        ("sqrt", "3 of dog, each image 1.5 times; 7 of cat, each image 0.875 times"),
        ("uniform", "5 of dog, each image 2.5 times; 5 of cat, each image 0.625 times"),
    )
    for balance, wanted in both_ways:
        cfg = DataConfig(str(root), balance=balance)
        new = set(summary(cfg, train, val)) - set(plain)
        assert new == {f"data.balance {balance}: an epoch of 10 images takes {wanted}"}


def test_two_lines_say_what_was_taken(tmp_path: Path) -> None:
    files: dict[str, int | bytes] = {
        "d/Training/cat": 110,
        "d/Training/dog": 120,
        "d/Testing/cat": 50,
        "d/Testing/dog": 50,
    }
    assert said(lay(tmp_path, files)).splitlines() == [
        f"data: {tmp_path} (class folders in d/Training/): 230 images to train on, 100 to validate on (d/Testing/)",
        "2 classes of 110 (cat) to 120 (dog) training images: cat, dog",
    ]


# Links


@pytest.mark.parametrize("target", ["..", ".", "../..", "../dog", "/"])
def test_a_link_that_leads_back_adds_nothing(target: str, tmp_path: Path) -> None:
    lay(tmp_path, two("train", "val"))
    (tmp_path / "train/cat/up").symlink_to(target)
    train, _ = both(tmp_path)
    assert sorted(train.paths) == sorted(f"{name}/{name}{number}.jpg" for name in ("cat", "dog") for number in range(3))
    line = "data: passed over, as they lead to folders that are read already or lie above: 1 link, as cat/up"
    assert line in said(tmp_path).splitlines()


def test_a_link_that_leads_back_is_no_class(tmp_path: Path) -> None:
    lay(tmp_path, two("train", "val"))
    for link, target in (("train/up", ".."), ("val/here", "."), ("again", ".")):
        (tmp_path / link).symlink_to(target)
    train, val = both(tmp_path)
    assert (len(train), len(val)) == (6, 6) and train.classes == ["cat", "dog"]
    line = "data: passed over, as they lead to folders that are read already or lie above: 1 link, as up"
    assert line in said(tmp_path).splitlines()


def test_options_of_a_table_are_said_to_change_nothing(tmp_path: Path) -> None:
    train, val = both(lay(tmp_path, two("train", "val")))
    columns = {"images": "elsewhere", "image_column": "id", "label_column": "breed", "split_column": "split"}
    for name, value in ({**columns, "labels": "multi"}).items():
        cfg = DataConfig(str(tmp_path), **{name: value})  # type: ignore[arg-type]
        line = f"data.{name} {value}: it is for a table that names images, and changes nothing here (class folders in train/)"
        assert line in summary(cfg, train, val)
    plain = summary(DataConfig(str(tmp_path)), train, val)
    assert summary(DataConfig(str(tmp_path), labels="single"), train, val) == plain


@pytest.mark.parametrize("link", ["val", "val/dog"])
def test_validation_on_the_training_images_is_said(link: str, tmp_path: Path) -> None:
    lay(tmp_path, {**two("train"), "other/cat": 2})
    if "/" in link:
        lay(tmp_path, {"val/cat": 2})
    (tmp_path / link).symlink_to(tmp_path / link.replace("val", "train"))
    share = "3 of 5, as val/dog/dog0.jpg and train/dog" if "/" in link else "6 of 6, as val/cat/cat0.jpg and train/cat"
    line = f"data: validation images that are training images too, byte by byte, so that scores are too good: {share}"
    assert line in said(tmp_path)


def test_links_to_each_other_end(tmp_path: Path) -> None:
    lay(tmp_path, two("train", "val"))
    (tmp_path / "train/cat/a").symlink_to("b")
    (tmp_path / "train/cat/b").symlink_to("a")
    (tmp_path / "train/cat/c").symlink_to("c")
    assert len(both(tmp_path)[0]) == 6


def test_a_class_that_is_a_dangling_link_is_no_class_less(tmp_path: Path) -> None:
    lay(tmp_path, two("train", "val"))
    (tmp_path / "train/fox").symlink_to("/not mounted/fox")
    with pytest.raises(UserError, match="train/fox is a link that leads nowhere; mend it or remove it"):
        both(tmp_path)


# Folders that cannot be listed


@contextmanager
def without_privileges() -> Iterator[None]:
    """While permissions hold for this thread, whoever runs the tests: Linux's capget, capset."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, none = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    none[:] = list(before)
    none[0] = none[3] = 0  # effective; what is permitted can be taken back
    assert libc.capset(header, none) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.mark.parametrize("closed", ["train/cat", "train", "val/dog/more", ""])
def test_a_folder_that_cannot_be_listed_is_an_error(closed: str, tmp_path: Path) -> None:
    """Its images would be missing without a word, also after it is mended."""
    lay(tmp_path / "data", {**two("train", "val"), "val/dog/more": 2})
    folder = tmp_path / "data" / closed
    folder.chmod(0)
    try:
        with without_privileges(), pytest.raises(UserError) as caught:
            both(tmp_path / "data")
    finally:
        folder.chmod(0o700)
    assert re.match(rf"data\.path: cannot (list|look into) .*{re.escape(closed)}.*Permission denied", str(caught.value))
    train, val = both(tmp_path / "data")
    assert (len(train), len(val)) == (6, 8)


def test_a_scan_with_unreadable_files_is_not_remembered(tmp_path: Path) -> None:
    lay(tmp_path, two("train", "val"))
    file = tmp_path / "train/cat/cat0.jpg"
    file.chmod(0)
    before = file.stat().st_mtime_ns
    with without_privileges():
        train, _ = both(tmp_path)
    assert train.bad == {"cat/cat0.jpg": "Permission denied"}
    file.chmod(0o600)
    os.utime(file, ns=(before, before))
    assert both(tmp_path)[0].bad == {}


# One folder, divided


def held(root: Path, share: float = 0.1) -> set[str]:
    return set(both(root, val_share=share)[1].paths)


def test_each_class_gives_its_share_and_one_at_least(tmp_path: Path) -> None:
    lay(tmp_path, {"large": 100, "middle": 14, "small": 2, "single": 1})
    names = [path.split("/")[0] for path in held(tmp_path)]
    assert {name: names.count(name) for name in ("large", "middle", "small", "single")} == {
        "large": 10,
        "middle": 1,
        "small": 1,
        "single": 0,
    }
    assert len(both(tmp_path, val_share=0.99)[0]) == 1 + 1 + 1 + 1, "and each keeps one to train on"


def test_added_images_move_few_others(tmp_path: Path) -> None:
    lay(tmp_path, {"a": 200, "b": 200})
    before = held(tmp_path)
    lay(tmp_path, {"new": 50})
    with_new = held(tmp_path)
    assert {path for path in with_new if not path.startswith("new/")} == before, "another class moves none"
    lay(tmp_path, {"a": 220})
    after = {path for path in held(tmp_path) if not path.startswith("new/")}
    assert len(before & after) >= 38 and len(after) == 42
    assert after < held(tmp_path, 0.3), "nor does a larger share"
