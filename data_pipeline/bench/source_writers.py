"""Write class folders in the layouts in which data sets are published: for the benchmark of sources, and for tests."""

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

_ROWS = 100  # images in a row group, as `datasets` writes them


def images_of(folders: Path, split: str) -> list[Path]:
    """List a split's images in the order of their class folders."""
    return sorted((folders / split).glob("*/*"))


def write_zip(folders: Path, file: Path, *, deflated: bool) -> Path:
    """Write all splits into one archive, in a folder of its own."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for image in sorted(folders.glob("*/*/*")):
            archive.write(image, f"{file.stem}/{image.relative_to(folders)}")
    return file


def write_parquet(folders: Path, into: Path, *, compression: str, splits: Iterable[str], files: int = 2) -> Path:
    """Write `files` files a split, with the metadata of `datasets`. Only with compression "none" are places known."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    into.mkdir(parents=True)
    for split in splits:
        images = images_of(folders, split)
        classes = sorted({image.parent.name for image in images_of(folders, "train")})
        per_file = -(-len(images) // files)
        for number in range(files):
            part = images[number * per_file : (number + 1) * per_file]
            features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            image = pyarrow.StructArray.from_arrays(
                [pyarrow.array([file.read_bytes() for file in part]), pyarrow.array([file.name for file in part])],
                ["bytes", "path"],
            )
            label = pyarrow.array([classes.index(file.parent.name) for file in part], pyarrow.int64())
            table = pyarrow.table({"image": image, "label": label}).replace_schema_metadata(metadata)
            parquet.write_table(
                table,
                into / f"{split}-{number:05d}-of-{files:05d}.parquet",
                row_group_size=_ROWS,
                compression=compression,
                use_dictionary=compression != "none",
            )
    return into


def write_imagenet_tars(folders: Path, into: Path) -> Path:
    """Write a tar of a tar for each class, in the order of the classes, and a flat tar of the validation images if any."""
    into.mkdir(parents=True)
    classes = sorted(path.name for path in (folders / "train").iterdir())
    with tarfile.open(into / "ILSVRC2012_img_train.tar", "w") as tar:
        for row, name in enumerate(classes):
            synset = synset_of(row)
            images = [image.read_bytes() for image in sorted((folders / "train" / name).iterdir())]
            _add(
                tar, f"{synset}.tar", _tar({f"{synset}_{number:05d}.JPEG": data for number, data in enumerate(images)})
            )
    val = images_of(folders, "val")
    if val:
        members = {f"ILSVRC2012_val_{number + 1:08d}.JPEG": image.read_bytes() for number, image in enumerate(val)}
        (into / "ILSVRC2012_img_val.tar").write_bytes(_tar(members))
    return into


def synset_of(row: int) -> str:
    """Name a class as ImageNet does."""
    return f"n{row:08d}"


def _tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members.items():
            _add(tar, name, data)
    return stream.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
