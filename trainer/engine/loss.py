"""Training loss, and counts of right answers beside it."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.batch import IGNORE_LABEL, Batch
from data_pipeline.common.errors import require
from data_pipeline.sources.catalog import Catalog
from trainer.optim.config import OptimConfig


def fitted_to_classes(optim: OptimConfig, train: Catalog) -> OptimConfig:
    """Put numbers in place of `class_weights: balanced`, and take the binary loss where images have several classes.

    Raises `UserError` where a list is not of these classes, or a teacher would need a single one.
    """
    classes, weights, counts = train.classes, optim.class_weights, train.class_counts()
    if train.multi_label:
        require(
            optim.teacher is None,
            f"optim.teacher: {optim.teacher} answers with one class, and images have several; leave it out, or start from its "
            "weights by --model.weights",
        )
        optim = replace(optim, loss="binary")
        if weights == "balanced":
            ratios = np.where(counts > 0, (len(train) - counts) / counts.clip(1), 1.0)
            return replace(optim, class_weights=ratios.tolist())
    if weights == "balanced":
        mean = counts.sum() / (counts > 0).sum()
        return replace(optim, class_weights=np.where(counts > 0, mean / counts.clip(1), 0.0).tolist())
    require(
        isinstance(weights, str) or len(weights) == len(classes),
        f"optim.class_weights: {len(weights)} factors for {len(classes)} classes; give one for each of "
        f"{', '.join(classes[:5])}{', …' * (len(classes) > 5)}, or balanced",
    )
    return optim


def training_loss(
    logits: Tensor, batch: Batch, optim: OptimConfig, weights: Tensor | None = None, taught: Tensor | None = None
) -> Tensor:
    """Sum `optim.loss` over the counted rows, and with logits `taught` [B, classes] of a teacher the loss beside it."""
    losses = _loss_of_labels(logits, batch, optim, weights)
    if taught is not None:
        losses = torch.lerp(losses, _loss_of_teacher(logits, taught, optim), optim.teacher_share)
    # Rows without any target have a loss too, by label smoothing or as images of no class.
    return torch.where(batch.labels != IGNORE_LABEL, losses, 0).sum()


def _loss_of_labels(logits: Tensor, batch: Batch, optim: OptimConfig, weights: Tensor | None) -> Tensor:
    """Compute `optim.loss` of each row [B], with label smoothing (Szegedy et al. 2015, sec. 7).

    `weights` [classes] are factors of each class's part of the cross-entropy; of the binary loss of each image, by its class,
    or where images have several classes, of the loss of each class where it is there.
    """
    targets = batch.labels if batch.targets is None else batch.targets
    smoothing = optim.label_smoothing
    if optim.loss == "cross_entropy":
        losses = functional.cross_entropy(
            logits, targets, weight=weights, ignore_index=IGNORE_LABEL, label_smoothing=smoothing, reduction="none"
        )
    else:
        classes = logits.shape[1]
        if batch.targets is None:
            targets = functional.one_hot(targets.clamp_min(0), classes)
        present = targets if optim.binary_threshold is None else targets > optim.binary_threshold
        present = present.to(logits.dtype) * (1 - smoothing) + smoothing / classes
        factors = weights if batch.multi_label else None
        losses = functional.binary_cross_entropy_with_logits(logits, present, pos_weight=factors, reduction="none")
        losses = losses.sum(dim=1) if optim.binary_sum else losses.mean(dim=1)
        if weights is not None and not batch.multi_label:
            losses = losses * (targets.to(logits.dtype) @ weights)
    return losses


def _loss_of_teacher(logits: Tensor, taught: Tensor, optim: OptimConfig) -> Tensor:
    """Compute how far each row [B] is from a teacher's answer (see `OptimConfig.teacher_answer`)."""
    if optim.teacher_answer == "hard":
        return functional.cross_entropy(logits, taught.argmax(dim=1), reduction="none")
    ours, theirs = ((rows / optim.temperature).log_softmax(dim=1) for rows in (logits, taught))
    # Gradients of the softer answers are smaller by the square of the temperature (Hinton et al. 2015, section 2).
    return optim.temperature**2 * functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)


def count_batch(logits: Tensor, batch: Batch, loss: Tensor) -> Tensor:
    """Do what `count` does; without hits where images have several classes, of which no single one is right."""
    if not batch.multi_label:
        return count(logits, batch.labels, loss)
    counted = (batch.labels != IGNORE_LABEL).sum()
    return torch.stack([loss, torch.zeros_like(counted), torch.zeros_like(counted), counted]).double()


def count(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """Sum loss, top-1 hits, top-5 hits, rows over the counted rows: [4] float64. `logits` [B, classes], `labels` [B]."""
    counted = labels != IGNORE_LABEL
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels[:, None]) & counted[:, None]
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), counted.sum()]).double()


def count_by_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Count hits, images and predictions of each class over the counted rows: [3, classes] int64."""
    classes, counted = logits.shape[1], (labels != IGNORE_LABEL)[:, None]
    # The prediction of `count`: where logits are equal, another function might choose another class.
    best = logits.topk(min(5, classes), dim=1).indices[:, 0]
    predicted = functional.one_hot(best, classes) * counted
    images = functional.one_hot(labels.clamp_min(0), classes) * counted
    return torch.stack([(predicted * images).sum(dim=0), images.sum(dim=0), predicted.sum(dim=0)])
