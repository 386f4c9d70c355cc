"""Class folders in the layouts in which data sets are published, with what only tests need beside `source_writers`."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import scipy.io  # type: ignore[import-untyped]
from pyarrow import parquet

from data_pipeline.bench.source_writers import (
    images_of,
    synset_of,
    write_imagenet_tars,
    write_parquet,
    write_zip,
)

KIT = "ILSVRC2012_devkit_t12"


def write_kit(into: Path, classes: int, truth: list[int], *, compressed: bool = True) -> Path:
    """Write ImageNet's development kit; `truth` has the row of each validation image's class."""
    # Ids run backwards, and the synsets above the classes follow them, as in the real one.
    records = [(classes - row, synset_of(row), f"word {row}, other", "ünicode", 0) for row in range(classes)]
    records += [(classes + 1, "n99999999", "entity", "all", 2)]
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    stream = io.BytesIO()
    table = np.array(records[::-1], kinds).reshape(-1, 1)
    scipy.io.savemat(stream, {"version": 1.0, "synsets": table}, do_compression=compressed)
    members = {
        "readme.txt": b"",
        "data/meta.mat": stream.getvalue(),
        "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{classes - row}\n" for row in truth).encode(),
    }
    with tarfile.open(into / f"{KIT}.tar.gz", "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"{KIT}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return into


def classes_of(folders: Path) -> list[str]:
    return sorted(path.name for path in (folders / "train").iterdir())


def truth_of(folders: Path) -> list[int]:
    return [classes_of(folders).index(image.parent.name) for image in images_of(folders, "val")]


def imagenet_tars(folders: Path, into: Path) -> Path:
    return write_kit(write_imagenet_tars(folders, into), len(classes_of(folders)), truth_of(folders))


def kaggle_imagenet(folders: Path, into: Path) -> Path:
    base = into / "ILSVRC/Data/CLS-LOC"
    for row, name in enumerate(classes_of(folders)):
        (base / "train" / synset_of(row)).mkdir(parents=True)
        for number, image in enumerate(sorted((folders / "train" / name).iterdir())):
            (base / "train" / synset_of(row) / f"{number:04d}.JPEG").write_bytes(image.read_bytes())
    for name in ("val", "test"):
        (base / name).mkdir()
    lines = ["ImageId,PredictionString"]
    for number, (image, row) in enumerate(zip(images_of(folders, "val"), truth_of(folders), strict=True)):
        (base / f"val/ILSVRC2012_val_{number:08d}.JPEG").write_bytes(image.read_bytes())
        (base / f"test/ILSVRC2012_test_{number:08d}.JPEG").write_bytes(image.read_bytes())
        lines.append(f"ILSVRC2012_val_{number:08d},{synset_of(row)} 1 2 3 4 {synset_of(row)} 5 6 7 8 ")
    (into / "LOC_val_solution.csv").write_text("\n".join([lines[0], *sorted(lines[1:], reverse=True)]) + "\n")
    (into / "LOC_train_solution.csv").write_text("ImageId,PredictionString\n")
    (into / "LOC_synset_mapping.txt").write_text("n00000000 a thing\n")
    return into


def arrow(folders: Path, into: Path) -> Path:
    """The cache of `datasets`: a stream of batches a split, in folders of a configuration, a version and a hash."""
    write_parquet(folders, into / "made", compression="none", splits=("train", "val"), files=1)
    place = into / "some___set/default/0.0.0/abc"
    place.mkdir(parents=True)
    for split in ("train", "val"):
        table = parquet.read_table(next((into / "made").glob(f"{split}-*")))
        with pyarrow.ipc.new_stream(str(place / f"set-{split}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    (place / "cache-123.arrow").write_bytes(b"of another step")
    (place / "dataset_info.json").write_text("{}")
    return into / "some___set"


def hub(folders: Path, into: Path) -> Path:
    """The hub's cache: links from a snapshot to files with neither name nor suffix; Parquet compressed as it was for long."""
    repository = into / "datasets--some--set"
    for name in ("blobs", "refs", "snapshots/0123abc/data", "snapshots/older"):
        (repository / name).mkdir(parents=True)
    (repository / "refs/main").write_text("0123abc")
    write_parquet(folders, into / "made", compression="snappy", splits=("train", "val"), files=2)
    for number, file in enumerate(sorted((into / "made").iterdir())):
        file.rename(repository / f"blobs/{number}")
        name = file.name.replace("val", "validation")
        (repository / "snapshots/0123abc/data" / name).symlink_to(f"../../../blobs/{number}")
    return repository


def zipped(folders: Path, into: Path, *, deflated: bool) -> Path:
    into.mkdir()
    return write_zip(folders, into / "set.zip", deflated=deflated)


PUBLISHED: dict[str, Callable[[Path, Path], Path]] = {
    "ImageNet's tars": imagenet_tars,
    "Kaggle's ImageNet": kaggle_imagenet,
    "zip": lambda folders, into: zipped(folders, into, deflated=False),
    "zip, deflated": lambda folders, into: zipped(folders, into, deflated=True),
    "Parquet": lambda folders, into: write_parquet(folders, into, compression="none", splits=("train", "val")),
    "Parquet, zstd": lambda folders, into: write_parquet(folders, into, compression="zstd", splits=("train", "val")),
    "hub": hub,
    "Arrow": arrow,
}
"""Layout -> function that writes class folders in it, and returns the value of data.path."""
