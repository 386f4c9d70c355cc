"""Pack a dataset into a few large files, its images no larger than training needs: python -m data_pipeline.pack SRC DST

PACK.md describes the format. Everything is made in DST.partial and renamed to DST once it is whole; a finished shard
stays there, so the same command goes on where it was killed. The bytes depend only on the images, the options and the
version of Pillow, not on the number of processes or on interruptions.
"""

import io
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipeline import sampling
from data_pipeline.common.address import Address, place
from data_pipeline.common.cli import parse
from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.common.worker_pool import Workers, check_workers, progress
from data_pipeline.config import DataConfig
from data_pipeline.options import command_line
from data_pipeline.pack.remote_writer import RemoteWorkshop
from data_pipeline.pack.writer import Note, Shard, Workshop, refuse_foreign
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.image_headers import BadImage, Size, inspect
from data_pipeline.sources.pack_format import SPLITS, Pack
from data_pipeline.sources.pil_decode import as_rgb, decode
from data_pipeline.sources.quarantine import Fault, print_faults, relative_to_data
from data_pipeline.summary import print_summary

_PIECE = 16  # images that a process works on at a time
_AHEAD = 256  # images that are fetched ahead from an object store
_JPEG_SIDE = 65500  # pixels: libjpeg's JPEG_MAX_DIMENSION
_DRAFT = 2  # a JPEG may be decoded smaller, to at least this many times the wanted size, without a visible difference
_UNITS = {"": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class PackConfig:
    """Options of how images are stored. They decide every byte."""

    short_side: int | None = None
    """Images with a longer short side are reduced to this many pixels; if not given, none are."""
    quality: int = 90
    """JPEG quality of the images that are encoded anew, 1 to 95."""
    shard_size: str = "256MB"
    """Largest size of a shard, such as 256MB or 1GiB; a bare number counts images instead."""
    shuffle: bool = False
    """Mix the training images first, always in the same way, so that each shard holds all classes (for data.shuffle_shards)."""

    def __post_init__(self) -> None:
        require(
            self.short_side is None or 8 <= self.short_side <= 4096,
            f"--short-side: {self.short_side} is out of range; give 8 to 4096 pixels",
        )
        require(1 <= self.quality <= 95, f"--quality: {self.quality} is out of range; give 1 to 95")
        amount, unit = self._parsed
        require(
            amount * _UNITS[unit] >= (1 if unit == "" else 10**5),
            f"--shard-size: {self.shard_size} is too little; give 100KB or more, or a number of images",
        )

    @property
    def plan(self) -> dict[str, Any]:
        """Options as the pack's manifest has them."""
        plan = asdict(self)
        return plan if self.shuffle else {name: value for name, value in plan.items() if name != "shuffle"}

    @property
    def shard_bytes(self) -> float:
        amount, unit = self._parsed
        return amount * _UNITS[unit] if unit else float("inf")

    @property
    def shard_images(self) -> float:
        amount, unit = self._parsed
        return float("inf") if unit else amount

    @property
    def _parsed(self) -> tuple[float, str]:
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?) ?([kKMG]i?B)", self.shard_size)
        if not match or (match[3] or "") not in _UNITS:
            raise UserError(
                f"--shard-size: {self.shard_size} is no size; give one such as 256MB, or a number of images"
            )
        return float(match[1] or match[2]), match[3] or ""


class Stored(NamedTuple):
    """An image in the form that a pack holds."""

    jpeg: bytes
    size: Size
    encoded: bool
    """True where it was encoded anew."""


def store(data: bytes, cfg: PackConfig) -> Stored:
    """Return `data` unchanged if it is a JPEG no larger than wanted, else a new JPEG. Raises `BadImage`.

    New ones are RGB with 4:2:0 chroma, without any metadata; the orientation tag is ignored, as in training.
    """
    size = inspect(data)
    height, width = wanted = _reduced(size, cfg.short_side)
    if wanted == size and data.startswith(b"\xff\xd8"):
        decode(data)
        return Stored(data, size, encoded=False)
    if max(wanted) > _JPEG_SIDE:
        raise BadImage(f"no JPEG may be {width} x {height} pixels")
    image = as_rgb(decode(data, draft=(_DRAFT * width, _DRAFT * height)))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    image.info = {}  # Pillow would save a comment of the image
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=cfg.quality, subsampling="4:2:0")
    return Stored(stream.getvalue(), wanted, encoded=True)


def _reduced(size: Size, short_side: int | None) -> Size:
    short = min(size)
    if short_side is None or short <= short_side:
        return size
    return Size(*(max(1, round(side * short_side / short)) for side in size))


class _Piece(NamedTuple):
    """Rows `start` to `stop` of a split's catalog."""

    split: str
    start: int
    stop: int


def pack(
    cfg: DataConfig, dst: Path, options: PackConfig, workers: int | None = None
) -> tuple[dict[str, Any], list[Fault]]:
    """Pack both splits of a dataset into the folder `dst`, or go on with it. Returns manifest and files left out.

    Where `dst` is this same pack already, nothing is done. Raises `UserError`.
    """
    # Refuse early: reading the images takes long.
    if isinstance(dst, Address):
        RemoteWorkshop.refuse_foreign(dst)
    else:
        refuse_foreign(dst)
    try:
        catalogs = {split: open_catalog(cfg, split) for split in SPLITS}
    except OSError as error:
        raise UserError(f"SRC: cannot read {error.filename or cfg.path} ({error.strerror}); mend it") from None
    for catalog in catalogs.values():
        require(
            not dst.resolve().is_relative_to(catalog.root.resolve()),
            f"DST: {dst} lies among the images of SRC; give a folder elsewhere",
        )
    require(
        not catalogs["train"].multi_label,
        f"SRC: images of {cfg.path} have several classes, which a pack does not hold; train on it as it is",
    )
    print_summary(cfg, catalogs["train"], catalogs["val"])
    if options.shuffle:
        train = catalogs["train"]
        catalogs["train"] = train.part(sampling.order(0, 0, len(train)).tolist())
    # Errors while reading the images are handled there; an OSError here is of the destination.
    try:
        shop = (RemoteWorkshop if isinstance(dst, Address) else Workshop)(dst, options.plan, catalogs)
        manifest = _pack(shop, options, workers)
    except OSError as error:
        raise UserError(
            f"DST: cannot write {dst} ({error.strerror}); mend that, and the same command goes on after the last whole shard"
        ) from None
    faults = [
        Fault(relative_to_data(cfg, catalog.root, bad["path"]), bad["why"])
        for split, catalog in catalogs.items()
        for bad in manifest["splits"][split]["bad"]
    ]
    return manifest, faults


def _pack(shop: Workshop, options: PackConfig, workers: int | None) -> dict[str, Any]:
    if shop.finished():
        return Pack.open(shop.dst).manifest

    def work(piece: _Piece) -> list[Stored | str]:
        catalog = shop.catalogs[piece.split]
        catalog.prefetch(np.arange(piece.start, min(piece.start + _AHEAD, len(catalog))))
        return [_attempt(catalog, row, options) for row in range(piece.start, piece.stop)]

    with shop.open():
        notes = {split: shop.notes(split) for split in SPLITS}
        total = sum(len(catalog) for catalog in shop.catalogs.values())
        done = sum(_next_row(split_notes) for split_notes in notes.values())
        # An object store's client bears no fork.
        remote = any(
            isinstance(place, Address) for place in (shop.dst, *(each.root for each in shop.catalogs.values()))
        )
        with Workers(work, workers, threads=remote) as pool, progress("packing", total, done) as advance:
            for split in SPLITS:
                _pack_split(split, shop, notes[split], options, pool, advance)
        return shop.finish(notes)


def _pack_split(
    split: str,
    shop: Workshop,
    notes: list[Note],
    options: PackConfig,
    pool: Workers[_Piece, list[Stored | str]],
    advance: Callable[[int], None],
) -> None:
    """Append to `notes` the shards of a split that are missing."""
    catalog, start = shop.catalogs[split], _next_row(notes)
    if start == len(catalog):
        return
    count = sum(len(note.row) for note in notes)
    pieces = (_Piece(split, row, min(row + _PIECE, len(catalog))) for row in range(start, len(catalog), _PIECE))
    shard = Shard(shop, start, count)
    for row, image in enumerate(chain.from_iterable(pool.map(pieces)), start):
        if isinstance(image, str):
            shard.note.bad[catalog.paths[row]] = image
        else:
            full = len(shard) >= options.shard_images or shard.writer.size_with(len(image.jpeg)) > options.shard_bytes
            if full and len(shard):
                notes.append(shop.add(split, len(notes), shard, row))
                shard = Shard(shop, row, count)
            shard.add(row, image.jpeg, image.size, int(catalog.labels[row]), encoded=image.encoded)
            count += 1
        advance(1)
    require(count > 0, f"SRC: none of the {len(catalog)} images in {catalog.root} can be decoded; give intact ones")
    notes.append(shop.add(split, len(notes), shard, len(catalog)))


def _next_row(notes: list[Note]) -> int:
    return notes[-1].next if notes else 0


def _attempt(catalog: Catalog, row: int, options: PackConfig) -> Stored | str:
    """Read and encode an image for the pack; a string says why that fails."""
    try:
        return store(catalog.read(row), options)
    except BadImage as error:
        return str(error)
    except OSError as error:
        # It could be read a moment ago, so the storage fails, not the file; a pack without its images would help nobody.
        raise UserError(
            f"SRC: cannot read {catalog.root / catalog.paths[row]} ({error.strerror}); mend that, and the same command goes on"
        ) from None


def _print_outcome(dst: Path, manifest: dict[str, Any], faults: list[Fault]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *SPLITS, box=None, pad_edge=False)
    splits = [manifest["splits"][split] for split in SPLITS]
    for label, cells in (
        ("images", [f"{split['images']:,}" for split in splits]),
        ("encoded anew", [f"{split['encoded']:,}" for split in splits]),
        ("as they were", [f"{split['copied']:,}" for split in splits]),
        ("left out", [f"{len(split['bad']):,}" for split in splits]),
        ("shards", [f"{len(split['shards']):,}" for split in splits]),
        ("MB", [f"{sum(shard['bytes'] for shard in split['shards']) / 1e6:,.1f}" for split in splits]),
    ):
        table.add_row(label, *cells)
    for column in table.columns[1:]:
        column.justify = "right"
    print(f"{printable(str(dst))} is packed")
    Console(highlight=False).print(table)
    if faults:
        print()
        print_faults(faults)


def main() -> None:
    defaults = PackConfig()
    parser = command_line("python -m data_pipeline.pack", "Pack a dataset into a few large files of smaller images.")
    parser.add_argument("src", help="What to pack: a folder of images, or anything else that data.path may be.")
    parser.add_argument(
        "dst",
        help="The folder to write, or its address (s3://, gs://); it must not exist yet. A killed command goes on when repeated.",
    )
    parser.add_argument(
        "--short-side", type=int, help="Reduce images to this many pixels on their short side; nothing if not given."
    )
    parser.add_argument("--quality", type=int, default=defaults.quality, help="JPEG quality of new images, 1 to 95.")
    parser.add_argument(
        "--shard-size",
        default=defaults.shard_size,
        help="Most bytes in a shard, as 256MB; a bare number counts images.",
    )
    parser.add_argument(
        "--shuffle",
        action="store_true",
        help="Mix the training images, so that each shard holds all classes; for data.shuffle_shards.",
    )
    parser.add_argument("--workers", type=int, help="Processes; as many as processors if not given.")
    args = parse(parser, sys.argv[1:])
    options = PackConfig(args.short_side, args.quality, args.shard_size, args.shuffle)
    dst = place(args.dst, "DST")
    check_workers(args.workers)
    manifest, faults = pack(DataConfig(path=args.src, **args.data), dst, options, args.workers)
    _print_outcome(dst, manifest, faults)
