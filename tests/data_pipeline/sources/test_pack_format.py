"""A pack that claims what cannot be is one line, whatever it claims."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.sources.pack_format import Index, joined

ENTRY = {"file": "train/index.npz", "sha256": "", "bytes": 0}
PART = {"index": ENTRY, "shards": [ENTRY]}
MANIFEST = {"format": "sluice-pack", "version": 1, "splits": {"train": PART, "val": PART}}


def columns(**changed: object) -> dict[str, Any]:
    """Arrays of an index of two images of two classes."""
    names, ends = joined(["a/x.jpg", "b/y.jpg"])
    classes, class_ends = joined(["a", "b"])
    arrays = {"shard": [0, 0], "offset": [512, 2048], "length": [700, 700], "label": [0, 1], "height": [9, 9],
              "width": [9, 9], "paths": names, "path_ends": ends, "classes": classes, "class_ends": class_ends}  # fmt: skip
    return {name: np.asarray(array) for name, array in (arrays | changed).items()}


def pack(root: Path, arrays: dict[str, Any], save: Callable[..., None] = np.savez) -> Path:
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        stream = io.BytesIO()
        save(stream, **arrays)
        (root / split / "index.npz").write_bytes(stream.getvalue())
    (root / "manifest.json").write_text(json.dumps(MANIFEST))
    return root


def complaint(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_catalog(DataConfig(path=str(root)), "train")
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


def test_what_fits_is_taken(tmp_path: Path) -> None:
    catalog = open_catalog(DataConfig(path=str(pack(tmp_path / "pack", columns()))), "train")
    assert (len(catalog), catalog.shards, catalog.classes) == (2, ["000000.tar"], ["a", "b"])
    assert catalog.taken.layout == "a pack, 1 shard in train/"


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("shard", [0, 2**31 - 1]),
        ("shard", [0, 2]),
        ("shard", [-1, 0]),
        ("offset", [-1, 0]),
        ("length", [700, 2**40]),
        ("length", [700, -1]),
        ("label", [0, 2]),
        ("label", [0, -1]),
        ("height", [9, -9]),
        ("width", [9]),
        ("offset", [[512, 2048]]),
    ],
)
def test_columns_that_cannot_be(column: str, values: list[Any], tmp_path: Path) -> None:
    assert complaint(pack(tmp_path / "pack", columns(**{column: values}))) == (
        f"ROOT/train/index.npz: cannot be read (its column {column} does not fit its 2 images); make the pack anew, or copy "
        "it again"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"shard": [0, 2**31]},
        {"shard": [0.5, 1.5]},
        {"shard": np.array([b"x", b"y"])},
        {"shard": np.array(["x", {}], object)},
        {"path_ends": [7, 2**40]},
        {"path_ends": [7.5, 14]},
        {"classes": np.array([255, 254], np.float64)},
        {"class_ends": [2, 1]},
    ],
)
def test_columns_of_another_kind(changed: dict[str, Any], tmp_path: Path) -> None:
    assert complaint(pack(tmp_path / "pack", columns(**changed))).startswith("ROOT/train/index.npz: cannot be read (")


def test_a_compressed_index_is_not_inflated(tmp_path: Path) -> None:
    """Its 20 kB would be 20 MB of zeros; those of 20 MB would be 20 GB."""
    arrays = columns(paths=np.zeros(20_000_000, np.uint8))
    assert "(it is compressed)" in complaint(pack(tmp_path / "pack", arrays, np.savez_compressed))


def test_an_array_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    root = pack(tmp_path / "pack", columns())
    index = root / "train/index.npz"
    # The claim stands in the header of the array, which numpy believes.
    index.write_bytes(index.read_bytes().replace(b"'shape': (14,), }", b"'shape': (9**15,)"))
    assert complaint(root).startswith("ROOT/train/index.npz: cannot be read (")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format":' * 100_000, "", "[]", '{"splits": []}'])
def test_a_manifest_of_another_kind(text: str, tmp_path: Path) -> None:
    root = pack(tmp_path / "pack", columns())
    (root / "manifest.json").write_text(text)
    assert complaint(root) == "ROOT/manifest.json: not of a pack of version 1; make the pack anew"


def test_a_manifest_of_100_gb(tmp_path: Path) -> None:
    root = pack(tmp_path / "pack", columns())
    with open(root / "manifest.json", "wb") as stream:
        stream.truncate(100 << 30)
    assert complaint(root) == "ROOT: cannot read its manifest.json (File too large); give the folder of a pack"


def test_an_index_is_what_it_was_written_as(tmp_path: Path) -> None:
    numbers = {name: columns()[name] for name in ("shard", "offset", "length", "label", "height", "width")}
    index = Index(**numbers, paths=["a/x.jpg", "ü/\udcff"], classes=["a", "b"])
    (tmp_path / "index.npz").write_bytes(index.to_bytes())
    read = Index.load(tmp_path / "index.npz")
    assert (read.paths, read.classes, read.shards) == (index.paths, index.classes, 1)
    assert all(
        np.array_equal(getattr(read, name), getattr(index, name)) for name in ("shard", "offset", "length", "label")
    )
