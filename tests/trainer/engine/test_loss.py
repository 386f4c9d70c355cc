"""The loss with factors for classes is torch's own, of labels and of mixed images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from data_pipeline.batch import IGNORE_LABEL, Batch
from data_pipeline.common.errors import UserError
from data_pipeline.sources.catalog import Catalog
from trainer.engine.loss import fitted_to_classes, training_loss
from trainer.optim.config import Loss, OptimConfig

ROWS, COUNTED, CLASSES = 12, 9, 5
WEIGHTS = torch.tensor([0.0, 0.5, 1.0, 3.0, 7.5])


def catalog(counts: list[int]) -> Catalog:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Catalog(Path(), [str(row) for row in range(len(labels))], labels, list("abcdefg"[: len(counts)]), bad={})


def drawn(*, mixed: bool) -> tuple[torch.Tensor, Batch]:
    """Logits [ROWS, CLASSES], and a batch of which the last rows do not count."""
    draw = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(ROWS, CLASSES, generator=draw)
    labels = torch.randint(CLASSES, (ROWS,), generator=draw)
    targets = torch.rand(ROWS, CLASSES, generator=draw).softmax(dim=1) if mixed else None
    labels[COUNTED:] = IGNORE_LABEL
    return logits.requires_grad_(), Batch(torch.empty(0), labels, torch.arange(ROWS), COUNTED, COUNTED, targets)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_is_torchs(mixed: bool, smoothing: float) -> None:
    logits, batch = drawn(mixed=mixed)
    targets = batch.labels if batch.targets is None else batch.targets
    expected = functional.cross_entropy(
        logits[:COUNTED], targets[:COUNTED], weight=WEIGHTS, label_smoothing=smoothing, reduction="sum"
    )
    found = training_loss(logits, batch, OptimConfig(label_smoothing=smoothing), WEIGHTS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_factors_of_one_change_nothing(loss: Loss, mixed: bool) -> None:
    logits, batch = drawn(mixed=mixed)
    optim = OptimConfig(loss=loss)
    torch.testing.assert_close(
        training_loss(logits, batch, optim, torch.ones(CLASSES)), training_loss(logits, batch, optim)
    )


def test_the_binary_loss_has_the_factor_of_the_images_class() -> None:
    logits, batch = drawn(mixed=False)
    labels = batch.labels[:COUNTED]
    rows = functional.binary_cross_entropy_with_logits(
        logits[:COUNTED], functional.one_hot(labels, CLASSES).float(), reduction="none"
    ).mean(dim=1)
    found = training_loss(logits, batch, OptimConfig(loss="binary", label_smoothing=0), WEIGHTS)
    torch.testing.assert_close(found, (rows * WEIGHTS[labels]).sum())


def test_balanced_factors_make_every_class_weigh_the_same() -> None:
    counts = [10, 0, 30, 80]
    factors = fitted_to_classes(OptimConfig(class_weights="balanced"), catalog(counts)).class_weights
    assert factors == pytest.approx([4, 0, 4 / 3, 0.5])  # 40 images a class that has any
    assert np.dot(np.array(factors, float), counts) == pytest.approx(120), "a mean of 1 over the images"


def test_factors_are_for_each_class() -> None:
    given = OptimConfig(class_weights=[1.0, 2.0, 3.0])
    assert fitted_to_classes(given, catalog([4, 5, 6])) is given
    assert fitted_to_classes(OptimConfig(), catalog([4, 5])) == OptimConfig()
    with pytest.raises(UserError) as caught:
        fitted_to_classes(given, catalog([4, 5]))
    assert str(caught.value) == "optim.class_weights: 3 factors for 2 classes; give one for each of a, b, or balanced"
