"""Show the model's training images as one picture: python -m data_pipeline.show [--data.OPTION VALUE ...] [--out sheet.png]

Each row is a training image: the original, then each time that training reads it, cropped, augmented and mixed, pixel for
pixel as in a run with these options and this seed. Below each stand the epoch and the class, or the shares of two classes.
"""

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.config import DataConfig
from data_pipeline.loader import IGNORE_LABEL, Cursor, Loader
from data_pipeline.sampling import epoch_order
from data_pipeline.sharding import RankInfo
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.summary import print_summary

ROWS, COLUMNS = 6, 7  # images, and augmented versions of each beside the original
_SMALLEST, _LINE, _GAP = 144, 15, 4  # pixels: side of a cell, height of a line of text, space between cells


class Cell(NamedTuple):
    """One image of the sheet."""

    image: Image.Image
    caption: list[str]
    """Lines of text below the image."""


def sheet(cfg: DataConfig, *, epoch: int = 0, seed: int = 0, epochs: int = 8) -> Image.Image:
    """Draw rows of training images, from `epoch` on, of a run of `epochs` with `seed`.

    The originals come first, in the order of the epoch. Raises `UserError`.
    """
    require(
        not cfg.augment.mixes or all(batch % 2 == 0 for batch in cfg.batches),
        f"data.batch: {cfg.batch} images are no pairs, which mixup and cutmix need; choose an even number",
    )
    catalog = open_catalog(cfg, "train")
    print_summary(cfg, catalog, open_catalog(cfg, "val", catalog.classes))
    # The first images of the epoch, each with the next times that training reads it.
    ids = list(dict.fromkeys(_order(catalog, cfg, epoch, seed).tolist()))[:ROWS]
    rows = []
    for sample in ids:
        times = islice(_times(catalog, cfg, sample, epoch, seed), COLUMNS)
        seen = [_seen(catalog, cfg, Cursor(*time), seed, epochs) for time in times]
        caption = [f"original: {', '.join(catalog.names_of(sample)) or 'no class'}"]
        rows.append([whole(catalog, sample, caption, max(cell.image.width for cell in seen)), *seen])
    return grid(rows)


def _times(catalog: Catalog, cfg: DataConfig, sample: int, epoch: int, seed: int) -> Iterator[tuple[int, int]]:
    """Yield epoch and position of each time that training reads the sample, from `epoch` on."""
    for number in count(epoch):
        for position in np.flatnonzero(_order(catalog, cfg, number, seed) == sample):
            yield number, int(position)


def _order(catalog: Catalog, cfg: DataConfig, epoch: int, seed: int) -> NDArray[np.int64]:
    return epoch_order(seed, epoch, catalog.labels, cfg.augment.repeats, cfg.balance)


def _seen(catalog: Catalog, cfg: DataConfig, place: Cursor, seed: int, epochs: int) -> Cell:
    """Load the image at one position of an epoch.

    One loader of as many ranks as an optimizer step has images, or pairs, reads it: no pixel depends on their number.
    """
    rows, images = 2 if cfg.augment.mixes else 1, cfg.batch_at(place.epoch, epochs)
    within = place.seen % images
    share = RankInfo(rank=within // rows, world=images // rows, cores=1)
    loader = Loader(replace(cfg, batch=images), catalog, share, training=True, seed=seed, epochs=epochs)
    loader.seek(Cursor(place.epoch, place.seen - within))
    batch = next(iter(loader))
    row = within % rows
    pixels = batch.images[row].permute(1, 2, 0).round().to(torch.uint8).numpy()
    targets = None if batch.targets is None else batch.targets[row]
    caption = _caption(catalog.classes, int(batch.labels[row]), targets)
    return Cell(Image.fromarray(pixels.copy()), [f"{place.epoch}: {caption[0]}", *caption[1:]])


def _caption(classes: list[str], label: int, targets: torch.Tensor | None) -> list[str]:
    if label == IGNORE_LABEL:
        return ["does not count"]
    if targets is None:
        return [classes[label]]
    if ((targets == 0) | (targets == 1)).all():
        return [", ".join(classes[row] for row in targets.nonzero().flatten().tolist()) or "no class"]
    most = targets.topk(2)
    return [f"{share:.2f} {classes[i]}" for share, i in zip(most.values.tolist(), most.indices.tolist(), strict=True)]


def whole(catalog: Catalog, sample: int, caption: list[str], side: int = 0) -> Cell:
    """Draw the whole image as stored, in a square of at least `side` pixels; black if it cannot be read."""
    side = max(side, _SMALLEST)
    try:
        image = Image.open(io.BytesIO(catalog.read(sample))).convert("RGB")
    except (OSError, UnidentifiedImageError):
        image = Image.new("RGB", (side, side))
    return Cell(ImageOps.pad(image, (side, side), color="white"), caption)


def grid(rows: list[list[Cell]]) -> Image.Image:
    """Draw the cells on white, small images enlarged by whole factors."""
    side = max(_SMALLEST, *(cell.image.width for row in rows for cell in row))
    lines = max(len(cell.caption) for row in rows for cell in row)
    across, down = side + _GAP, side + lines * _LINE + 2 * _GAP
    grid = Image.new("RGB", (across * max(map(len, rows)) + _GAP, down * len(rows) + _GAP), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            corner = _GAP + x * across, _GAP + y * down
            grid.paste(cell.image.resize((side, side), Image.Resampling.NEAREST), corner)
            for number, text in enumerate(cell.caption):
                draw.text((corner[0], corner[1] + side + 2 + number * _LINE), _cut(text, side, font), "black", font)
    return grid


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of the text as fits into so many pixels, on one line."""
    text = printable(" ".join(text.split()))
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def draw(cfg: DataConfig, out: Path, *, epoch: int, seed: int, epochs: int) -> None:
    """Write the `sheet` as the PNG `out`, and say so. Raises `UserError`."""
    _write(sheet(cfg, epoch=epoch, seed=seed, epochs=epochs), out)
    print(f"{printable(str(out))}: training images, and how epochs {epoch} and later show them")


def _write(image: Image.Image, out: Path) -> None:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    try:
        replace_file(out, stream.getvalue())
    except OSError as error:
        raise UserError(f"--out: cannot write {out} ({error.strerror}); give another file") from None
