"""Tables as people bring them: each cell stays as it is written, images are found, and what is not certain is refused."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.sources.catalog import Catalog, open_catalog, open_images
from data_pipeline.sources.layouts import list_samples
from data_pipeline.sources.tables.text_table import TextTable, read_table, shown, without_index
from tests.conftest import encode, picture

COUNT = 24
JPEG = encode(picture(16, 20), "JPEG")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """images/0000.jpg to 0023.jpg."""
    put(tmp_path, *(f"images/{number:04}.jpg" for number in range(COUNT)))
    return tmp_path


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG)


def lines(head: str, row: Callable[[int], str], count: int = COUNT) -> str:
    return "".join(f"{line}\n" for line in ([head] if head else []) + [row(number) for number in range(count)])


def write(folder: Path, content: str, name: str = "train.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(content.encode(encoding))
    return folder / name


def opened(file: Path, **options: object) -> tuple[Catalog, dict[str, str]]:
    """All samples of a table without splits, and the class of each path."""
    catalog = open_catalog(DataConfig(path=str(file), val_share=1.0, **options), "val")  # type: ignore[arg-type]
    names = [catalog.classes[label] for label in catalog.labels]
    return catalog, dict(zip(catalog.paths, names, strict=True))


def refused(file: Path, **options: object) -> str:
    with pytest.raises(UserError) as error:
        opened(file, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 900
    return message.replace(str(file), "FILE").replace(str(file.parent), "FOLDER")


# ---- cells are text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "ordered"),
    [
        (("cat", "dog", "NA"), ["NA", "cat", "dog"]),
        (("001", "002", "1e3"), ["001", "002", "1e3"]),
        (("nan", "null", "None"), ["None", "nan", "null"]),
        (("10", "9", "2"), ["2", "9", "10"]),
        (("1", "01", "2"), ["01", "1", "2"]),
        (("0.5", "1.0", "-1"), ["-1", "0.5", "1.0"]),
        (("True", "no", "2024-01-01"), ["2024-01-01", "True", "no"]),
        (("ünicorn", "=1+1", 'a "b", c'), ["=1+1", 'a "b", c', "ünicorn"]),
    ],
)
def test_classes_are_what_is_written(data: Path, classes: tuple[str, ...], ordered: list[str]) -> None:
    frame = pd.DataFrame({"image": [f"{number:04}.jpg" for number in range(COUNT)], "label": [*classes] * 8})
    frame.to_csv(data / "train.csv", index=False)
    frame.to_parquet(data / "train.parquet", index=False)
    for name in ("train.csv", "train.parquet"):
        catalog, found = opened(data / name)
        assert catalog.classes == ordered
        assert found == {f"images/{number:04}.jpg": classes[number % 3] for number in range(COUNT)}


def test_parquet_keeps_numbers_as_they_are(data: Path) -> None:
    """A column of whole numbers that pandas has made floats of, as one is missing, is of whole numbers."""
    pd.DataFrame(
        {"number": [1, 2, None], "share": [0.5, 1.0, None], "text": ["001", None, "NA"], "day": [1, 2, 3]}
    ).assign(flag=[True, False, True]).to_parquet(data / "x.parquet")
    assert read_table(data / "x.parquet", "FILE").columns == {
        "number": ["1", "2", ""],
        "share": ["0.5", "1.0", ""],
        "text": ["001", "", "NA"],
        "day": ["1", "2", "3"],
        "flag": ["True", "False", "True"],
    }


# ---- how the file is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "encoding", "name"),
    [
        (lines("image;label", lambda n: f"{n:04};{'ab'[n % 2]}"), "utf-8", "train.csv"),
        (lines("image\tlabel", lambda n: f"{n:04}\t{'ab'[n % 2]}"), "utf-8", "train.csv"),
        (lines("image,label", lambda n: f"{n:04},{'ab'[n % 2]}"), "utf-8", "train.tsv"),
        (lines("image|label", lambda n: f"{n:04}|{'ab'[n % 2]}"), "utf-8", "train.CSV"),
        (lines("sep=;\nimage;label", lambda n: f"{n:04};{'ab'[n % 2]}"), "utf-8", "train.csv"),
        (lines("image,label", lambda n: f"{n:04},{'ab'[n % 2]}"), "utf-8-sig", "train.csv"),
        (lines("image\tlabel", lambda n: f"{n:04}\t{'ab'[n % 2]}"), "utf-16", "train.csv"),
        (lines("image,label", lambda n: f"{n:04},{'ab'[n % 2]}"), "utf-16-le", "train.csv"),
        (lines("image,label", lambda n: f"{n:04},{'ab'[n % 2]}").replace("\n", "\r\n"), "utf-8", "train.csv"),
        (lines(" image , label", lambda n: f"{n:04}, {'ab'[n % 2]} "), "utf-8", "train.csv"),
        (lines("image,label,", lambda n: f"{n:04},{'ab'[n % 2]},"), "utf-8", "train.csv"),
        (lines(",image,label", lambda n: f"{n},{n:04},{'ab'[n % 2]}"), "utf-8", "train.csv"),
        (lines("Unnamed: 0,image,label", lambda n: f"{n},{n:04},{'ab'[n % 2]}"), "utf-8", "train.csv"),
        (lines('"image","label"', lambda n: f'"{n + 1}","{n:04}","{"ab"[n % 2]}"'), "utf-8", "r.csv"),
        (lines("", lambda n: f"{n:04}.jpg,{'ab'[n % 2]}"), "utf-8", "train.csv"),
    ],
)
def test_ways_to_write_a_table(data: Path, content: str, encoding: str, name: str) -> None:
    _, found = opened(write(data, content, name, encoding))
    assert found == {f"images/{number:04}.jpg": "ab"[number % 2] for number in range(COUNT)}


def test_latin_1_is_read_and_said(data: Path) -> None:
    text = lines("image,label", lambda n: f"{n:04},{('Bär', 'Füchse')[n % 2]}")
    catalog, _ = opened(write(data, text, encoding="latin-1"))
    assert catalog.classes == ["Bär", "Füchse"]
    assert catalog.taken.notes == [
        "line 2 is no UTF-8, so it was read as Latin-1; look whether the names in it are right"
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "data.path: FILE is empty"),
        ("image,label\n", "data.path: FILE has no rows"),
        (
            "image,label\n0000,a\n0001,b,c\n",
            "data.path: line 3 of FILE has 3 cells, divided by commas, where its header has 2",
        ),
        (
            'image,label\n0000,"a\n0001,b\n',
            "data.path: FILE is no table that can be read (line 3: unexpected end of data)",
        ),
        ("image,label,label\n0000,a,b\n", "data.path: FILE has several columns called label"),
        (
            "image,label\n" + "x" * 200_000 + ",a\n",
            "data.path: FILE is no table that can be read (line 2: field larger",
        ),
        (
            "PK\x03\x04" + "\0\n" * 99,
            "data.path: FILE is no table that can be read (it is a zip file, or a table of Excel)",
        ),
        (
            "\n<!DOCTYPE html>\n<a,b>",
            "data.path: FILE is no table that can be read (it is a web page, as of a download that",
        ),
        (
            "version https://git-lfs.github.com/spec/v1\noid a\n",
            "data.path: FILE is no table that can be read (it is a pointer",
        ),
        ("0000,a\n0001,b\n", "data.path: the first row of FILE names an image, 0000, and so is no header; give it one"),
    ],
)
def test_what_is_no_table(data: Path, content: str, says: str) -> None:
    assert refused(write(data, content)).startswith(says)
    assert refused(write(data, "x", "x.parquet")).startswith("data.path: FILE is no table that can be read (")


def test_an_index_is_left_out_and_a_column_of_numbers_is_not() -> None:
    cells = ["a", "b"]
    for name, numbers, kept in (("1", ["0", "1"], False), ("1", ["1", "2"], False), ("1", ["3", "7"], True)):
        assert ("1" in without_index(TextTable({name: numbers, "x": cells})).columns) == kept
    assert list(without_index(TextTable({"id": ["0", "1"], "x": cells})).columns) == ["id", "x"]
    assert list(without_index(TextTable({"x": cells, "__index_level_0__": ["7", "9"]})).columns) == ["x"]


# ---- which column is what -----------------------------------------------------------------------------------------------


def test_classes_by_a_usual_name(data: Path) -> None:
    """As HAM10000 is published: dx among five columns, images by image_id."""
    row = "HAM_{0},{1:04},{2},histo,50.0"
    text = lines("lesion_id,image_id,dx,dx_type,age", lambda n: row.format(n // 2, n, ("mel", "nv", "bkl")[n % 3]))
    catalog, _ = opened(write(data, text, "HAM10000_metadata.csv"))
    assert catalog.classes == ["bkl", "mel", "nv"]
    assert catalog.taken.layout == "table HAM10000_metadata.csv: images by image_id in images/, classes by dx"


@pytest.mark.parametrize(
    ("head", "row", "images", "classes"),
    [
        ("id,path,label", lambda n: f"{n},{n:04}.jpg,{'ab'[n % 2]}", "path", "label"),
        ("Image Index,Finding Labels", lambda n: f"{n:04}.jpg,{'ab'[n % 2]}", "Image Index", "Finding Labels"),
        ("Image,Id", lambda n: f"{n:04}.jpg,w_{n % 5}", "Image", "Id"),
        ("scan,verdict", lambda n: f"{n:04},{'ab'[n % 2]}", "scan", "verdict"),
        ("label,image", lambda n: f"{n % 2},{n:04}", "image", "label"),
        ("class id,filepaths,labels", lambda n: f"{n % 2},{n:04},{'ab'[n % 2]}", "filepaths", "labels"),
        ("class id,filepaths,labels", lambda n: f"{n % 2}.0,{n:04},{'ab'[n % 2]}", "filepaths", "labels"),
        ("id,image,label", lambda n: f"{23 - n:04},{n:04}.jpg,{'ab'[n % 2]}", "image", "label"),
        ("image;age;label", lambda n: f"{n:04}.jpg;1,5;{'ab'[n % 2]}", "image", "label"),
        (
            "image,a,b,c",
            lambda n: f"{n:04},{n % 3 == 0:d}.0,{n % 3 == 1:d}.0,{n % 3 == 2:d}.0",
            "image",
            "the 1 in a, b, c",
        ),
        ("image,sex,cat,dog", lambda n: f"{n:04},{'mf'[n % 2]},{n % 2},{1 - n % 2}", "image", "the 1 in cat, dog"),
    ],
)
def test_columns_are_found_and_said(
    data: Path, head: str, row: Callable[[int], str], images: str, classes: str
) -> None:
    catalog, found = opened(write(data, lines(head, row)))
    assert catalog.taken.layout == f"table train.csv: images by {images} in images/, classes by {classes}"
    assert len(found) == COUNT


def test_one_hot_columns_are_classes(data: Path) -> None:
    text = lines("image,mel,nv,unk", lambda n: f"{n:04},{n % 2},{1 - n % 2},0")
    catalog, found = opened(write(data, text))
    assert catalog.classes == ["mel", "nv"], "not one that no image has"
    assert found == {f"images/{n:04}.jpg": ("nv", "mel")[n % 2] for n in range(COUNT)}


UNCLEAR = "data.label_column: which column of FILE has the classes is not clear; name it; it has"
NO_IMAGES = (
    "data.image_column: no column of FILE names images in FOLDER; name it, and their folder by data.images; it has"
)


@pytest.mark.parametrize(
    ("head", "row", "says"),
    [
        (
            "id,image,label",
            lambda n: f"{n:04},{23 - n:04},{n % 2}",
            "data.image_column: id, image of FILE name different images; name the one to use",
        ),
        ("image,age,site", lambda n: f"{n:04},{n % 3},{n % 2}", f"{UNCLEAR} age, site"),
        ("image,breed,species", lambda n: f"{n:04},{n % 3},{n % 2}", f"{UNCLEAR} breed, species"),
        ("image", lambda n: f"{n:04}", "data.label_column: FILE has no column beside the images' names"),
        (
            "image,text",
            lambda n: f"{n:04},{n}",
            "data.label_column: text of FILE has 24 values for 24 images, so it is",
        ),
        (
            "image,label",
            lambda n: f"{n:04},{n // 2 * 2 + n % 2}",
            "data.label_column: label of FILE has 24 values for 24",
        ),
        (
            "image,label",
            lambda n: f"{n:04},cat",
            "data.label_column: label of FILE has one class only, cat, and nothing",
        ),
        ("image,label", lambda n: f"{n:04},{'cat' * (n != 5)}", "data.path: FILE has rows without a label; fill or"),
        (
            "image,label",
            lambda n: f"{n % 20:04},{n // 3}",
            "data.path: FILE gives images/0000.jpg two classes, 0 and 6;",
        ),
        (
            "image,target",
            lambda n: f"{n:04},{n % 8 / 10}",
            "data.label_column: target of FILE has numbers such as 0.1, so it is a measure and hardly a class; name another",
        ),
        (
            "image,partition",
            lambda n: f"{n:04},{n % 3}",
            "data.split_column: partition of FILE has 0, 1, 2, none of which is train or val; write these, or rename the",
        ),
        (
            "image,label,is_test",
            lambda n: f"{n:04},{n % 2},{'yes' if n % 3 else 'no'}",
            "data.split_column: is_test of FILE has no, yes, none of which is train or val; write these",
        ),
        (
            "image,label,valid",
            lambda n: f"{n:04},{n % 2},{int(n > 3)}",
            "data.split_column: by valid of FILE 20 of 24 rows would validate, which is more than train; name it to insist",
        ),
        ("pixel0,pixel1,label", lambda n: f"{n},{n},{n % 2}", f"{NO_IMAGES} pixel0, pixel1, label"),
        (",".join(f"p{n}" for n in range(784)), lambda n: ",".join(["0"] * 784), f"{NO_IMAGES} p0, p1, p2"),
        (
            "image,split,label",
            lambda n: f"{n:04},{'ab'[n % 2]},{n % 2}",
            "data.split_column: split of FILE has a, b, none",
        ),
    ],
)
def test_what_is_not_certain_is_refused(data: Path, head: str, row: Callable[[int], str], says: str) -> None:
    assert refused(write(data, lines(head, row))).startswith(says)


def test_images_and_tables_that_are_left_aside_are_said(data: Path) -> None:
    write(data, "image,label\n0,1\n", "val.csv")
    put(data, "test/9999.jpg")
    table = write(
        data, lines("image,label,split", lambda n: f"{n:04},{n % 2},{'val' if n % 3 == 0 else 'train'}", COUNT - 4)
    )
    notes = open_catalog(DataConfig(path=str(table)), "train").taken.notes
    assert notes == [
        "in no row of train.csv, so left out: 4 images, as images/0020.jpg",
        "left alone beside train.csv: val.csv",
    ]


def test_a_column_that_is_named_is_taken(data: Path) -> None:
    text = lines("image,label,breed", lambda n: f"{n:04},{n % 2},{n % 4}")
    assert opened(write(data, text), label_column="breed")[0].classes == ["0", "1", "2", "3"]
    says = "data.label_column: FILE has no column colour; it has image, label, breed"
    assert refused(write(data, text), label_column="colour") == says


def test_long_and_strange_cells_are_cut_and_escaped(data: Path) -> None:
    text = lines("image,label", lambda n: f"\x1b[31m{n}{'x' * 5000},{n % 2}")
    message = refused(write(data, text))
    assert message.startswith(r"data.images: 24 of the 24 images that FILE names are not in FOLDER: \x1b[31m0xxx")
    assert "\x1b" not in message
    assert shown("é" * 81) == "é" * 79 + "…" and shown("a\tb\u202e") == r"a\tb\u202e"


# ---- splits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "names", "train", "val", "said"),
    [
        ("split", ("train", "val", "test"), 8, 8, "rows with split = val"),
        ("data set", ("train", "valid", "test"), 8, 8, "rows with data set = valid"),
        ("Split", ("Training", "Testing", "Training"), 16, 8, "rows with Split = Testing"),
        ("subset", ("TRAIN", "TRAIN", "TRAIN"), None, None, ""),
        ("Dataset_type", ("TRAIN", "TEST", "TRAIN"), 16, 8, "rows with Dataset_type = TEST"),
        ("Usage", ("Training", "PublicTest", "Training"), 16, 8, "rows with Usage = PublicTest"),
        ("split", ("trainval", "test", "trainval"), 16, 8, "rows with split = test"),
        ("is_train", ("1", "0", "1"), 16, 8, "rows with is_train = 0"),
        ("is_valid", ("False", "False", "True"), 16, 8, "rows with is_valid = True"),
        ("is_valid", ("FALSE", "FALSE", "TRUE"), 16, 8, "rows with is_valid = TRUE"),
        ("test", ("0", "0", "1"), 16, 8, "rows with test = 1"),
        ("fold", ("0", "1", "2"), None, None, ""),
    ],
)
def test_a_column_of_splits(
    data: Path, column: str, names: tuple[str, ...], train: int | None, val: int | None, said: str
) -> None:
    file = write(data, lines(f"image,label,{column}", lambda n: f"{n:04},{'ab'[n // 3 % 2]},{names[n % 3]}"))
    cfg = DataConfig(path=str(file))
    both = [list_samples(file, cfg, split, None) for split in ("train", "val")]
    if train is None:
        assert sum(len(one.paths) for one in both) == COUNT and both[0].taken.divided_from == COUNT
    else:
        assert [len(one.paths) for one in both] == [train, val] and both[0].taken.val_from == said
    if "val" in names and "test" in names:
        assert both[0].taken.notes == [f"8 rows are left alone, as their {column} is another"]


def test_rows_of_other_splits_need_no_image_and_no_class(data: Path) -> None:
    file = write(data, "image,label,split\n0000,a,train\n0001,b,train\n0002,a,val\nelsewhere,,test\n")
    both = [list_samples(file, DataConfig(path=str(file)), split, None) for split in ("train", "val")]
    assert [one.paths for one in both] == [["images/0000.jpg", "images/0001.jpg"], ["images/0002.jpg"]]
    (data / "images/0001.jpg").unlink()
    assert list_samples(file, DataConfig(path=str(file)), "val", ["a", "b"]).paths == ["images/0002.jpg"]


def test_folders_of_splits_divide_a_table(data: Path) -> None:
    put(data, *(f"{'train' if n < 16 else 'test'}/{n}.png" for n in range(COUNT)))
    file = write(data, lines("file,label", lambda n: f"{n}.png,{'ab'[n % 2]}"))
    both = [list_samples(file, DataConfig(path=str(file)), split, None) for split in ("train", "val")]
    assert [len(one.paths) for one in both] == [16, 8] and both[1].taken.val_from == "rows that name images in test/"


def test_an_image_in_both_splits_is_refused(data: Path) -> None:
    text = "image,label,split\n0000,a,train\n0001,b,train\n0000,a,val\n"
    says = "data.split_column: split of FILE puts 1 images into both splits, as 0000; leave one row of each"
    assert refused(write(data, text)) == says


def test_rows_that_name_an_image_again_count_once(data: Path) -> None:
    text = lines("filename,class,xmin", lambda n: f"{n // 2:04}.jpg,{'ab'[n // 2 % 2]},{n}")
    catalog, found = opened(write(data, text))
    assert len(found) == 12
    assert catalog.taken.notes == [
        "in no row of train.csv, so left out: 12 images, as images/0012.jpg",
        "12 rows name an image again and are left out",
    ]


# ---- where the images are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "written", "found"),
    [
        (["a.jpg", "b.jpg"], ["a", "b.jpg"], ["a.jpg", "b.jpg"]),
        (["images/a.jpg", "images/b.jpg"], ["images\\a.jpg", "images\\b.jpg"], ["images/a.jpg", "images/b.jpg"]),
        (["images/a.JPG", "images/b.JPG"], ["a.jpg", "b.jpg"], ["images/a.JPG", "images/b.JPG"]),
        (["Images/A.Png", "Images/b.png"], ["images/a", "images/B.PNG"], ["Images/A.Png", "Images/b.png"]),
        (["train/a.jpg", "train/b.jpg", "test/c.jpg"], ["a", "b"], ["train/a.jpg", "train/b.jpg"]),
        (["train/a.jpg", "train/b.jpg", "test/b.jpg"], ["a", "b"], ["train/a.jpg", "train/b.jpg"]),
        (["part_1/a.jpg", "part_2/b.jpg"], ["a", "b"], ["part_1/a.jpg", "part_2/b.jpg"]),
        (["deep/x/a.jpg", "deep/y/a.jpg"], ["x/a.jpg", "y/a.jpg"], ["deep/x/a.jpg", "deep/y/a.jpg"]),
        (["train/a.jpg", "train/b.jpg"], ["/content/train/a.jpg", "/content/train/b.jpg"], ["train/a.jpg", "train/b.jpg"]),
        (["train/a.jpg", "train/b.jpg"], ["../input/train/a.jpg", "../input/train/b.jpg"], ["train/a.jpg", "train/b.jpg"]),
        (["train/a.jpg", "train/b.jpg"], ["C:\\set\\train\\a.jpg", "C:\\set\\train\\b.jpg"], ["train/a.jpg", "train/b.jpg"]),
        (["train/a.jpg", "b.jpg"], ["HERE/train/a.jpg", "HERE/b.jpg"], ["train/a.jpg", "b.jpg"]),
        (["i/A.jpg", "i/a.jpg"], ["A.jpg", "a.jpg"], ["i/A.jpg", "i/a.jpg"]),
        (["i/a.jpg", "i/._a.jpg", "i/b.jpg"], ["a", "b"], ["i/a.jpg", "i/b.jpg"]),
        (["i/u\u0308.jpg", "i/b.jpg"], ["ü.jpg", "b.jpg"], ["i/u\u0308.jpg", "i/b.jpg"]),
        (["back\\slash.jpg", "b.jpg"], ["back\\slash.jpg", "b.jpg"], ["back\\slash.jpg", "b.jpg"]),
    ],
)  # fmt: skip
def test_images_are_found(tmp_path: Path, files: list[str], written: list[str], found: list[str]) -> None:
    put(tmp_path, *files)
    names = [name.replace("HERE", str(tmp_path)) for name in written]
    file = write(tmp_path, "id\n" + "".join(f"{name}\n" for name in names))
    assert open_images(DataConfig(path=str(file))).paths == found
    write(tmp_path, "id,label\n" + "".join(f"{name},{row}\n" for row, name in enumerate(names)))
    assert opened(file)[1] == {path: str(row) for row, path in enumerate(found)}


@pytest.mark.parametrize(
    ("files", "name", "why"),
    [
        (["test/a.jpg"], "train/a.jpg", "are not in"),
        (["test/images/a.jpg"], "/content/train/images/a.jpg", "are not in"),
        (["a.jpg"], "../a.jpg", "are not in"),
        (["a.jpg"], "/elsewhere/a.jpg", "are not in"),
        (["sub/x/a.jpg"], "HERE/x/a.jpg", "are not in"),
        (["a.png"], "a.jpg", "are not in"),
        (["train/a.jpg", "small/a.jpg"], "a", "could be several files, as a: small/a.jpg, train/a.jpg;"),
        (["a.jpg", "a.png"], "a", "could be several files, as a: a.jpg, a.png;"),
    ],
)
def test_an_image_that_is_not_certain_is_refused(tmp_path: Path, files: list[str], name: str, why: str) -> None:
    put(tmp_path, *files, "other.jpg")
    message = refused(write(tmp_path, f"id\n{name.replace('HERE', str(tmp_path))}\nother\n"), label_column="id")
    assert message.startswith("data.images: 1 of the 2 images that FILE names ") and why in message


@pytest.mark.parametrize(
    ("name", "folder"), [("trainLabels.csv", "train"), ("labels.csv", "train"), ("test.csv", "test")]
)
def test_same_names_in_both_splits_are_those_of_the_tables_split(name: str, folder: str, tmp_path: Path) -> None:
    put(tmp_path, *(f"{split}/{n}.png" for split in ("train", "test") for n in range(COUNT)))
    _, found = opened(write(tmp_path, lines("id,label", lambda n: f"{n},{'ab'[n % 2]}"), name))
    assert found == {f"{folder}/{n}.png": "ab"[n % 2] for n in range(COUNT)}


def test_folders_of_images_may_be_links(data: Path) -> None:
    (data / "here").mkdir()
    (data / "here/images").symlink_to("../images")
    assert len(opened(write(data / "here", lines("image,label", lambda n: f"{n:04},{n % 2}")))[1]) == COUNT


def test_images_of_kinds_that_are_not_read_are_told(tmp_path: Path) -> None:
    put(tmp_path, "train/a.tif", "train/b.tif")
    said = refused(write(tmp_path, "image,label\na,0\nb,1\n"))
    assert "of kinds that are not read, until converted to PNG or JPEG: 2 .tif files" in said


def test_names_from_another_machine_are_said(tmp_path: Path) -> None:
    put(tmp_path, "train/a.jpg", "train/b.jpg")
    catalog, _ = opened(write(tmp_path, "id,label\n/x/train/a.jpg,0\n/x/train/b.jpg,1\n"))
    assert catalog.taken.notes == ["2 names begin elsewhere, as /x/train/a.jpg, and are taken for train/a.jpg …"]
    assert opened(tmp_path / "train.csv", images=str(tmp_path / "train"))[1] == {"a.jpg": "0", "b.jpg": "1"}


@pytest.mark.parametrize("option", [None, "label"])
def test_names_with_spaces_are_no_lists_and_lists_may_be_insisted_on(option: str | None, tmp_path: Path) -> None:
    names = ["maine coon", "coon", "siamese cat", "cat"] if option is None else ["a b", "b a", "a", "b"]
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(encode(picture(16, 16), "JPEG"))
    rows = [f"{number}.jpg,{name}" for number, name in enumerate(names * 2)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]))
    cfg = DataConfig(str(tmp_path / "labels.csv"), label_column=option)
    assert open_catalog(cfg, "train").classes == sorted(names)
