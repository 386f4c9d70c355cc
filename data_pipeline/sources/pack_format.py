"""The packed format, described in PACK.md: tar shards of images, an index of their places, a manifest."""

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.address import Address
from data_pipeline.common.atomic_io import MOST_BYTES, read_bytes, stays_below
from data_pipeline.common.errors import UserError, require
from data_pipeline.sources.storage.objects import open_objects, read_object
from data_pipeline.sources.storage.store import stat

FORMAT, VERSION = "sluice-pack", 1
SPLITS = ("train", "val")
MANIFEST, INDEX = "manifest.json", "index.npz"

_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "label": np.int64,
    "height": np.int32,
    "width": np.int32,
}


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def key(row: int) -> str:
    """Name an image's members in its shard, without the suffix."""
    return f"{row:08d}"


@dataclass(frozen=True)
class Index:
    """Places, labels and sizes of the N images of a split."""

    shard: NDArray[np.int32]
    """[N] number of the image's shard."""
    offset: NDArray[np.int64]
    """[N] first byte of the JPEG in its shard."""
    length: NDArray[np.int64]
    """[N] bytes of the JPEG."""
    label: NDArray[np.int64]
    """[N] row of the image's class in `classes`."""
    height: NDArray[np.int32]
    """[N] pixels, as stored."""
    width: NDArray[np.int32]
    """[N] pixels, as stored."""
    paths: list[str]
    """[N] paths of the images in the dataset, relative to its split."""
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return int(self.shard.max(initial=-1)) + 1

    def to_bytes(self) -> bytes:
        """Pack into an .npz of plain arrays."""
        arrays = {name: np.asarray(getattr(self, name), kind) for name, kind in _COLUMNS.items()}
        arrays["paths"], arrays["path_ends"] = joined(self.paths)
        arrays["classes"], arrays["class_ends"] = joined(self.classes)
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **arrays)
        return stream.getvalue()

    @classmethod
    def load(cls, file: Path | BinaryIO) -> "Index":
        """Read an index. Raises OSError, or ValueError for a file that is no index, or that has impossible values."""
        with ZipFile(file) as members:
            if any(member.compress_type for member in members.infolist()):  # a few bytes could expand to any number
                raise ValueError("it is compressed")
        with np.load(file) as arrays:
            try:
                index = cls(
                    **{name: arrays[name].astype(kind, casting="same_kind") for name, kind in _COLUMNS.items()},
                    paths=parted(arrays["paths"], arrays["path_ends"]),
                    classes=parted(arrays["classes"], arrays["class_ends"]),
                )
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(str(error)) from None
        index._check()
        return index

    def _check(self) -> None:
        """Raise ValueError for values that no pack has."""
        for name in _COLUMNS:
            column = getattr(self, name)
            most = {"label": len(self.classes), "shard": len(self), "length": MOST_BYTES}.get(name, 1 << 62)
            if column.shape != (len(self),) or (column < 0).any() or (column >= most).any():
                raise ValueError(f"its column {name} does not fit its {len(self)} images")


@dataclass(frozen=True)
class Pack:
    """A packed dataset, opened for reading."""

    root: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, root: Path) -> "Pack":
        """Open the pack in `root`. Raises `UserError` where there is none that this version reads."""
        try:
            manifest = json.loads(_read(root / MANIFEST))
            if manifest["format"] != FORMAT or manifest["version"] != VERSION:
                raise ValueError
            parts = manifest["splits"].values()
            names = [entry["file"] for part in parts for entry in (part["index"], *part["shards"])]
        except UserError:
            raise
        except OSError as error:
            raise UserError(
                f"{root}: cannot read its {MANIFEST} ({error.strerror}); give the folder of a pack"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{root / MANIFEST}: not of a pack of version {VERSION}; make the pack anew") from None
        outside = [name for name in names if not stays_below(name)]
        require(
            not outside, f"{root / MANIFEST}: it names a file outside of the pack, {outside[:1]}; make the pack anew"
        )
        return cls(root, manifest)

    def index(self, split: str, cache_gb: float = 0.0) -> Index:
        """Read a split's index, from an address through the cache. Raises `UserError` where that fails."""
        source: Path | BinaryIO
        if isinstance(self.root, Address):
            source = io.BytesIO(open_objects(self.root / split, [INDEX], cache_gb).read_all(0))
        else:
            source = self.root / split / INDEX
        try:
            return Index.load(source)
        except (OSError, ValueError, EOFError, BadZipFile, MemoryError) as error:
            raise UserError(
                f"{self.root / split / INDEX}: cannot be read ({error}); make the pack anew, or copy it again"
            ) from None


class ShardWriter:
    """A shard being written: a POSIX tar (ustar) of KEY.jpg and KEY.cls members without dates or owners."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stream = open(file, "wb")  # noqa: SIM115 - closed by `close`
        self._tar = tarfile.open(fileobj=self._stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def size_with(self, length: int) -> int:
        """Most bytes of the finished shard if a JPEG of `length` bytes were added."""
        blocks = -(-length // tarfile.BLOCKSIZE)
        return self._tar.offset + (blocks + 3) * tarfile.BLOCKSIZE + tarfile.RECORDSIZE

    def add(self, row: int, jpeg: bytes, label: int) -> int:
        """Append an image and its label. Returns the offset of its first byte in the shard. Raises OSError."""
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._member(f"{key(row)}.jpg", jpeg)
        self._member(f"{key(row)}.cls", str(label).encode())
        return offset

    def close(self) -> tuple[int, str]:
        """End the shard and force it to disk. Returns its bytes and their SHA-256. Raises OSError."""
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return self.file.stat().st_size, sha256(self.file)

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def sha256(file: Path) -> str:
    """Hash a file. Raises OSError."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_pack(root: Path) -> bool:
    """Return True where a pack is. Raises `UserError` for an address that cannot be reached."""
    if isinstance(root, Address):
        return stat(root / MANIFEST) is not None
    return os.path.isfile(root / MANIFEST)  # an unreadable folder is reported elsewhere


def _read(file: Path) -> bytes:
    """Read a file or an object whole. Raises OSError, or `UserError` for an address."""
    return read_object(file) if isinstance(file, Address) else read_bytes(file)


def joined(texts: list[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    encoded = [text.encode(errors="surrogateescape") for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def parted(blob: NDArray[np.uint8], ends: NDArray[np.int64]) -> list[str]:
    """Split what `joined` has joined. Raises ValueError for anything else."""
    bounds = np.concatenate([np.zeros(1, np.int64), ends])
    whole = blob.dtype == np.uint8 and bounds.dtype == np.int64 and blob.shape == (bounds[-1],)
    if not whole or (np.diff(bounds) < 0).any():
        raise ValueError("its names do not fit their lengths")
    data, starts = blob.tobytes(), bounds.tolist()
    return [data[start:end].decode(errors="surrogateescape") for start, end in pairwise(starts)]
