"""Score a run on a whole split: every sample once, with any number of ranks and any batch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from data_pipeline.common.errors import UserError, printable
from data_pipeline.common.launcher import warn_on_rank0
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig
from data_pipeline.loader import IGNORE_LABEL, Cursor, Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from trainer.checkpoint.files import load_weights, read_classes, read_metadata
from trainer.checkpoint.store import Store
from trainer.config import Config, load_run
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.loss import count, count_by_class
from trainer.engine.prediction import Predictor
from trainer.model.network import build_network
from trainer.model.normalize import Normalise
from trainer.tracking.meter import Scores

SHOWN = 20
"""Classes that the table of `trainer.evaluate` has at most; `trainer.report` shows all."""


class Trained(NamedTuple):
    """Chosen weights of a run, ready for use."""

    checkpoint: Path
    classes: list[str]
    data: str
    """Fingerprint of the images that they were trained on."""
    predict: Predictor


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
    return Trained(checkpoint.resolve(), classes, metadata.get("data", ""), predict)


def open_scored(folder: Path, cfg: DataConfig, trained: Trained) -> Catalog:
    """Open the images to score a run on: validation images, or all images of another set without a validation part.

    The run's own set is recognised by its training images, even if it was moved. Raises `UserError`.
    """
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


class ClassCounts(NamedTuple):
    """Numbers [C] of each class over the scored images."""

    hits: NDArray[np.int64]
    images: NDArray[np.int64]
    predicted: NDArray[np.int64]


def evaluate(predict: Callable[[torch.Tensor], torch.Tensor], loader: Loader, ctx: DistContext) -> Scores:
    """Score `predict` (images to logits [B, classes]) on everything that `loader` holds. Collective."""
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


def with_mirror(predict: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Wrap `predict` to average each image and its mirror image: the logarithm of their mean probabilities."""

    def both(images: torch.Tensor) -> torch.Tensor:
        mirrored = images.flip(3).contiguous(memory_format=torch.channels_last)
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
        predict = with_mirror(trained.predict) if flip else trained.predict
        with progress("evaluating", len(catalog)) as advance:

            def predict_and_tell(images: torch.Tensor) -> torch.Tensor:
                advance(ctx.world * len(images))  # the other ranks are about as far
                return predict(images)

            scores, counts = evaluate_classes(predict_and_tell, loader, ctx)
    if ctx.primary:
        from trainer.class_table import class_scores, print_classes  # here, as it imports pandas

        print_classes(class_scores(*counts, trained.classes), SHOWN)
        views = ", with mirror images," if flip else ""
        judged = printable(f"{trained.checkpoint}{views} on {scored_on(catalog, scores.images)}")
        print(f"{judged}: {scores.words(len(trained.classes))}")
