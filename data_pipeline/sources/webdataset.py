"""Read tar shards in WebDataset layout: KEY.jpg beside KEY.cls."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data_pipeline.common.atomic_io import stays_below
from data_pipeline.common.class_names import lacking
from data_pipeline.common.errors import UserError, require
from data_pipeline.sources.folder_walk import look_into
from data_pipeline.sources.listing import Listing, Taken, counted, is_foreign, is_image
from data_pipeline.sources.splits import role_of
from data_pipeline.sources.storage.objects import ObjectFile, Objects

_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of a compressed file -> program that decompresses it."""
_LONGEST = 1 << 20  # bytes of a header or a label: a longer one is damage, or meant to fill the memory


class ShardNames(NamedTuple):
    """Shards of a folder by their splits."""

    train: list[str]
    val: list[str]
    """Empty where no name mentions a split for validation."""
    notes: list[str]

    @property
    def val_from(self) -> str:
        """Source of the validation images in words; empty where there are none."""
        return f"{counted(len(self.val), 'tar shard')} by name, as {self.val[0]}" if self.val else ""


class _Sample(NamedTuple):
    """Image in a shard: its name, its place in bytes, its label if it has one."""

    name: str
    offset: int
    length: int
    label: str | None


def is_shard(name: str) -> bool:
    return name.lower().endswith(".tar")


def is_archive(name: str) -> bool:
    """Return True for a name of a compressed archive, which may hold images."""
    return name.lower().endswith((".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar"))


def shard_names(base: Path) -> list[str]:
    return [name for name in look_into(base).files if is_shard(name)]


def split_shards(base: Path) -> ShardNames:
    """Divide the shards of a folder by the splits that their names mention.

    Raises `UserError` where only some mention one.
    """
    return divided_by_name(shard_names(base), base)


def divided_by_name(names: list[str], base: Path) -> ShardNames:
    """Divide these shards as `split_shards` does."""
    roles = {role: [name for name in names if role_of(name) == role] for role in ("train", "val", "test", None)}
    if len(roles[None]) == len(names):
        return ShardNames(names, [], [])
    require(
        not roles[None] and bool(roles["train"]),
        f"data.path: the shards of {base} name splits, but "
        f"{f'{roles[None][0]} names none' if roles[None] else 'none names train'}; move them into train/ and val/",
    )
    val, left = (roles["val"], roles["test"]) if roles["val"] else (roles["test"], [])
    return ShardNames(roles["train"], val, [f"left alone: {counted(len(left), 'shard')}, as {left[0]}"] if left else [])


def tar_shards(base: Path, names: list[str], classes: list[str] | None, objects: Objects | None = None) -> Listing:
    """List the samples of the shards `names` in `base`; their labels are the classes, unless `classes` are given.

    `objects` are the shards where `base` is an address.
    """

    def opened(number: int) -> _Small:
        return _SmallReadsOfObject(objects, number) if objects else _SmallReads(base / names[number])

    samples = [
        (number, sample)
        for number, name in enumerate(names)
        for sample in _samples(base / name, partial(opened, number))
    ]
    twice = len(samples) - len({(number, sample.name) for number, sample in samples})
    require(
        twice == 0,
        f"data.path: {twice} images in the shards of {base} have the name of another; give each one of its own",
    )
    labelled = [(number, sample, sample.label) for number, sample in samples if sample.label is not None]
    require(
        len(labelled) > 0,
        f"data.path: no images in the shards of {base}; they need KEY.jpg beside KEY.cls members, and a tar of class folders "
        "must be unpacked",
    )
    # Validation takes over the classes of training; a label that training lacks could not be scored.
    classes = classes or _in_order({label for _, _, label in labelled})
    rows = {name: row for row, name in enumerate(classes)}
    for number, _, label in labelled:
        require(
            label in rows,
            f"data.path: {base / names[number]} has class {label[:80]}, which training lacks "
            f"({'' if label in rows else lacking(label, classes)}); remove it, or write the same classes",
        )
    bare = next((f"{names[number]}/{sample.name}" for number, sample in samples if sample.label is None), None)
    note = f"without a .cls, so left out: {counted(len(samples) - len(labelled), 'image')}, as {bare}"
    return Listing(
        base,
        [f"{names[number]}/{sample.name}" for number, sample, _ in labelled],
        [rows[label] for _, _, label in labelled],
        classes,
        [base, *(base / name for name in names)],
        names,
        np.array([(number, sample.offset, sample.length) for number, sample, _ in labelled], np.int64),
        Taken(counted(len(names), "tar shard"), notes=[note] if bare else []),
        objects=objects,
    )


def refuse_archives(base: Path) -> None:
    """Raise `UserError` where a folder holds compressed archives."""
    archive = next((name for name in look_into(base).files if is_archive(name)), "")
    require(
        not archive,
        f"data.path: {base / archive} is compressed, so no image in it can be reached alone; unpack it, or decompress "
        "shards to .tar",
    )


def _in_order(labels: set[str]) -> list[str]:
    """Sort labels by number where all are numbers, else by name."""
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)


def _samples(shard: Path, opened: Callable[[], "_Small"]) -> Iterator[_Sample]:
    """Yield the images of a shard. The members of one sample stand together, in any order."""
    try:
        with opened() as file:
            _check_whole(shard, file)
        with opened() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for _, members in groupby(_members(tar, shard), lambda member: _key(member.name)):
                sample = list(members)
                labels = [member.name for member in sample if member.name.endswith(".cls")]
                require(
                    len(labels) < 2,
                    f"data.path: the shard {shard} has several labels for the key {_key(sample[0].name)[:80]!r}, as "
                    f"{', '.join(labels[:2])[:160]}; a key ends at the first dot of a name, so give each sample a key of its "
                    "own, without dots",
                )
                images = [member for member in sample if is_image(member.name)]
                # KEY.jpg is preferred to KEY.mask.png.
                images.sort(key=lambda member: PurePosixPath(member.name).name.count("."))
                if images:
                    image = images[0]
                    least = [its.name for its in images if its.name.count(".") == image.name.count(".")]
                    require(
                        len(least) < 2,
                        f"data.path: the shard {shard} has several images for the key {_key(image.name)[:80]!r}, as "
                        f"{', '.join(least[:2])[:160]}; call the one to train on KEY.jpg, and others KEY.mask.png or the like",
                    )
                    yield _Sample(image.name, image.offset_data, image.size, _label(tar, sample))
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.path: the shard {shard} cannot be read ({error}); copy it again or remove it") from None


def _check_whole(shard: Path, file: "_Small") -> None:
    start = file.read(8)
    undo = next((undo for magic, undo in _PACKED.items() if start.startswith(magic)), None)
    require(
        undo is None,
        f"data.path: the shard {shard} is compressed, so no image in it can be reached alone; decompress it "
        f"(`{undo} < OLD.tar > NEW.tar`), as images are compressed already",
    )
    file.seek(max(file.seek(0, os.SEEK_END) - tarfile.BLOCKSIZE, 0))
    end = file.read(tarfile.BLOCKSIZE)
    require(
        len(end) == tarfile.BLOCKSIZE and not any(end),
        f"data.path: the shard {shard} is cut off; copy it again or remove it",
    )


def _members(tar: tarfile.TarFile, shard: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members, except those of other programs. Raises `UserError` for one that is no plain file in the shard."""
    for member in tar:
        require(
            stays_below(member.name) and (member.isreg() or member.isdir()) and not member.issparse(),
            f"data.path: the shard {shard} has a member {member.name!r} that leads elsewhere; remove it",
        )
        if member.isreg() and not any(is_foreign(part) for part in PurePosixPath(member.name).parts):
            yield member


def _label(tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> str | None:
    for member in members:
        file = tar.extractfile(member) if member.name.endswith(".cls") else None
        if file:
            _bound(member.size)
            return file.read().decode().strip() or None
    return None


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.split('.')[0]}"


def _bound(size: int) -> None:
    if not 0 <= size <= _LONGEST:
        raise tarfile.ReadError(f"a header or label of {size} bytes")


class _Small(io.RawIOBase):
    """File that reads at most the bytes of a header or a label at once, however many are asked for."""

    def read(self, size: int | None = -1, /) -> bytes:
        _bound(-1 if size is None else size)
        return super().read(-1 if size is None else size) or b""


class _SmallReads(_Small, io.FileIO):
    """Such a file on this machine."""


class _SmallReadsOfObject(_Small, ObjectFile):
    """Such a file in an object store."""
