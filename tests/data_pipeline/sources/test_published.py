"""Data sets as they are published: what a run says of each, and what comes close to one is refused in a line."""

import gzip
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pytest
import scipy.io  # type: ignore[import-untyped]
from pyarrow import parquet

from data_pipeline.bench.source_writers import write_imagenet_tars, write_parquet
from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sources.catalog import Catalog, open_catalog, open_images
from data_pipeline.sources.image_headers import BadImage
from data_pipeline.sources.published import parquet_images
from data_pipeline.sources.published.mat_file import read_structs
from data_pipeline.sources.published.parquet_images import Column, parquet_rows
from data_pipeline.sources.published.stored_forms import read_form
from data_pipeline.sources.quarantine import relative_to_data
from data_pipeline.summary import summary
from tests.conftest import KINDS, picture
from tests.support.published import KIT, PUBLISHED, write_kit

JPEG = KINDS["plain.jpg"](picture(12, 16))
CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with twelve images and val/ with six, of three classes."""
    root = tmp_path_factory.mktemp("folders")
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                data = KINDS["plain.jpg"](picture(20, 30, 10 * label + number + 100 * (split == "val")))
                (root / split / name / f"{number}.jpg").write_bytes(data)
    return root


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest, folders: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(str(PUBLISHED[request.param](folders, tmp_path / "published")))


def both(path: Path, **options: str) -> tuple[Catalog, Catalog]:
    cfg = DataConfig(path=str(path), **options)  # type: ignore[arg-type]
    train = open_catalog(cfg, "train")
    return train, open_catalog(cfg, "val", train.classes)


def said(path: Path, **options: str) -> str:
    return "\n".join(summary(DataConfig(path=str(path)), *both(path, **options))).replace(str(path), "PATH")


def complaint(path: Path, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        both(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "PATH")


def streams(catalog: Catalog) -> list[bytes]:
    return [catalog.read(row) for row in range(len(catalog))]


def test_a_second_start_reads_the_cache(published: DataConfig, folders: Path) -> None:
    for split in ("train", "val"):
        wanted = [file.read_bytes() for file in sorted((folders / split).glob("*/*"))]
        first, again = (open_catalog(published, split) for _ in range(2))
        assert streams(first) == streams(again) == wanted
        assert first.labels.tolist() == [row for row in range(3) for _ in range(len(wanted) // 3)]
        assert (first.paths, first.forms, first.taken) == (again.paths, again.forms, again.taken)
        assert len(set(first.paths)) == len(wanted) and first.bad == {}


def test_a_quarantine_leaves_an_image_out(published: DataConfig, tmp_path: Path) -> None:
    train = open_catalog(published, "train")
    name = relative_to_data(published, train.root, train.paths[5])
    (tmp_path / "bad.txt").write_text(f"{name}\n")
    rest = open_catalog(replace(published, quarantine=str(tmp_path / "bad.txt")), "train")
    assert rest.paths == train.paths[:5] + train.paths[6:] and streams(rest) == streams(train)[:5] + streams(train)[6:]


def test_a_pack_takes_it_in_one_command(published: DataConfig, tmp_path: Path) -> None:
    train = open_catalog(published, "train")
    packed, faults = pack(published, tmp_path / "pack", PackConfig(), workers=1)
    assert faults == [] and packed["splits"]["train"]["copied"] == 12
    assert streams(open_catalog(DataConfig(str(tmp_path / "pack")), "train")) == streams(train)


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        (
            "ImageNet's tars",
            "data: PATH (ImageNet's tars: ILSVRC2012_img_train.tar of 3 class tars): 12 images to train on, 6 to validate on "
            "(ILSVRC2012_img_val.tar, by the kit's ground truth)\n"
            "3 classes of 4 training images each: n00000000, n00000001, n00000002",
        ),
        (
            "Kaggle's ImageNet",
            "data: PATH (Kaggle's ImageNet, class folders in ILSVRC/Data/CLS-LOC/train/): 12 images to train on, 6 to validate "
            "on (ILSVRC/Data/CLS-LOC/val/ by LOC_val_solution.csv)\n",
        ),
        (
            "zip, deflated",
            "data: PATH (class folders in set.zip/set/train): 12 images to train on, 6 to validate on (set/val/)\n"
            "3 classes of 4 training images each: cat, dog, emu\n"
            "data: compressed in the zip file, and decompressed at each reading; to do so once: python -m data_pipeline.pack: 12 "
            "images\n",
        ),
        (
            "Parquet",
            "data: PATH (2 Parquet files: images in image, classes by label): 12 images to train on, 6 to validate on (2 files "
            "by name, as val-00000-of-00002.parquet)\n3 classes of 4 training images each: cat, dog, emu\ndata: only",
        ),
        (
            "Parquet, zstd",
            "data: images are compressed in row groups, as in train-00000-of-00002.parquet, so that each reading of one "
            "reads many; to read faster, once: python -m data_pipeline.pack\n",
        ),
        (
            "Arrow",
            "(1 Arrow file: images in image, classes by label): 12 images to train on, 6 to validate on (1 file by name",
        ),
    ],
)
def test_a_start_says_what_was_taken(layout: str, line: str, folders: Path, tmp_path: Path) -> None:
    assert line in said(PUBLISHED[layout](folders, tmp_path / "published"))


# ImageNet's tars


@pytest.mark.parametrize("compressed", [True, False])
def test_a_matlab_file_is_read_as_scipy_reads_it(compressed: bool, tmp_path: Path) -> None:
    write_kit(tmp_path, 3, [0], compressed=compressed)
    with tarfile.open(tmp_path / f"{KIT}.tar.gz") as tar:
        file = tar.extractfile(f"{KIT}/data/meta.mat")
        assert file
        data = file.read()
    theirs = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    ours = read_structs(data, "synsets")
    assert [tuple(record.values()) for record in ours] == [tuple(record) for record in theirs]
    assert list(ours[0]) == list(theirs.dtype.names)
    for damaged in (data[:90], data[:200], data[:-9], data[:126] + b"MI" + data[128:]):
        with pytest.raises(ValueError):
            read_structs(damaged, "synsets")


def imagenet(folders: Path, into: Path) -> Path:
    return PUBLISHED["ImageNet's tars"](folders, into)


def test_imagenet_without_its_validation_images_or_its_kit(folders: Path, tmp_path: Path) -> None:
    root = imagenet(folders, tmp_path / "set")
    (root / f"{KIT}.tar.gz").rename(tmp_path / "kit")
    assert complaint(root) == (
        f"data.path: PATH has ILSVRC2012_img_val.tar and no {KIT}.tar.gz, which holds the classes of its images; put the kit "
        "beside it, or move ILSVRC2012_img_val.tar elsewhere to validate on a share of ILSVRC2012_img_train.tar"
    )
    subprocess.run(["tar", "-xzf", tmp_path / "kit", "-C", root], check=True)
    assert len(both(root)[1]) == 6  # the kit's own folder
    (root / "ILSVRC2012_img_val.tar").unlink()
    assert "9 images to train on, 3 to validate on (10 % of each class, by a hash of the names)" in said(root)


def test_imagenets_validation_tar_alone_needs_the_classes(folders: Path, tmp_path: Path) -> None:
    root = imagenet(folders, tmp_path / "set")
    classes = open_catalog(DataConfig(str(root)), "train").classes
    (root / "ILSVRC2012_img_train.tar").unlink()
    assert "and no ILSVRC2012_img_train.tar beside it; add it" in complaint(root)
    assert len(open_catalog(DataConfig(str(root)), "val", classes)) == 6


@pytest.mark.parametrize(
    ("name", "spoil", "line"),
    [
        ("ILSVRC2012_img_train.tar", lambda data: data[:-9000], "is cut off; copy it again"),
        ("ILSVRC2012_img_train.tar", lambda data: data[:600] + b"?" + data[601:], "is no plain tar at byte 512"),
        ("ILSVRC2012_img_val.tar", lambda data: data[:5000], "ILSVRC2012_img_val.tar is cut off"),
        (
            f"{KIT}.tar.gz",
            lambda data: data[: len(data) // 2],
            "the development kit PATH/ILSVRC2012_devkit_t12.tar.gz cannot be read (",
        ),
        (f"{KIT}.tar.gz", lambda _: gzip.compress(bytes(10240)), "('meta.mat' is missing); get it again"),
    ],
)
def test_damaged_tars_are_refused(
    name: str, spoil: Callable[[bytes], bytes], line: str, folders: Path, tmp_path: Path
) -> None:
    root = imagenet(folders, tmp_path / "set")
    (root / name).write_bytes(spoil((root / name).read_bytes()))
    assert line in complaint(root)


def test_another_tar_of_imagenets_name_is_refused(folders: Path, tmp_path: Path) -> None:
    root = imagenet(folders, tmp_path / "set")
    (root / "ILSVRC2012_img_val.tar").replace(root / "ILSVRC2012_img_train.tar")
    assert (
        "is not ImageNet's, a tar of tars such as n01440764.tar, but holds 'ILSVRC2012_val_00000001.JPEG'"
        in complaint(root)
    )


def test_a_kit_of_other_images_is_refused(folders: Path, tmp_path: Path) -> None:
    root = write_kit(write_imagenet_tars(folders, tmp_path / "set"), 3, [0, 1])
    assert "has 6 images, and PATH/ILSVRC2012_devkit_t12.tar.gz classes of 2" in complaint(root)


# Kaggle's ImageNet


@pytest.mark.parametrize("inside", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC", ".."])
def test_kaggles_imagenet_by_any_of_its_folders(inside: str, folders: Path, tmp_path: Path) -> None:
    root = PUBLISHED["Kaggle's ImageNet"](folders, tmp_path / "around/imagenet")
    train, val = both(root / inside)
    assert (len(train), len(val), val.labels.tolist()) == (12, 6, [0, 0, 1, 1, 2, 2])


def test_kaggles_imagenet_without_its_solution(folders: Path, tmp_path: Path) -> None:
    root = PUBLISHED["Kaggle's ImageNet"](folders, tmp_path / "imagenet")
    solution = root / "LOC_val_solution.csv"
    lines = solution.read_text().splitlines()
    solution.write_text("\n".join(lines[:-1]) + "\n")
    assert "1 images of val/ are left out, as LOC_val_solution.csv has no class for them" in said(root)
    solution.write_text("\n".join([*lines, "ILSVRC2012_val_00000009,n00000000 1 2 3 4"]) + "\n")
    assert "1 of the 7 images that PATH/LOC_val_solution.csv names are not in" in complaint(root)
    solution.unlink()
    assert complaint(root) == (
        "data.path: PATH/ILSVRC/Data/CLS-LOC/val has its images in no class folders; put LOC_val_solution.csv, which names "
        "their classes, into PATH"
    )


# Zip files


def archive(file: Path, names: list[str], data: bytes = JPEG, method: int = zipfile.ZIP_STORED) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, data, method)
    return file


def some(*tops: str, count: int = 3) -> list[str]:
    return [f"{top}/{name}/{number}.jpg" for top in tops for name in ("a", "b") for number in range(count)]


@pytest.mark.parametrize(
    ("names", "val_from"),
    [
        (some("train", "val"), "val/"),
        (some("Set/Training", "Set/Testing"), "Set/Testing/"),
        ([*some("x/train", "x/valid", "x/test"), "__MACOSX/x/._0.jpg"], "x/valid/"),
        (some("train/train", "test/test"), "test/test/"),
        (some("only"), "10 % of each class, by a hash of the names"),
        (["train/a/deep/er/0.jpg", "train/b/0.jpg", "val/a/0.jpg", "val/b/0.jpg"], "val/"),
        (["s\\train\\a\\0.jpg", "s\\train\\b\\0.jpg", "s\\val\\a\\0.jpg"], "s/val/"),
    ],
)
def test_class_folders_in_a_zip_file(names: list[str], val_from: str, tmp_path: Path) -> None:
    train, val = both(archive(tmp_path / "set.zip", names))
    assert train.classes == ["a", "b"] and val.taken.val_from == val_from
    assert streams(train) + streams(val) == [JPEG] * (len(train) + len(val))


def test_a_table_beside_class_folders_in_a_zip_file_is_told(tmp_path: Path) -> None:
    file = archive(tmp_path / "set.zip", [*some("train", "val"), "labels.csv"])
    assert "data: left alone, as the folders are the classes: labels.csv\n" in said(file)


def test_files_in_a_zip_file_that_are_left_out_are_told(tmp_path: Path) -> None:
    stray = ["train/a/x", "train/b/y.jpg.1", "train/a/c/z.jpg", "LICENSE"]
    hidden = ["train/.net/0.jpg", "__MACOSX/train/a/._0.jpg", "train/a/.thumbs/x", "train/a/._0.jpg"]
    text = said(archive(tmp_path / "set.zip", [*some("train", "val"), *stray, *hidden]))
    assert "data: hidden, so left out: train/.net/\n" in text
    assert "data: not named as images, so left out: 2 files, as train/a/x, train/b/y.jpg.1\n" in text
    assert "data: in folders inside class folders, and of their classes: 1 image, as a/c/z.jpg\n" in text


def test_an_archive_a_split(tmp_path: Path) -> None:
    for name in ("train", "val"):
        archive(tmp_path / f"{name}.zip", some(name) if name == "train" else ["a/0.jpg", "b/1.jpg"])
    train, val = both(tmp_path)
    assert (len(train), val.paths) == (6, ["val/a/0.jpg", "val/b/1.jpg"])


@pytest.mark.parametrize("deflated", [True, False])
def test_kaggles_imagenet_in_a_zip_file(deflated: bool, folders: Path, tmp_path: Path) -> None:
    root = PUBLISHED["Kaggle's ImageNet"](folders, tmp_path / "set")
    with zipfile.ZipFile(
        tmp_path / "imagenet.zip", "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    ) as made:
        for file in sorted(root.rglob("*.*")):
            made.write(file, file.relative_to(root))
    for ours, theirs in zip(both(tmp_path / "imagenet.zip"), both(root), strict=True):
        assert streams(ours) == streams(theirs) and ours.labels.tolist() == theirs.labels.tolist()


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["0.jpg", "1.jpg"], "has no class folders; unzip it, and give a table"),
        (["0.jpg", "labels.csv"], "PATH has no class folders, and a table, labels.csv; unzip it"),
        (["images_1/0.jpg", "images_2/0.jpg"], "are named like parts of one set, not like classes"),
        (["VOC/JPEGImages/0.jpg", "VOC/SegmentationClass/0.png"], "are named like parts of one set, not like classes"),
        (["a/x/0.jpg", "a/y/0.jpg", "b/0.jpg"], "PATH/a holds folders in place of images (x, y, …)"),
        ([*some("train"), "val/c/0.jpg"], "PATH/val has a class that training lacks: c"),
        (some("val", "other"), "PATH has val/ and not both train/ and val/"),
        (["readme.txt"], "no images in PATH; unzip it"),
        (["../a/0.jpg", "b/0.jpg"], "has a member '../a/0.jpg' that leads elsewhere"),
    ],
)
def test_zip_files_that_are_refused(names: list[str], line: str, tmp_path: Path) -> None:
    file = archive(tmp_path / "set.zip", names)
    assert line in complaint(file)


def flagged(data: bytes, bit: int) -> bytes:
    """Set a bit in the flags of each member in the index."""
    parts = data.split(b"PK\1\2")
    return parts[0] + b"".join(b"PK\1\2" + part[:4] + bytes([part[4] | bit]) + part[5:] for part in parts[1:])


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda data: flagged(data, 1), "PATH is encrypted, as 'train/a/0.jpg'; unzip it with its password"),
        (
            lambda data: data[:-100],
            "PATH cannot be read (File is not a zip file); download it again, and join it first",
        ),
        (lambda data: data.replace(b"PK\3\4", b"PK\3\5"), "no file at byte 0, where its index has 'train/a/0.jpg'"),
    ],
)
def test_zip_files_that_cannot_be_read(spoil: Callable[[bytes], bytes], line: str, tmp_path: Path) -> None:
    file = archive(tmp_path / "set.zip", some("train", "val"))
    file.write_bytes(spoil(file.read_bytes()))
    assert line in complaint(file)


def test_other_compressions_of_a_zip_file_are_named(tmp_path: Path) -> None:
    file = archive(tmp_path / "set.zip", some("train", "val"), method=zipfile.ZIP_BZIP2)
    assert "PATH is compressed by method 12, where images are read from stored or deflated members" in complaint(file)


def test_a_large_zip_file_has_fields_of_64_bits(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as made:
        for name in some("train", "val"):
            with made.open(zipfile.ZipInfo(name), "w", force_zip64=True) as stream:
                stream.write(JPEG)
    assert streams(both(tmp_path / "set.zip")[0]) == [JPEG] * 6


def test_damage_in_a_deflated_image_is_one_bad_file(tmp_path: Path) -> None:
    file = archive(tmp_path / "set.zip", some("train", "val"), method=zipfile.ZIP_DEFLATED)
    data = bytearray(file.read_bytes())
    start = data.find(b"train/a/0.jpg") + len(b"train/a/0.jpg")
    data[start : start + 40] = b"\xff" * 40
    file.write_bytes(data)
    assert both(file)[0].bad == {"set.zip/train/a/0.jpg": "damaged in the zip file"}


def test_a_table_beside_a_zip_file_needs_it_unpacked(tmp_path: Path) -> None:
    archive(tmp_path / "train.zip", ["0.jpg"])
    (tmp_path / "labels.csv").write_text("id,label\n0,a\n")
    assert complaint(tmp_path) == (
        "data.path: PATH has labels.csv beside train.zip, and a table's images are not read from zip files; unzip train.zip "
        "and give the table, or give PATH/train.zip for class folders in it"
    )


# Parquet and Arrow


def table(file: Path, rows: int = 8, metadata: bytes | None = None, **columns: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = [{"bytes": JPEG, "path": f"{row}.jpg"} for row in range(rows)]
    made = pyarrow.table({"image": image, "label": [row % 2 for row in range(rows)], **columns})
    parquet.write_table(made.replace_schema_metadata({"huggingface": metadata} if metadata else {}), file)
    return file


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_of_groups_keeps_rows_together(kind: str, tmp_path: Path) -> None:
    patients = [f"patient {row // 4}" for row in range(48)]
    label = [row // 4 % 2 for row in range(48)]
    file = table(tmp_path / "set.parquet", 48, label=label, patient=patients, empty=[None] * 48)
    if kind == "arrow":
        made, file = parquet.read_table(file), tmp_path / "set.arrow"
        with pyarrow.ipc.new_stream(str(file), made.schema) as stream:
            stream.write_table(made)
    train, val = both(file, group="patient", val_share=0.3)  # type: ignore[arg-type]
    ids = [{patients[int(path.split("/")[1])] for path in catalog.paths} for catalog in (train, val)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 12 and len(train) + len(val) == 48
    assert "12 groups by patient undivided" in said(file, group="patient")
    assert "name the one with the groups" in complaint(file, group="doctor")
    assert "/0/0.jpg has no empty; fill it in" in complaint(file, group="empty")


def test_files_are_divided_by_their_names_or_folders(tmp_path: Path) -> None:
    for root, names in {
        "a": (
            "data/train-00000-of-00001-0abc.parquet",
            "data/validation-00000-of-00001.parquet",
            "data/test-0.parquet",
        ),
        "b": ("default/train/0000.parquet", "default/test/0000.parquet"),
        "c": ("0000.parquet", "0001.parquet"),
    }.items():
        for number, name in enumerate(names):
            table(tmp_path / root / name, 8 + 4 * number)
    assert [len(part) for part in both(tmp_path / "a")] == [8, 12]
    assert "data: left alone: 1 file, as data/test-0.parquet\n" in said(tmp_path / "a")
    assert [len(part) for part in both(tmp_path / "b")] == [8, 12]
    assert [len(part) for part in both(tmp_path / "c")] == [18, 2]
    table(tmp_path / "b/other/train/0000.parquet")
    assert "PATH holds several data sets or configurations (default/test/0000.parquet, other/" in complaint(
        tmp_path / "b"
    )
    table(tmp_path / "c/val-0.parquet")
    assert "the files of PATH name splits, but 0000.parquet names none" in complaint(tmp_path / "c")


def test_files_that_are_missing_are_told(folders: Path, tmp_path: Path) -> None:
    root = write_parquet(folders, tmp_path / "set", compression="none", splits=("train", "val"), files=3)
    (root / "train-00001-of-00003.parquet").unlink()
    assert "data: only 2 of the 3 files of train are there; download the others, or train without them\n" in said(root)


def test_rows_without_an_image_or_a_class_are_left_out(tmp_path: Path) -> None:
    image = [{"bytes": JPEG, "path": None}] * 6 + [{"bytes": None, "path": "elsewhere.jpg"}, None]
    file = table(tmp_path / "set.parquet", image=image, label=[0, 1, 0, 1, -1, None, 0, 1])
    assert "data: without an image or a class, so left out: 4 rows\n" in said(file)
    train, val = both(file)
    assert streams(train) + streams(val) == [JPEG] * 4
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table(tmp_path / "set.parquet", image=pyarrow.array([{"bytes": None, "path": "elsewhere.jpg"}] * 8, kind))
    assert "no row of PATH has both an image's bytes and a class; images by their paths alone" in complaint(file)


def test_classes_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    metadata = b'{"info": {"features": {"label": {"names": ["crane", "crane"], "_type": "ClassLabel"}}}}'
    assert both(table(tmp_path / "set.parquet", metadata=metadata))[0].classes == ["crane (0)", "crane (1)"]


def test_columns_are_found_with_certainty_or_refused(tmp_path: Path) -> None:
    features = {
        "fine": {"names": ["x", "y"], "_type": "ClassLabel"},
        "coarse": {"names": ["z", "y"], "_type": "ClassLabel"},
    }
    both_labels = json.dumps({"info": {"features": features}}).encode()
    numbers = [row % 2 for row in range(8)]
    file = table(tmp_path / "set.parquet", metadata=both_labels, fine=numbers, coarse=numbers)
    parquet.write_table(parquet.read_table(file).drop_columns("label"), file)
    assert (
        complaint(file)
        == "data.label_column: PATH has the columns image, fine, coarse; name the one with the classes by it"
    )
    assert both(file, label_column="coarse")[0].classes == ["z", "y"]
    assert "of PATH is of the type struct" in complaint(file, label_column="image")
    assert "data.image_column: PATH has image with images" in complaint(file, image_column="fine")
    assert "data.split_column: PATH holds its images in its tables" in complaint(file, split_column="fine")
    table(file, label=["b", "a"] * 4, image=[JPEG] * 8)
    assert both(file)[0].classes == ["a", "b"]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("page", ["1.0", "2.0"])
def test_every_way_to_write_parquet_gives_the_same_bytes(
    compression: str, dictionary: bool, page: str, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    values = [draw.bytes(size) for size in (0, 1, 65_531, 65_532, 65_533, 300_000, 7, 130_000, *range(100, 200, 9))]
    values += [bytes(200_000), b"again and again " * 20_000, draw.bytes(40_000) * 5, *values[5:8], None]  # type: ignore[list-item]
    table = pyarrow.table(
        {"image": pyarrow.array([{"bytes": value, "path": ""} for value in values]), "label": [0] * len(values)}
    )
    file = tmp_path / "set.parquet"
    parquet.write_table(
        table,
        file,
        row_group_size=11,
        compression=compression,
        use_dictionary=dictionary,
        data_page_version=page,
        data_page_size=1 << 16,
        write_batch_size=3,
    )
    rows = parquet_rows(file, Column("image", True, "label"))
    read = [read_form(rows.form, str(file), *place) if place[1] >= 0 else None for place in rows.images]
    assert read == values
    if page == "1.0":
        assert rows.form == {"none": "", "snappy": "snappy", "zstd": "rows of image.bytes"}[compression]


def test_damage_in_a_compressed_page_is_one_bad_image(tmp_path: Path) -> None:
    file = table(tmp_path / "set.parquet", image=[{"bytes": JPEG + bytes([row]), "path": ""} for row in range(8)])
    catalog = both(file)[0]
    assert catalog.forms == ["snappy"]
    data = bytearray(file.read_bytes())
    data[100:200] = b"\xff" * 100
    file.write_bytes(data)
    with pytest.raises(BadImage, match="damaged in the Parquet file"):
        catalog.read(0)


def test_row_groups_that_are_kept_are_bounded(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    root.mkdir()
    noise = [KINDS["plain.jpg"](picture(40, 40, seed)) for seed in range(40)]
    image = pyarrow.array([{"bytes": data, "path": ""} for data in noise])
    made = pyarrow.table({"image": image, "label": [row % 2 for row in range(40)]})
    parquet.write_table(made, root / "set.parquet", row_group_size=4, compression="zstd")
    train, val = both(root / "set.parquet", val_share=0.2)  # type: ignore[arg-type]
    monkeypatch.setattr(parquet_images, "_MOST_KEPT", 3 * sum(map(len, noise[:4])))
    monkeypatch.setattr(parquet_images, "_groups", groups := parquet_images._RowGroups())
    assert sorted(streams(train) + streams(val)) == sorted(noise)
    assert 1 <= len(groups._kept) <= 4
    with ThreadPoolExecutor(8) as pool:  # as a scan and a loader read
        rows = [row for _ in range(20) for row in range(len(train))]
        assert list(pool.map(train.read, rows)) == 20 * streams(train)
    (root / "set.parquet").write_bytes(b"PAR1 replaced")
    with pytest.raises(OSError, match="not as when it was listed"):
        train.read(0)


def test_a_row_group_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = table(tmp_path / "set.parquet")
    monkeypatch.setattr(parquet_images, "_LARGEST_GROUP", 100)
    assert "PATH has a row group of 0.0 GB, which would be read at once; write it in smaller ones" in complaint(file)


@pytest.mark.parametrize("layout", PUBLISHED)
def test_images_without_labels_are_read_from_files_only(layout: str, folders: Path, tmp_path: Path) -> None:
    path = PUBLISHED[layout](folders, tmp_path / "published")
    if layout == "Kaggle's ImageNet":
        assert len(open_images(DataConfig(str(path)))) == 24
        return
    with pytest.raises(
        UserError, match=r"images without their classes are read from a folder of image files or a table"
    ):
        open_images(DataConfig(str(path)))


def test_a_hub_folder_without_a_certain_snapshot(folders: Path, tmp_path: Path) -> None:
    root = PUBLISHED["hub"](folders, tmp_path)
    (root / "refs/main").unlink()
    assert "PATH has several snapshots (0123abc, older), and none of them is that of the branch main" in complaint(root)
    (root / "snapshots/older").rmdir()
    assert len(both(root)[0]) == 12
    assert len(both(root / "snapshots/0123abc")[0]) == 12


def test_a_file_that_is_no_data_set_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"nothing")
    assert "PATH cannot be read (" in complaint(tmp_path / "a.arrow")
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    assert "PATH is a tar; give the folder that it lies in" in complaint(tmp_path / "ILSVRC2012_img_train.tar")
