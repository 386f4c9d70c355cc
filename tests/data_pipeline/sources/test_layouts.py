"""Every layout gives the same samples as the class folders that it was made from."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sources import pack_format
from data_pipeline.sources.catalog import Catalog, _say_forgetful, open_catalog

CLASSES = ["cat", "dog's", "ünicorn"]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """train/ with nine images, val/ with six, of three classes."""
    root = tmp_path / "a folder"
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20 + number, 30, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name} {number}.jpg")
    return root


def samples(catalog: Catalog) -> set[tuple[str, bytes]]:
    """Class name and bytes of every sample."""
    return {(catalog.classes[label], catalog.read(row)) for row, label in enumerate(catalog.labels)}


def expected(folders: Path, split: str) -> set[tuple[str, bytes]]:
    return {(file.parent.name, file.read_bytes()) for file in (folders / split).glob("*/*.jpg")}


def manifest(folders: Path, **columns: list[str]) -> Path:
    files = [file for split in ("train", "val") for file in sorted((folders / split).glob("*/*.jpg"))]
    table = pd.DataFrame(
        {
            "id": [str(file.relative_to(folders)).removesuffix(".jpg") for file in files],
            "breed": [file.parent.name for file in files],
            "split": [file.relative_to(folders).parts[0] for file in files],
        }
    ).assign(**columns)
    table.to_csv(folders / "labels.csv", index=False)
    return folders / "labels.csv"


def shards(folders: Path, into: Path) -> Path:
    """Two tar files a split, labels as numbers, the label before or behind its image."""
    for split in ("train", "val"):
        (into / split).mkdir(parents=True)
        files = sorted((folders / split).glob("*/*.jpg"))
        for number, part in enumerate((files[::2], files[1::2])):
            with tarfile.open(into / split / f"{number}.tar", "w") as tar:
                for row, file in enumerate(part):
                    members = {"jpg": file.read_bytes(), "cls": str(CLASSES.index(file.parent.name)).encode()}
                    members["json"] = json.dumps({"from": file.name}).encode()
                    for suffix in ("jpg", "json", "cls") if row % 2 else ("cls", "jpg", "json"):
                        info = tarfile.TarInfo(f"sub.dir/{number}_{row}.{suffix}")
                        info.size = len(members[suffix])
                        tar.addfile(info, io.BytesIO(members[suffix]))
    return into


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_manifest_is_its_folders(folders: Path, split: str) -> None:
    cfg = DataConfig(path=str(manifest(folders)), label_column="breed")
    catalog = open_catalog(cfg, split)
    assert catalog.classes == CLASSES
    assert samples(catalog) == expected(folders, split)
    assert [catalog.paths[0], len(catalog)] == [f"{split}/cat/cat 0.jpg", 9 if split == "train" else 6]


def test_a_manifest_without_a_split_column_is_divided_by_names(folders: Path) -> None:
    table = pd.read_csv(manifest(folders)).drop(columns="split")
    table.to_csv(folders / "labels.csv", index=False)
    cfg = DataConfig(path=str(folders / "labels.csv"), val_share=0.4)
    parts = [samples(open_catalog(cfg, split)) for split in ("train", "val")]
    assert parts[0].isdisjoint(parts[1])
    assert parts[0] | parts[1] == expected(folders, "train") | expected(folders, "val")


def test_numbers_as_labels_stay_in_their_order(folders: Path) -> None:
    table = pd.read_csv(manifest(folders))
    table["label"] = [2, 10, 9] * 5
    table.to_csv(folders / "labels.csv", index=False)
    cfg = DataConfig(path=str(folders / "labels.csv"), label_column="label")
    assert open_catalog(cfg, "train").classes == ["2", "9", "10"]


def test_images_may_lie_elsewhere(folders: Path, tmp_path: Path) -> None:
    file = manifest(folders).rename(tmp_path / "labels.csv")
    cfg = DataConfig(path=str(file), images=str(folders), image_column="id", label_column="breed", split_column="split")
    assert samples(open_catalog(cfg, "val")) == expected(folders, "val")


@pytest.mark.parametrize(
    ("cut", "options", "message"),
    [
        (lambda table: table.assign(id=table.id + "?"), {}, "9 of the 9 images that"),
        (lambda table: table, {"image_column": "img"}, "data.image_column: "),
        (lambda table: table, {"split_column": "fold"}, "data.split_column: "),
        (lambda table: table.assign(breed=None), {"label_column": "breed"}, "rows without a breed"),
        (lambda table: table[["id"]], {}, "data.label_column: "),
        (lambda table: table[table.split != "train"], {}, "no row of "),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(folders: Path, cut: object, options: dict[str, str], message: str) -> None:
    file = manifest(folders)
    cut(pd.read_csv(file)).to_csv(file, index=False)  # type: ignore[operator]
    with pytest.raises(UserError) as raised:
        open_catalog(DataConfig(path=str(file), **options), "train")  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_a_class_that_only_validation_has(folders: Path) -> None:
    file = manifest(folders)
    table = pd.read_csv(file)
    table.loc[table.split == "val", "breed"] = "wolf"
    table.to_csv(file, index=False)
    with pytest.raises(UserError, match="a class that training lacks: wolf"):
        open_catalog(DataConfig(path=str(file), label_column="breed"), "val", CLASSES)


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_are_their_folders(folders: Path, tmp_path: Path, split: str) -> None:
    catalog = open_catalog(DataConfig(path=str(shards(folders, tmp_path / "shards"))), split)
    assert catalog.classes == ["0", "1", "2"]
    assert {(CLASSES[int(name)], data) for name, data in samples(catalog)} == expected(folders, split)


def test_a_cut_shard_is_named(folders: Path, tmp_path: Path) -> None:
    root = shards(folders, tmp_path / "shards")
    shard = root / "train" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"1\.tar is cut off"):
        open_catalog(DataConfig(path=str(root)), "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_pack_is_its_folders(folders: Path, tmp_path: Path, split: str) -> None:
    source = DataConfig(path=str(folders))
    pack(source, tmp_path / "pack", PackConfig(), 1)
    catalog = open_catalog(DataConfig(path=str(tmp_path / "pack")), split)
    original = open_catalog(source, split)
    assert samples(catalog) == expected(folders, split)
    assert (catalog.paths, catalog.classes) == (original.paths, original.classes)
    assert catalog.fingerprint() == original.fingerprint()
    assert pack_format.is_pack(tmp_path / "pack")


def test_what_is_in_quarantine_is_left_out(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("# why\ntrain/cat/cat 1.jpg\nval/cat/cat 0.jpg\n")
    catalog = open_catalog(DataConfig(path=str(folders), quarantine=str(tmp_path / "list")), "train")
    assert len(catalog) == 8 and catalog.bad == {"cat/cat 1.jpg": "in quarantine"}


def test_a_scan_is_remembered_until_something_changes(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = DataConfig(path=str(folders))
    (folders / "train" / "cat" / "broken.jpg").write_bytes(b"no image")
    first = open_catalog(cfg, "train")
    with monkeypatch.context() as patch:  # nothing is looked into again
        patch.setattr("data_pipeline.sources.catalog._looked_into", lambda *_: pytest.fail("scanned anew"))
        again = open_catalog(cfg, "train")
    assert (again.paths, again.bad, again.classes) == (first.paths, first.bad, first.classes)
    assert np.array_equal(again.labels, first.labels)

    (folders / "train" / "cat" / "cat 0.jpg").rename(folders / "train" / "cat" / "cat 9.jpg")
    assert "cat/cat 9.jpg" in open_catalog(cfg, "train").paths
    (folders / "train" / "cat" / "broken.jpg").write_bytes((folders / "train" / "cat" / "cat 1.jpg").read_bytes())
    assert open_catalog(cfg, "train").bad == {}


def test_a_cache_that_cannot_be_written_only_costs_time(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "file" / "cache"))
    assert len(open_catalog(DataConfig(path=str(folders)), "train")) == 9
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("spoil", [lambda path: path.chmod(0o777), lambda path: os.chown(path, 12345, -1)])
def test_a_cache_of_others_is_not_read(
    spoil: Callable[[Path], None],
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    cfg = DataConfig(path=str(folders))
    open_catalog(cfg, "train")
    scans = tmp_path / "cache/scans"
    kept = {file: file.stat().st_mtime_ns for file in scans.iterdir()}
    assert kept and not scans.stat().st_mode & 0o077
    try:
        spoil(scans)
    except PermissionError:
        pytest.skip("only root gives files away")
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.sources.catalog._load", lambda *_: pytest.fail("read"))
        _say_forgetful.cache_clear()
        assert len(open_catalog(cfg, "train")) == 9
    assert capsys.readouterr().err.count(f"scanning {folders} anew each time: cache: ") == 1
    assert {file: file.stat().st_mtime_ns for file in scans.iterdir()} == kept
