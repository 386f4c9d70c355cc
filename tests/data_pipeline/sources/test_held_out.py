"""Shares, folds and groups: nothing is divided that belongs together, and every image is validated in exactly one fold."""

import csv
import hashlib
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.sources.held_out import divided
from data_pipeline.sources.listing import Listing, Taken
from tests.data_pipeline.sources.test_class_folders import lay

COUNTS = [1, 2, 3, 7, 40, 101]
GROUPS = 30


def listing(counts: list[int] = COUNTS) -> Listing:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    paths = [f"{'abcdef'[label]}/{row * 7919 % 10007}.jpg" for row, label in enumerate(labels)]
    return Listing(Path("set"), paths, labels, list("abcdef"), [])


def parts(whole: Listing, groups: list[str] | None = None, **options: object) -> tuple[Listing, Listing]:
    cfg = DataConfig(**options)  # type: ignore[arg-type]
    train, val = (divided(whole, cfg, split, groups) for split in ("train", "val"))
    assert sorted([*train.paths, *val.paths]) == sorted(whole.paths)
    return train, val


@pytest.mark.parametrize("val_share", [0.01, 0.1, 0.3, 0.9, 1.0])
def test_a_share_has_the_smallest_hashes_of_each_class(val_share: float) -> None:
    """As every earlier version chose it: resumed runs depend on it."""
    whole = listing()
    wanted = set()
    for label, count in enumerate(COUNTS):
        own = [path for path, its in zip(whole.paths, whole.labels, strict=True) if its == label]
        own.sort(key=lambda path: hashlib.blake2b(path.encode(), digest_size=8).digest())
        wanted |= {*own[: min(max(round(val_share * count), 1), count - (val_share < 1))]}
    held = {path for path in whole.paths if path in wanted}
    if val_share == 1:
        assert {*divided(whole, DataConfig(val_share=1.0), "val").paths} == held
    else:
        assert {*parts(whole, val_share=val_share)[1].paths} == held


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_every_image_is_in_one_fold_and_every_fold_has_its_share_of_each_class(folds: int) -> None:
    whole, seen = listing(), Counter[str]()
    for number in range(1, folds + 1):
        _, val = parts(whole, fold=f"{number}/{folds}")
        seen.update(val.paths)
        for label, count in enumerate(COUNTS):
            assert abs(val.labels.count(label) - count / folds) < 1
        assert val.taken.val_from == f"fold {number} of {folds} of each class, by a hash of the names"
        assert val.taken.divided_from == len(whole.paths)
    assert seen == Counter(whole.paths)


def test_the_folds_of_small_classes_are_spread() -> None:
    """Twenty classes of one image are not all in the first fold."""
    names = [f"class {number}" for number in range(20)]
    whole = Listing(Path("set"), [f"{name}/a.jpg" for name in names], list(range(20)), names, [])
    assert max(len(parts(whole, fold=f"{number}/5")[1].paths) for number in range(1, 6)) < 10


def test_a_new_image_moves_few_others() -> None:
    whole = listing([0, 0, 0, 0, 0, 1000])
    more = replace(whole, paths=[*whole.paths, "f/new.jpg"], labels=[*whole.labels, 5])
    before, after = ({*parts(one, fold="2/5")[1].paths} for one in (whole, more))
    assert len(before ^ after - {"f/new.jpg"}) <= 2


def grouped() -> tuple[Listing, list[str]]:
    """Groups of 1 to 30 images, each mostly of one class."""
    draw = np.random.default_rng(0)
    groups, labels = [], []
    for number in range(GROUPS):
        for _ in range(number + 1):
            groups.append(f"patient {number}")
            labels.append(int(number % 3 if draw.random() < 0.8 else draw.integers(3)))
    paths = [f"{'abc'[label]}/{row}.jpg" for row, label in enumerate(labels)]
    return Listing(Path("set"), paths, labels, list("abc"), []), groups


@pytest.mark.parametrize("options", [{"val_share": 0.2}, *({"fold": f"{number}/5"} for number in range(1, 6))])
def test_no_group_is_divided(options: dict[str, object]) -> None:
    whole, groups = grouped()
    group_of = dict(zip(whole.paths, groups, strict=True))
    train, val = parts(whole, groups, group="patient", **options)
    assert not {group_of[path] for path in train.paths} & {group_of[path] for path in val.paths}
    for label in range(3):
        share = val.labels.count(label) / whole.labels.count(label)
        assert 0.05 < share < 0.4, "of each class about a fifth"
    assert "30 groups by patient undivided" in val.taken.val_from


def test_each_group_is_in_one_fold() -> None:
    whole, groups = grouped()
    found = Counter(
        path for number in range(1, 6) for path in parts(whole, groups, fold=f"{number}/5", group="p")[1].paths
    )
    assert found == Counter(whole.paths)


def test_groups_of_a_table_and_of_folders(tmp_path: Path) -> None:
    """The same images by a column, by the level of their folder, and in folds: patients are whole."""
    root = lay(tmp_path / "set", {f"{kind}/p{number}": 3 for number in range(8) for kind in ("cat", "dog")})
    table = tmp_path / "labels.csv"
    with table.open("w") as stream:
        rows = csv.writer(stream)
        rows.writerow(["image", "label", "patient"])
        for path in sorted(root.rglob("*.jpg")):
            rows.writerow([path.relative_to(root), path.parent.parent.name, path.parent.name])
    for cfg in (
        DataConfig(str(root), group="2"),
        DataConfig(str(table), images=str(root), group="patient"),
        DataConfig(str(table), images=str(root), group="2"),
        DataConfig(str(root), group="2", fold="3/4"),
    ):
        where = defaultdict[str, set[str]](set)
        for split in ("train", "val"):
            for name in open_catalog(cfg, split).paths:
                where[name.split("/")[1]].add(split)
        assert {*map(len, where.values())} == {1} and len(where) == 8, cfg
    with pytest.raises(
        UserError, match=r"holds folders in place of images .*; if they are patients or the like, data.group 2 "
    ):
        open_catalog(DataConfig(str(root)), "train")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"fold": "0/5"}, "data.fold: '0/5' is no fold; give its number and how many there are, as 2/5"),
        ({"fold": "6/5"}, "data.fold: '6/5' is no fold"),
        ({"fold": "1/1"}, "data.fold: '1/1' is no fold"),
        ({"fold": "third"}, "data.fold: 'third' is no fold"),
        ({"group": ""}, "data.group: it is empty"),
        (
            {"group": "patient"},
            "data.group: patient is a column, and the images are not named by a table; give the level",
        ),
        (
            {"group": "3"},
            "data.group: cat/p0/p00.jpg lies in no folder of level 3 of ROOT; give another level, or move it",
        ),
        (
            {"group": "1"},
            "data.group: the folders of level 1 of ROOT are the classes; give the level of the groups in them",
        ),
    ],
)
def test_mistakes_are_named(options: dict[str, str], line: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "set", {f"{kind}/p{number}": 3 for number in range(3) for kind in ("cat", "dog")})
    with pytest.raises(UserError) as caught:
        open_catalog(DataConfig(str(root), **options), "train")  # type: ignore[arg-type]
    assert str(caught.value).startswith(line.replace("ROOT", str(root)))


def test_a_set_that_is_divided_already_is_not_divided_again(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", {f"{split}/{kind}": 3 for split in ("train", "val") for kind in ("cat", "dog")})
    for option in ({"fold": "1/2"}, {"group": "1"}):
        with pytest.raises(UserError, match=f"^data.{next(iter(option))}: .* has validation images of its own "):
            open_catalog(DataConfig(str(root), **option), "train")  # type: ignore[arg-type]
    whole = replace(listing(), taken=Taken("folders", "val/"))
    assert divided(whole, DataConfig(), "train") is whole


def test_a_table_without_some_groups(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", {"cat": 2, "dog": 2})
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    for cells, line in (
        (["a", "", "b", "c"], "has rows without a patient"),
        (["a", "b", "c", "d", "e"], "two of patient"),
    ):
        rows = [*paths, paths[0]][: len(cells)]
        table = tmp_path / "labels.csv"
        text = [f"{path},{path.split('/')[0]},{cell}" for path, cell in zip(rows, cells, strict=True)]
        table.write_text("\n".join(["image,label,patient", *text]))
        with pytest.raises(UserError, match=rf"^data\.group: .* {line}"):
            open_catalog(DataConfig(str(table), images=str(root), group="patient"), "train")
    with pytest.raises(UserError, match=r"^data\.group: .* has no column video; it has image, label, patient$"):
        open_catalog(DataConfig(str(table), images=str(root), group="video"), "train")


def test_a_pack_keeps_its_fold(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", {"cat": 8, "dog": 8})
    cfg = DataConfig(str(root), fold="2/4")
    pack(cfg, tmp_path / "pack", PackConfig(), workers=1)
    packed = open_catalog(DataConfig(str(tmp_path / "pack")), "val")
    assert [Path(path).stem for path in packed.paths] == [Path(path).stem for path in open_catalog(cfg, "val").paths]
    with pytest.raises(
        UserError, match=r"^data\.fold: .* is a pack, divided since it was written; leave it out, or give"
    ):
        open_catalog(DataConfig(str(tmp_path / "pack"), fold="1/2"), "train")
