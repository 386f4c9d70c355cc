"""DST.partial: a pack grows here until it is whole; a later call goes on from it.

plan.json            source and options of the pack; work goes on only for the same plan
train-000000.json    a note on each finished shard
pack/                becomes DST
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from data_pipeline.common.atomic_io import replace_file, sync
from data_pipeline.common.errors import UserError
from data_pipeline.sources.catalog import Catalog
from data_pipeline.sources.image_headers import Size
from data_pipeline.sources.pack_format import (
    FORMAT,
    INDEX,
    MANIFEST,
    VERSION,
    Index,
    Pack,
    ShardWriter,
    is_pack,
    shard_name,
)

_PLAN, UNDER_WAY = "plan.json", "shard.tar"


@dataclass
class Note:
    """Contents of a finished shard: rows `first` to `next` of the catalog, except the bad ones."""

    first: int
    next: int = 0
    bytes: int = 0
    sha256: str = ""
    encoded: int = 0
    """Images that were encoded anew."""
    row: list[int] = field(default_factory=list)
    """Row in the catalog of each image; the lists below are in the same order."""
    offset: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    height: list[int] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    """Path of each image left out -> reason."""


class Workshop:
    """Work folder beside `dst`. Raises OSError where it cannot be written."""

    def __init__(self, dst: Path, options: Mapping[str, Any], catalogs: Mapping[str, Catalog]) -> None:
        self.dst, self.catalogs = dst, catalogs
        self.folder = _beside(dst)
        self.pack = self.folder / "pack"
        self.plan = {
            "format": FORMAT,
            "version": VERSION,
            "encoder": f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}",
            "options": dict(options),
            "sources": {split: _digest(catalog) for split, catalog in catalogs.items()},
            "classes": catalogs["train"].classes,
        }

    def finished(self) -> bool:
        """Return True where `dst` is this same pack, and remove leftovers beside it. Raises `UserError` for another pack."""
        if not is_pack(self.dst):
            return False
        self.compare(self.dst, Pack.open(self.dst).manifest)
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    @contextmanager
    def open(self) -> Iterator[None]:
        """Begin the work or go on with it. Raises `UserError` where another process works on it, or it had another plan."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            lock_folder(lock.fileno(), self.folder)
            plan = self.folder / _PLAN
            # A pack is only continued with the images and options that it was begun with.
            if plan.exists():
                self.compare(self.folder, json.loads(plan.read_bytes()))
            else:
                replace_file(plan, as_json(self.plan))
            for split in self.catalogs:
                (self.pack / split).mkdir(parents=True, exist_ok=True)
            try:
                yield
            finally:
                (self.folder / UNDER_WAY).unlink(missing_ok=True)

    def notes(self, split: str) -> list[Note]:
        """Read the notes of the finished shards, in order."""
        notes: list[Note] = []
        while True:
            shard = self.pack / split / shard_name(len(notes))
            try:
                note = Note(**json.loads(self._note(split, len(notes)).read_bytes()))
                whole = shard.stat().st_size == note.bytes
            except FileNotFoundError:
                whole = False
            if not whole:
                return notes
            notes.append(note)

    def add(self, split: str, number: int, shard: "Shard", next_row: int) -> Note:
        """Finish a shard and move it to its place."""
        note = shard.note
        note.next = next_row
        note.bytes, note.sha256 = shard.writer.close()
        os.replace(shard.writer.file, self.pack / split / shard_name(number))
        sync(self.pack / split)
        replace_file(self._note(split, number), as_json(asdict(note)))
        return note

    def finish(self, notes: Mapping[str, list[Note]]) -> dict[str, Any]:
        """Write indices and manifest, and rename the pack to `dst`. Returns its manifest."""
        manifest = self._write_index_and_manifest(notes)
        for folder in (*(self.pack / split for split in notes), self.pack):
            sync(folder)
        self.pack.rename(self.dst)
        sync(self.dst.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        return manifest

    def _write_index_and_manifest(self, notes: Mapping[str, list[Note]]) -> dict[str, Any]:
        manifest = {**self.plan, "splits": {split: self._complete(split, notes[split]) for split in notes}}
        self._write(MANIFEST, as_json(manifest))
        return manifest

    def _write(self, name: str, data: bytes) -> None:
        """Write a file of the pack, whole or not at all."""
        replace_file(self.pack / name, data)

    def _complete(self, split: str, notes: list[Note]) -> dict[str, Any]:
        """Write a split's index. Returns the split's part of the manifest."""
        catalog, file = self.catalogs[split], f"{split}/{INDEX}"
        # The notes of all shards, one behind the other, are the columns of the index.
        rows = np.concatenate([np.array(note.row, np.int64) for note in notes])
        index = Index(
            shard=np.repeat(np.arange(len(notes), dtype=np.int32), [len(note.row) for note in notes]),
            label=catalog.labels[rows],
            paths=[catalog.paths[row] for row in rows],
            classes=catalog.classes,
            **{
                name: np.concatenate([np.array(getattr(note, name), kind) for note in notes])
                for name, kind in (
                    ("offset", np.int64),
                    ("length", np.int64),
                    ("height", np.int32),
                    ("width", np.int32),
                )
            },
        )
        # The index is on disk before the manifest, which has its checksum.
        data = index.to_bytes()
        self._write(file, data)
        bad = dict(catalog.bad)
        for note in notes:
            bad |= note.bad
        encoded = sum(note.encoded for note in notes)
        return {
            "images": len(rows),
            "encoded": encoded,
            "copied": len(rows) - encoded,
            "index": {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
            "shards": [
                {
                    "file": f"{split}/{shard_name(number)}",
                    "images": len(note.row),
                    "bytes": note.bytes,
                    "sha256": note.sha256,
                }
                for number, note in enumerate(notes)
            ],
            "bad": [{"path": path, "why": why} for path, why in bad.items()],
        }

    def _note(self, split: str, number: int) -> Path:
        return self.folder / f"{split}-{number:06d}.json"

    def compare(self, folder: Path, plan: Mapping[str, Any]) -> None:
        changed = _difference(plan, self.plan)
        if changed:
            raise UserError(
                f"DST: {folder} was made otherwise ({changed}); give the same options, another DST, or remove that folder"
            )


class Shard:
    """Shard being written, in a file that the next attempt overwrites."""

    def __init__(self, shop: Workshop, first_row: int, first_key: int) -> None:
        self.note = Note(first_row)
        self.writer = ShardWriter(shop.folder / UNDER_WAY)
        self._key = first_key

    def __len__(self) -> int:
        return len(self.note.row)

    def add(self, row: int, jpeg: bytes, size: Size, label: int, *, encoded: bool) -> None:
        note = self.note
        note.row.append(row)
        note.offset.append(self.writer.add(self._key + len(self) - 1, jpeg, label))
        note.length.append(len(jpeg))
        note.height.append(size.height)
        note.width.append(size.width)
        note.encoded += encoded


def refuse_foreign(dst: Path) -> None:
    """Raise `UserError` where `dst`, or the folder beside it, holds anything but a pack."""
    if os.path.lexists(dst) and not (is_pack(dst) or _empty(dst)):
        raise UserError(f"DST: {dst} exists and is no pack; give a folder that is not there yet")
    if os.path.ismount(dst):
        raise UserError(f"DST: {dst} is a mount point, which cannot appear at once; give a folder within it")
    folder = _beside(dst)
    # The lock file is made before the plan.
    if folder.exists() and not (_ours(folder / _PLAN) or _empty(folder, "lock")):
        raise UserError(f"DST: {folder}, where it would grow, is in use for something else; give another DST")


def _beside(dst: Path) -> Path:
    dst = Path(os.path.abspath(dst))
    return dst.with_name(f"{dst.name}.partial")


def _ours(plan: Path) -> bool:
    try:
        return bool(json.loads(plan.read_bytes())["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _empty(folder: Path, *but: str) -> bool:
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} <= set(but)


def lock_folder(descriptor: int, folder: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by the workers
    except OSError as error:
        # Do without a lock on a file system that has none.
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"DST: another process is at work in {folder}; wait for it, or give another DST") from None


def _digest(catalog: Catalog) -> str:
    """Hash everything that a catalog says of its images."""
    digest = hashlib.sha256(json.dumps([list(catalog.paths), catalog.classes, catalog.bad]).encode())
    digest.update(catalog.labels.tobytes())
    return digest.hexdigest()


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    if old["version"] != new["version"]:
        return f"in version {old['version']} of the format, now {new['version']}"
    for name in {**old["options"], **new["options"]}:
        was, now = old["options"].get(name), new["options"].get(name)
        if was != now:
            return f"--{name.replace('_', '-')} was {was}, now {now}"
    for split, digest in new["sources"].items():
        if old["sources"].get(split) != digest:
            return f"from other {split} images than there are now"
    if old["encoder"] != new["encoder"]:
        return f"by {old['encoder']}, now {new['encoder']}"
    return None


def as_json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()
