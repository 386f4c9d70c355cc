"""Score a run on a whole split: every sample once, with any number of ranks and any batch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.common.launcher import warn_on_rank0
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig
from data_pipeline.loader import IGNORE_LABEL, Cursor, Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from trainer.checkpoint.files import load_weights, read_classes, read_metadata
from trainer.checkpoint.progress import BestBy
from trainer.checkpoint.store import Store
from trainer.config import Config, load_run
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.loss import count, count_by_class
from trainer.engine.prediction import Predictor
from trainer.model.network import build_network
from trainer.model.normalize import Normalise
from trainer.multi_label import UNKNOWN, ClassCounts, LabelScores, counts, predict_split, score
from trainer.run_config import RunConfig
from trainer.tracking.meter import Scores

SHOWN = 20
"""Classes that the table of `trainer.evaluate` has at most; `trainer.report` shows all."""


NO_THRESHOLDS = np.empty(0)


class Trained(NamedTuple):
    """Chosen weights of a run, ready for use."""

    checkpoint: Path
    classes: list[str]
    data: str
    """Fingerprint of the images that they were trained on."""
    predict: Predictor
    """Images to logits."""
    labels: str = ""
    """Form of several classes of an image in the table that it was trained on (see `Taken.written`); "" where each had one."""
    thresholds: NDArray[np.float64] = NO_THRESHOLDS
    """[C] probability from which on an image is said to be of a class, where images may have several; else empty."""

    @property
    def multi_label(self) -> bool:
        """True where an image may have several classes."""
        return self.labels != ""

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, C] float32 of images [B, 3, H, W] uint8: of each class by itself where an image may have several."""
        logits = self.predict(images)
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)


def open_trained(folder: Path, cfg: Config, ctx: DistContext) -> Trained:
    """Open a run's network with its chosen weights. Raises `UserError`.

    Where `engine.precision` is auto, a CPU computes in fp32, so that weights have the same score on another CPU.
    """
    checkpoint = Store(folder).chosen()
    if checkpoint is None:
        raise UserError(f"{folder} has no complete checkpoint yet; train it first")
    metadata, classes = read_metadata(checkpoint), read_classes(checkpoint)
    if metadata.get("model") != cfg.model.name or classes is None:
        raise UserError(f"model.name: {folder} holds a {metadata.get('model')}, not a {cfg.model.name}")
    network = build_network(cfg.model, len(classes)).to(ctx.device).to(memory_format=torch.channels_last)
    load_weights(network, checkpoint)
    normalise = Normalise(cfg.data.mean, cfg.data.std, ctx.device)
    by_hardware = cfg.engine.precision == "auto" and ctx.device.type == "cpu"
    engine = replace(cfg.engine, precision="fp32") if by_hardware else cfg.engine
    predict = Predictor(network, normalise, engine, ctx.device)
    labels, thresholds = metadata.get("labels", ""), NO_THRESHOLDS
    if labels:  # weights that were never validated have no thresholds
        known = json.loads(metadata.get("thresholds", "[]"))
        if not known:
            warn_on_rank0(f"{checkpoint}: no threshold was found yet: {UNKNOWN} for each class")
        thresholds = np.array(known or [UNKNOWN] * len(classes), np.float64)
    return Trained(checkpoint.resolve(), classes, metadata.get("data", ""), predict, labels, thresholds)


def open_scored(folder: Path, cfg: DataConfig, trained: Trained) -> Catalog:
    """Open the images to score a run on: validation images, or all images of another set without a validation part.

    The run's own set is recognised by its training images, even if it was moved. Raises `UserError`.
    """
    catalog = _open_scored(folder, cfg, trained)
    warn_of_oddities(catalog)
    require(
        trained.multi_label or not catalog.multi_label,
        f"data.labels: images of {cfg.path} have several classes, and {folder} was trained on images of one class each; "
        "give --data.labels single, or others",
    )
    if catalog.multi_label == trained.multi_label:
        return catalog
    warn_on_rank0(f"images of {cfg.path} have one class each: each is scored as of that class and of no other")
    return replace(catalog, label_sets=np.eye(len(catalog.classes), dtype=np.bool_))


def warn_of_oddities(catalog: Catalog) -> None:
    """Print a line on stderr on each thing that was guessed or left out, once for all ranks."""
    for note in catalog.taken.notes:
        warn_on_rank0(printable(f"data: {note}"))


def _open_scored(folder: Path, cfg: DataConfig, trained: Trained) -> Catalog:
    try:
        catalog = open_catalog(cfg, "val", trained.classes)
    except UserError:  # another set may have validation images of its own, or no such groups
        if cfg.fold is None and cfg.group is None:
            raise
        cfg = replace(cfg, fold=None, group=None)
        catalog = open_catalog(cfg, "val", trained.classes)
    if not catalog.taken.divided_from or _was_trained_on(cfg, trained):
        return catalog
    if Path(cfg.path).resolve() != Path(load_run(folder, []).data.path).resolve():
        return open_catalog(replace(cfg, val_share=1.0, fold=None, group=None), "val", trained.classes)
    warn_on_rank0(
        f"{cfg.path} has other images than when {folder} was trained, or was divided otherwise then: some of its "
        f"{len(catalog)} validation images may have been trained on"
    )
    return catalog


def _was_trained_on(cfg: DataConfig, trained: Trained) -> bool:
    try:
        return open_catalog(cfg, "train", trained.classes).fingerprint() == trained.data
    except UserError:  # no image is left for training
        return False


def scored_on(catalog: Catalog, images: int) -> str:
    """Describe the scored images, such as "60 of 61 held out of 600 images in FOLDER"."""
    listed = len(catalog) + len(catalog.bad)
    held_out = f" held out of {catalog.taken.divided_from}" if catalog.taken.divided_from > listed else ""
    return f"{images} of {listed}{held_out} images in {catalog.root}"


def best_by(run: RunConfig, catalog: Catalog) -> BestBy:
    """Choose the score that decides which weights are the best. Raises `UserError` where images like these have none of it."""
    fitting: tuple[BestBy, ...] = (
        ("map", "macro_f1", "loss") if catalog.multi_label else ("top1", "macro_recall", "loss")
    )
    has = "may have several classes" if catalog.multi_label else "have one class each"
    require(
        run.best_by is None or run.best_by in fitting,
        f"run.best_by: {run.best_by} does not fit images that {has}; give {', '.join(fitting[:2])} or {fitting[2]}",
    )
    return run.best_by or fitting[0]


def evaluate(predict: Callable[[torch.Tensor], torch.Tensor], loader: Loader, ctx: DistContext) -> Scores | LabelScores:
    """Score `predict` (images to logits [B, classes]) on everything that `loader` holds. Collective."""
    if loader.catalog.multi_label:
        return score(predict_split(predict, loader, ctx))
    return evaluate_classes(predict, loader, ctx)[0]


def evaluate_classes(
    predict: Callable[[torch.Tensor], torch.Tensor], loader: Loader, ctx: DistContext
) -> tuple[Scores, ClassCounts]:
    """Score `predict` as `evaluate` does, and count by class. Collective."""
    classes = len(loader.catalog.classes)
    sums = torch.zeros(4, dtype=torch.float64, device=ctx.device)
    by_class = torch.zeros(3, classes, dtype=torch.float64, device=ctx.device)
    loader.seek(Cursor())
    for batch in loader:
        logits = predict(batch.images)
        loss = functional.cross_entropy(logits, batch.labels, ignore_index=IGNORE_LABEL, reduction="sum")
        sums += count(logits, batch.labels, loss)
        by_class += count_by_class(logits, batch.labels)
    # One reduction for all of them.
    total = ctx.sum(torch.cat([sums, by_class.flatten()])).cpu()
    if not total[3]:
        raise UserError("data.path: none of the validation images could be read")
    counts = ClassCounts(*total[4:].reshape(3, classes).long().numpy())
    there = counts.images > 0
    macro_recall_pct = 100 * float((counts.hits[there] / counts.images[there]).mean())
    return Scores.of(total.tolist())._replace(macro_recall_pct=macro_recall_pct), counts


def with_mirror(
    predict: Callable[[torch.Tensor], torch.Tensor], *, multi_label: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Wrap `predict` to average each image and its mirror image: the logits of their mean probabilities."""

    def both(images: torch.Tensor) -> torch.Tensor:
        mirrored = images.flip(3).contiguous(memory_format=torch.channels_last)
        if multi_label:
            mean = (predict(images).double().sigmoid() + predict(mirrored).double().sigmoid()) / 2
            return mean.logit().float()
        return (predict(images).softmax(dim=1) + predict(mirrored).softmax(dim=1)).div(2).log()

    return both


def score_run(folder: Path, cfg: Config, *, flip: bool) -> None:
    """Score the run in `folder` on the images of `cfg.data`, and print it. Collective. Raises `UserError`."""
    with (
        progress("opening the run"),
        open_dist_context(device=cfg.engine.device, bind_cores=cfg.engine.bind_cores) as ctx,
    ):
        trained = ctx.raise_together(lambda: open_trained(folder, cfg, ctx))
        catalog = ctx.raise_together(lambda: open_scored(folder, cfg.data, trained))
        loader = Loader(cfg.data, catalog, ctx, training=False)
        predict = with_mirror(trained.predict, multi_label=trained.multi_label) if flip else trained.predict
        with progress("evaluating", len(catalog)) as advance:

            def predict_and_tell(images: torch.Tensor) -> torch.Tensor:
                advance(ctx.world * len(images))  # the other ranks are about as far
                return predict(images)

            if trained.multi_label:
                found = predict_split(predict_and_tell, loader, ctx)
                several = score(found, trained.thresholds)
                images, words, numbers = several.images, several.words(), counts(found, trained.thresholds)
            else:
                scores, by_class = evaluate_classes(predict_and_tell, loader, ctx)
                images, words, numbers = scores.images, scores.words(len(trained.classes)), by_class
    if ctx.primary:
        from trainer.class_table import class_scores, print_classes  # here, as it imports pandas

        print_classes(class_scores(*numbers, trained.classes), SHOWN)
        views = ", with mirror images," if flip else ""
        judged = printable(f"{trained.checkpoint}{views} on {scored_on(catalog, images)}")
        print(f"{judged}: {words}")
