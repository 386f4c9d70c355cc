"""Predict the classes of images: one row for each image, in order, with any number of ranks.

python -m trainer.predict RUN [RUN …] IMAGES --out FILE.csv [--sample sample_submission.csv] [--data.images FOLDER]

IMAGES is a folder with images anywhere below it, or a table that names them. The rows are in the order of the files'
paths, of that table, or of the sample; with a sample they have its columns and ids.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import Catalog, open_images
from data_pipeline.sources.tables.manifest import table_images
from trainer.config import Config
from trainer.distributed import DistContext, open_dist_context
from trainer.predict import kaggle_submission as sample
from trainer.predict import several_classes
from trainer.predict.class_columns import with_classes
from trainer.scoring import NO_THRESHOLDS, Trained, open_trained, warn_of_oddities

BATCH = 64
"""Images that a rank predicts at once. Their grouping is the same at any number of ranks, because the last digits of a
logit depend on it. On a CPU they may depend on the number of its threads as well, by 1e-6 in ResNet-50."""


class Predictions(NamedTuple):
    """Predictions for the N images of a catalog."""

    probabilities: NDArray[np.float32]
    """[N, C] probabilities; 1 / C where the image could not be read."""
    readable: NDArray[np.bool_]
    """[N] True where the image could be read."""
    thresholds: NDArray[np.float64] = NO_THRESHOLDS
    """[C] of each class, where an image may have several: the mean of the runs'; else empty."""


def predict_all(
    predict: Callable[[Tensor], Tensor], classes: int, catalog: Catalog, cfg: DataConfig, ctx: DistContext, view: "View"
) -> Predictions:
    """Compute probabilities of each of `catalog`'s images, the same on all ranks and at any number of them. Collective.

    `predict` takes images [B, 3, H, W] uint8 to probabilities [B, classes]. Images that cannot be read are named on stderr.
    """
    torch.backends.cudnn.benchmark = False  # it picks algorithms by their time, so not always the same
    # Fixed batches, dealt to the ranks in turn: so no result depends on the number of ranks.
    count, batch = len(catalog), min(BATCH, len(catalog))
    batches = [list(range(first, min(first + batch, count))) for first in range(0, count, batch)]
    own = batches[ctx.rank :: ctx.world]
    probabilities = torch.zeros(count, classes, device=ctx.device)
    read, unreadable = torch.zeros(2, count, device=ctx.device)
    if own:
        rows = [row for rows in own for row in rows]
        # A loader for each rank alone: ranks that shared a batch would change the grouping of its images.
        alone = replace(ctx, rank=0, world=1)
        loader = Loader(replace(view.source(cfg), batch=batch), catalog.part(rows), alone, training=False)
        with progress("predicting", count) as advance:
            for loaded, places in zip(loader, own, strict=True):
                shown = view.of(loaded.images, cfg.validation_px)
                mean = torch.stack([predict(images) for images in shown]).mean(dim=0)
                probabilities[places] = mean[: loaded.num_real]
                read[places] += 1
                advance(ctx.world * len(places))  # the other ranks are about as far
        unreadable[_name_unreadable(loader, catalog)] = 1
    # Each rank has filled its own rows, so sums join them; the count shows a row read twice or never.
    for sums in (probabilities, read, unreadable):
        ctx.sum(sums)
    assert (read == 1).all(), "every image is of one rank"
    found, readable = probabilities.cpu().numpy(), unreadable.cpu().numpy() == 0
    require(not np.isnan(found).any(), "RUN: its weights give NaN; train it anew with a lower optim.lr")
    found[~readable] = 1 / classes
    return Predictions(found, readable)


def _name_unreadable(loader: Loader, catalog: Catalog) -> list[int]:
    """Print which images the loader could not read; returns their rows."""
    faults = dict(loader.take_bad())
    rows = [row for row, path in enumerate(catalog.paths) if path in faults]
    for row in rows:
        path = printable(str(catalog.root / catalog.paths[row]))
        print(f"cannot read {path}: {faults[catalog.paths[row]]}", file=sys.stderr, flush=True)
    return rows


class View(NamedTuple):
    """Crops of an image that the network sees; the mean of their probabilities counts."""

    crops: int = 1
    """1, the centre as in validation, or 5, the corners of the centred square too (Krizhevsky et al. 2012, sec. 4.1)."""
    flip: bool = False
    """True where each crop is also shown mirrored."""

    def source(self, cfg: DataConfig) -> DataConfig:
        """Options for a loader that gives the images to crop."""
        if self.crops == 1:
            return cfg
        return replace(cfg, eval_size_px=round(cfg.validation_px / cfg.eval_crop), eval_crop=1.0)

    def of(self, images: Tensor, side_px: int) -> list[Tensor]:
        """Cut the crops [B, 3, side_px, side_px] of images [B, 3, S, S], in channels-last memory."""
        crops = [images]
        if self.crops == 5:
            last = images.shape[-1] - side_px
            corners = [(0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2)]
            crops = [images[..., y : y + side_px, x : x + side_px] for y, x in corners]
        if self.flip:
            crops += [crop.flip(3) for crop in crops]
        return [crop.contiguous(memory_format=torch.channels_last) for crop in crops]


def predict_mean(
    runs: list[tuple[Path, Config]], first: Trained, catalog: Catalog, ctx: DistContext, views: list[View]
) -> Predictions:
    """Average the probabilities of runs, in the order of the classes of the `first`, which is open. Collective."""
    classes = first.classes
    founds: list[Predictions] = []
    thresholds: list[NDArray[np.float64]] = []
    for (folder, cfg), view in zip(runs, views, strict=True):
        trained = ctx.raise_together(partial(open_alike, folder, cfg, ctx, first)) if founds else first
        found = predict_all(trained.probabilities, len(classes), catalog, cfg.data, ctx, view)
        places = places_of(classes, trained)
        founds.append(found._replace(probabilities=found.probabilities[:, places]))
        thresholds.append(trained.thresholds[places] if trained.multi_label else trained.thresholds)
    mean = np.stack([found.probabilities for found in founds]).mean(axis=0, dtype=np.float64)
    readable = np.logical_and.reduce([found.readable for found in founds])
    return Predictions(mean.astype(np.float32), readable, np.mean(thresholds, axis=0))


def open_alike(folder: Path, cfg: Config, ctx: DistContext, alike: Trained | None) -> Trained:
    """Open a run with the classes of the run `alike`, in any order; with any where that is None. Raises `UserError`."""
    trained = open_trained(folder, cfg, ctx)
    require(
        alike is None or alike.labels == trained.labels,
        f"RUN: {folder} was trained on a table that writes classes otherwise than that of the first run; give runs of one table",
    )
    classes = alike.classes if alike else []
    odd = sorted({*trained.classes} ^ {*(classes or trained.classes)})
    require(
        not odd,
        f"RUN: {folder} has other classes than the first run, which {sample.few(odd)} tell apart; give runs of the same classes",
    )
    return trained


def places_of(classes: list[str], trained: Trained) -> list[int]:
    """Find the columns of a run's probabilities in the order of `classes`."""
    return [trained.classes.index(name) for name in classes]


def plain_table(names: list[str], ranked: NDArray[np.int64], found: Predictions, classes: list[str]) -> pd.DataFrame:
    """List each image with its likeliest classes and their probabilities. `ranked` [N, K] has these classes' rows."""
    columns: dict[str, object] = {"image": names}
    for place in range(ranked.shape[1]):
        suffix = f"_{place + 1}" if ranked.shape[1] > 1 else ""
        columns[f"predicted{suffix}"] = np.array(classes, object)[ranked[:, place]]
        columns[f"confidence{suffix}"] = found.probabilities[np.arange(len(names)), ranked[:, place]]
    return pd.DataFrame(columns)


def rank(found: Predictions, fallback: int | None) -> NDArray[np.int64]:
    """Rank [N, C] the classes of each image, the likeliest first; `fallback` is first where it could not be read."""
    weights = found.probabilities.copy()
    if fallback is not None:
        weights[~found.readable, fallback] = 2
    return np.argsort(-weights, axis=1, kind="stable")


def said_of(found: Predictions, fallback: int | None) -> several_classes.Said:
    """Say [N, C] which classes an image is of, by their thresholds; of `fallback` alone where it could not be read."""
    said = found.probabilities >= found.thresholds
    said[~found.readable] = False
    if fallback is not None:
        said[~found.readable, fallback] = True
    return said


def _form(
    args: argparse.Namespace, catalog: Catalog, trained: Trained
) -> sample.Form | several_classes.SampleForm | None:
    if not args.sample:
        return None
    if trained.multi_label:
        return several_classes.read(args.sample, catalog.paths, trained.classes, trained.labels)
    return sample.read(args.sample, catalog.paths, trained.classes, args.topk)


def _refuse_unreadable(found: Predictions, catalog: Catalog) -> None:
    bad = np.flatnonzero(~found.readable)
    if len(bad):
        raise UserError(
            f"IMAGES: {len(bad)} of the {len(catalog)} images cannot be read, as {catalog.paths[bad[0]]}; "
            "mend them, or name by --fallback the class to give them"
        )


def view_of(args: argparse.Namespace, cfg: DataConfig) -> View:
    require(
        args.crops == 1 or cfg.eval_crop < 1,
        f"--crops: {args.crops} crops of {cfg.eval_crop:.0%} of the image are all the same; give a lower --data.eval_crop",
    )
    return View(args.crops, args.flip)


def _names(catalog: Catalog, cfg: DataConfig) -> list[str]:
    """Name the rows. Raises `UserError` where two have the same name."""
    images = Path(cfg.path)
    names = table_images(images, cfg)[0] if images.is_file() else catalog.paths
    twice = sorted({path for path, seen in zip(*np.unique(catalog.paths, return_counts=True), strict=True) if seen > 1})
    require(not twice, f"IMAGES: {images} names {sample.few(twice)} more than once; remove the repeated rows")
    return names


def _table(
    args: argparse.Namespace,
    form: sample.Form | several_classes.SampleForm | None,
    names: list[str],
    found: Predictions,
    trained: Trained,
) -> pd.DataFrame:
    classes = trained.classes
    if trained.multi_label:
        said = said_of(found, classes.index(args.fallback) if args.fallback else None)
        if isinstance(form, several_classes.SampleForm):
            return form.fill(found.probabilities, said)
        return several_classes.plain_table(
            names, said, found.probabilities, classes, trained.labels, chances=args.probabilities
        )
    ranked = rank(found, classes.index(args.fallback) if args.fallback else None)[:, : args.topk]
    if isinstance(form, sample.Form):
        return form.fill(found.probabilities, ranked)
    table = plain_table(names, ranked, found, classes)
    if args.probabilities:
        table = with_classes(table, found.probabilities, classes)
    return table


def write_predictions(args: argparse.Namespace, runs: list[tuple[Path, Config]]) -> None:
    """Predict the images that `data` of the runs names, as the command's options say. Collective. Raises `UserError`."""
    (first, cfg), views = runs[0], [view_of(args, cfg.data) for _, cfg in runs]
    with progress("opening the run"), open_dist_context() as ctx:
        trained = ctx.raise_together(lambda: open_trained(first, cfg, ctx))
        classes = trained.classes
        require(
            args.fallback is None or args.fallback in classes,
            f"--fallback: {args.fallback} is no class of {first}; give one of {sample.few(classes)}",
        )
        require(
            args.topk == 1 or not trained.multi_label,
            f"--topk: {args.topk} likeliest are for images of one class each; leave it out, as thresholds choose among several",
        )
        require(args.topk <= len(classes), f"--topk: {args.topk} is more than the {len(classes)} classes; lower it")
        catalog = ctx.raise_together(lambda: open_images(cfg.data))
        warn_of_oddities(catalog)
        names = ctx.raise_together(lambda: _names(catalog, cfg.data))
        form = ctx.raise_together(lambda: _form(args, catalog, trained))
        found = predict_mean(runs, trained, catalog, ctx, views)
        if args.fallback is None:
            _refuse_unreadable(found, catalog)
        ctx.run_on_rank0(lambda: write_table(_table(args, form, names, found, trained), args.out, "--out"))
    if ctx.primary:
        unread = int((~found.readable).sum())
        by = str(trained.checkpoint) if len(runs) == 1 else f"the mean of {len(runs)} runs"
        rest = f"; {unread} cannot be read and are given {args.fallback}" if unread else ""
        rest += f"; {form.meaning}" if form and form.meaning else ""
        print(printable(f"{args.out}: {len(catalog)} images of {args.images} by {by}{rest}"))


def write_table(table: pd.DataFrame, out: Path, option: str) -> None:
    """Write a table as CSV. Raises a `UserError` that begins with `option`."""
    try:
        replace_file(out, csv(table))
    except OSError as error:
        raise UserError(f"{option}: cannot write {out} ({error.strerror}); give another file") from None


def csv(table: pd.DataFrame) -> bytes:
    """Write a table as CSV; file names that are not UTF-8 keep their bytes."""
    # Seven digits are the precision of float32.
    return table.to_csv(index=False, float_format="%.7g", lineterminator="\n").encode(errors="surrogateescape")
