"""Decode every image and report the faulty ones: python -m data_pipeline.verify PATH [--quarantine FILE]

PATH is any value of data.path, or a pack; of a pack, checksums, index and tar members are compared as well. The exit code
is 0 where all is well, 1 where anything is wrong, 2 for a mistake in the command.
"""

import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.address import Address
from data_pipeline.common.atomic_io import read_bytes
from data_pipeline.common.cli import parse
from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.common.worker_pool import Workers, check_workers, progress
from data_pipeline.config import DataConfig
from data_pipeline.options import CHOOSING, command_line
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.image_headers import BadImage, Size
from data_pipeline.sources.pack_format import SPLITS, Index, Pack, is_pack, key, sha256, shard_name
from data_pipeline.sources.pil_decode import decode
from data_pipeline.sources.quarantine import Fault, print_faults, relative_to_data, write_quarantine
from data_pipeline.sources.torchvision_sets import dataset_root
from data_pipeline.summary import print_summary

_ROWS = 32  # images that a process decodes at a time


class Outcome(NamedTuple):
    """Result of checking a dataset."""

    images: int
    """Images that were checked, the faulty ones included."""
    faults: list[Fault]
    """Images that cannot be decoded."""
    damage: list[Fault]
    """Files of a pack that are not as they were written."""


class _Job(NamedTuple):
    """Part of the check: a number of images or shards, and a function that finds their faults."""

    units: int
    check: Callable[[], list[Fault]]


def verify(cfg: DataConfig, workers: int | None = None) -> Outcome:
    """Check both splits of the dataset or pack `cfg.path`. Raises `UserError` where there is none."""
    root = dataset_root(cfg)
    require(
        not isinstance(root, Address),
        f"PATH: {root} is in an object store, and files are verified on this machine; copy it here, and give the copy",
    )
    try:
        return verify_pack(Pack.open(root), workers) if is_pack(root) else verify_images(cfg, workers)
    except OSError as error:
        raise UserError(f"PATH: cannot read {error.filename or root} ({error.strerror}); mend that first") from None


def verify_images(cfg: DataConfig, workers: int | None = None) -> Outcome:
    """Decode every image that the catalog finds, and add those that it leaves out itself. Raises `UserError`."""
    catalogs = [open_catalog(cfg, split) for split in SPLITS]
    print_summary(cfg, *catalogs)
    faults = [
        Fault(relative_to_data(cfg, catalog.root, path), why)
        for catalog in catalogs
        for path, why in catalog.bad.items()
    ]
    jobs = [
        _Job(len(rows), partial(_check_images, cfg, catalog, rows))
        for catalog in catalogs
        for rows in _cut(len(catalog))
    ]
    images = sum(job.units for job in jobs) + len(faults)
    return Outcome(images, faults + _run(jobs, "images", workers), [])


def verify_pack(pack: Pack, workers: int | None = None) -> Outcome:
    """Compare the files of a pack with its manifest and index, then decode every image."""
    damage, shards, images = [], [], []
    for split in SPLITS:
        part = pack.manifest["splits"][split]
        wrong = _check_file(pack.root, part["index"])
        if wrong:  # without its index, the places of its images are unknown
            damage += wrong
            continue
        index = pack.index(split)
        for number, entry in enumerate(part["shards"]):
            rows = np.flatnonzero(index.shard == number)
            shards.append(_Job(1, partial(_check_shard, pack.root, entry, index, rows)))
        images += [_Job(len(rows), partial(_check_rows, pack.root / split, index, rows)) for rows in _cut(len(index))]
    damage += _run(shards, "shards", workers)
    return Outcome(sum(job.units for job in images), _run(images, "images", workers), damage)


def _run(jobs: list[_Job], label: str, workers: int | None) -> list[Fault]:
    faults: list[Fault] = []
    pool: Workers[int, list[Fault]] = Workers(lambda number: jobs[number].check(), workers)
    with pool, progress(label, sum(job.units for job in jobs)) as advance:
        for job, found in zip(jobs, pool.map(range(len(jobs))), strict=True):
            faults += found
            advance(job.units)
    return faults


def _cut(count: int) -> Iterator[range]:
    return (range(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))


def _check_images(cfg: DataConfig, catalog: Catalog, rows: range) -> list[Fault]:
    checked = ((row, _why_bad(partial(catalog.read, row))) for row in rows)
    return [Fault(relative_to_data(cfg, catalog.root, catalog.paths[row]), why) for row, why in checked if why]


def _check_rows(folder: Path, index: Index, rows: range) -> list[Fault]:
    faults = []
    for row in rows:
        shard, offset, length = folder / shard_name(index.shard[row]), int(index.offset[row]), int(index.length[row])
        why = _why_bad(partial(read_bytes, shard, offset, length), Size(int(index.height[row]), int(index.width[row])))
        if why:
            faults.append(Fault(f"{folder.name}/{index.paths[row]}", why))
    return faults


def _why_bad(read: Callable[[], bytes], size: Size | None = None) -> str | None:
    """Decode an image; return why it fails, or has another size than it should, else None."""
    try:
        image = decode(read())
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or type(error).__name__
    if size and image.size != (size.width, size.height):
        return f"{image.width} x {image.height} pixels where the index has {size.width} x {size.height}"
    return None


def _check_file(root: Path, entry: dict[str, Any]) -> list[Fault]:
    """Compare a file of a pack with its entry in the manifest."""
    try:
        differs = sha256(root / entry["file"]) != entry["sha256"]
    except OSError as error:
        return [Fault(entry["file"], error.strerror or type(error).__name__)]
    return [Fault(entry["file"], "its checksum is not that of the manifest")] if differs else []


def _check_shard(root: Path, entry: dict[str, Any], index: Index, rows: NDArray[np.int64]) -> list[Fault]:
    """Compare a shard with the manifest, and its members with the index."""
    faults = _check_file(root, entry)
    try:
        with tarfile.open(root / entry["file"], "r:") as tar:
            found = [(member.name, member.offset_data, member.size, _label(tar, member)) for member in tar]
    except (OSError, tarfile.TarError):
        return faults or [Fault(entry["file"], "it is no tar")]
    wanted = []
    for row in rows:
        label, offset, length = str(index.label[row]), int(index.offset[row]), int(index.length[row])
        behind = offset + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
        wanted += [(f"{key(row)}.jpg", offset, length, ""), (f"{key(row)}.cls", behind, len(label), label)]
    return faults if found == wanted else [*faults, Fault(entry["file"], "its members are not those of the index")]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """Read a .cls member."""
    file = tar.extractfile(member) if member.name.endswith(".cls") else None
    return file.read().decode(errors="replace") if file else ""


def main() -> None:
    data = tuple(name for name in CHOOSING if name != "quarantine")  # files on such a list are checked too
    parser = command_line("python -m data_pipeline.verify", "Decode every image of a dataset or a pack.", data)
    parser.add_argument("path", help="What to check: a pack, or anything else that data.path may be.")
    parser.add_argument("--quarantine", help="A file to write, with the images that --data.quarantine shall leave out.")
    parser.add_argument("--workers", type=int, help="Processes; as many as processors if not given.")
    args = parse(parser, sys.argv[1:])
    if args.quarantine:
        _require_new(Path(args.quarantine))
    check_workers(args.workers)
    outcome = verify(DataConfig(path=args.path, **args.data), args.workers)
    wrong = outcome.faults + outcome.damage
    print(
        f"{printable(args.path)}: {outcome.images:,} images checked, {len(outcome.faults):,} cannot be decoded", end=""
    )
    print(f"; {len(outcome.damage):,} of the pack's files are damaged" if outcome.damage else "")
    if wrong:
        print_faults(wrong)
    if args.quarantine:
        _write_list(Path(args.quarantine), outcome.faults)
    if wrong:
        sys.exit(1)


def _require_new(file: Path) -> None:
    require(not file.exists(), f"--quarantine: {file} exists; remove it, or give another file")
    require(file.parent.is_dir(), f"--quarantine: {file.parent} is not a folder; make it, or give another file")


def _write_list(file: Path, faults: list[Fault]) -> None:
    try:
        write_quarantine(file, faults)
    except OSError as error:
        raise UserError(f"--quarantine: cannot write {file} ({error.strerror}); give another file") from None
    print(f"{len(faults):,} listed in {printable(str(file))}: leave them out with --data.quarantine")
