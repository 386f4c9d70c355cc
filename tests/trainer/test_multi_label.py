"""Images of several classes: average precision and thresholds against their definitions, the loss, options that do not fit."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from data_pipeline.batch import IGNORE_LABEL, Batch
from data_pipeline.common.errors import UserError
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from tests.support.runs import LIGHTS, SOLO, render_lights
from trainer.config import Config, to_yaml
from trainer.engine.loss import count_batch, fitted_to_classes, training_loss
from trainer.multi_label import ClassCurve, Found, class_curve, counts, predict_split, score
from trainer.optim.config import OptimConfig
from trainer.resume_rules import first_difference
from trainer.run_config import RunConfig
from trainer.scoring import best_by, evaluate


@pytest.fixture(scope="module")
def lights(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """All 48 images of several classes."""
    return open_catalog(DataConfig(str(render_lights(tmp_path_factory.mktemp("lights") / "set")), val_share=1.0), "val")


def by_definition(scores: np.ndarray, present: np.ndarray) -> tuple[float, float]:
    """Average precision, and the largest F1 of any threshold, counted anew at each score."""
    precision, recall, f1 = [], [0.0], [0.0]
    for cut in sorted({*scores.tolist()}, reverse=True):
        taken = scores >= cut
        hits = (taken & present).sum()
        precision.append(hits / taken.sum())
        recall.append(hits / present.sum())
        f1.append(2 * hits / (taken.sum() + present.sum()))
    steps = zip(precision, recall[1:], recall[:-1], strict=True)
    return sum(share * (now - before) for share, now, before in steps), max(f1)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("levels", [4, 10**6])
def test_a_class_is_scored_as_defined(seed: int, levels: int) -> None:
    draw = np.random.default_rng(seed)
    scores = (draw.integers(0, levels, 60) / levels).astype(np.float32)
    present = draw.random(60) < 0.2 + 0.3 * scores
    present[seed] = True
    curve = class_curve(scores, present)
    precision, f1 = by_definition(scores, present)
    assert curve.average_precision == pytest.approx(precision, abs=1e-12)
    taken = scores >= np.array(curve.threshold)
    assert 2 * (taken & present).sum() / (taken.sum() + present.sum()) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "present", "curve"),
    [
        ([0.9, 0.8, 0.4, 0.2], [1, 0, 1, 0], ClassCurve(0.5 + 0.5 * 2 / 3, 0.3)),
        ([0.9, 0.7, 0.1], [1, 1, 0], ClassCurve(1.0, 0.4)),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], ClassCurve(0.25, 0.25)),
        ([0.9, 0.1], [0, 0], ClassCurve(math.nan, 0.5)),
        ([0.25, 0.75], [1, 1], ClassCurve(1.0, 0.125)),
    ],
)
def test_cases_by_hand(scores: list[float], present: list[int], curve: ClassCurve) -> None:
    found = class_curve(np.array(scores, np.float32), np.array(present, bool))
    assert found == pytest.approx(curve, nan_ok=True)


def test_neighbours_in_float32_are_told_apart() -> None:
    low = np.float32(0.7)
    high = np.nextafter(low, np.float32(1))
    curve = class_curve(np.array([low, high]), np.array([False, True]))
    assert (np.array([low, high]) >= np.array(curve.threshold)).tolist() == [False, True]


def test_classes_without_images_are_in_no_mean() -> None:
    present = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)
    probabilities = np.array([[0.9, 0.2, 0.9], [0.1, 0.7, 0.1], [0.2, 0.1, 0.3]], np.float32)
    found = Found(np.arange(3), probabilities, present, np.array([0.1, 0.2, 0.6]))
    scores = score(found)
    assert scores.map_pct == pytest.approx(100 * (1 + (0.5 + 0.5 * 2 / 3)) / 2)
    assert scores.macro_f1_pct == pytest.approx(100 * (1 + 4 / 5) / 2) and scores.loss == pytest.approx(0.3)
    assert scores.thresholds.tolist() == pytest.approx([0.15, 0.05, 0.5])
    assert np.stack(counts(found, np.full(3, 0.5))).tolist() == [[1, 1, 0], [2, 2, 0], [1, 1, 1]]
    assert score(found, np.full(3, 0.5)).macro_f1_pct == pytest.approx(100 * 2 / 3)
    with pytest.raises(UserError, match="none of the validation images has a class"):
        score(found._replace(present=np.zeros_like(present)))


def by_colour(images: torch.Tensor) -> torch.Tensor:
    """Logits that follow from the image alone, of blue, green and red."""
    return (images.float().mean(dim=(2, 3)).flip(1) - 128) / 16


def test_every_image_counts_once_in_batches_of_any_size(lights: Catalog) -> None:
    assert lights.classes == sorted(LIGHTS)
    cfg = DataConfig(batch=20, size_px=32, threads=2)
    found = predict_split(by_colour, Loader(cfg, lights, SOLO, training=False), SOLO)
    assert found.rows.tolist() == list(range(48))
    assert [[lights.classes[c] for c in np.flatnonzero(row)] for row in found.present] == [
        lights.names_of(row) for row in range(48)
    ]
    again = predict_split(by_colour, Loader(replace(cfg, batch=7), lights, SOLO, training=False), SOLO)
    assert np.array_equal(again.rows, found.rows) and np.array_equal(again.present, found.present)
    assert np.allclose(again.probabilities, found.probabilities) and np.allclose(again.losses, found.losses)
    scores = evaluate(by_colour, Loader(cfg, lights, SOLO, training=False), SOLO)
    means = [by_definition(found.probabilities[:, c], found.present[:, c])[0] for c in range(3)]
    assert scores.by("map") == pytest.approx(100 * np.mean(means))


# ---- loss ---------------------------------------------------------------------------------------------------------------


def test_the_loss_is_binary_with_weights_where_a_class_is_there(lights: Catalog) -> None:
    loader = Loader(DataConfig(batch=20, size_px=16, threads=2), lights, SOLO)
    *_, last = loader  # with padding
    assert last.num_real == 8 and last.targets is not None
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    optim = fitted_to_classes(OptimConfig(class_weights="balanced", label_smoothing=0.1), lights)
    ratios = [(48 - images) / images for images in lights.class_counts().tolist()]
    assert optim.loss == "binary" and optim.class_weights == pytest.approx(ratios)
    total = 0.0
    for row in range(8):
        for c in range(3):
            chance, there = float(logits[row, c].sigmoid()), float(last.targets[row, c]) * 0.9 + 0.1 / 3
            total -= (ratios[c] * there * math.log(chance) + (1 - there) * math.log(1 - chance)) / 3
    found = training_loss(logits, last, optim, torch.tensor(optim.class_weights))
    assert float(found) == pytest.approx(total, rel=1e-5)
    assert count_batch(logits, last, found).tolist() == [pytest.approx(total, rel=1e-5), 0, 0, 8]


def test_mixed_images_have_the_classes_of_both(lights: Catalog) -> None:
    """By mixup of lambda, a class counts as there from a share of 0.2 on, as in mixed images of one class."""
    cfg = DataConfig(batch=16, size_px=16, threads=2, augment=AugmentConfig(mixup=0.4))
    batch: Batch = next(iter(Loader(cfg, lights, SOLO)))
    assert batch.targets is not None and batch.multi_label and (batch.labels != IGNORE_LABEL).all()
    logits = torch.zeros(16, 3)
    loss = training_loss(logits, batch, OptimConfig(loss="binary", label_smoothing=0.0))
    assert float(loss) == pytest.approx(16 * math.log(2))
    logits = torch.randn(16, 3)
    wanted = functional.binary_cross_entropy_with_logits(logits, (batch.targets > 0.2).float(), reduction="sum") / 3
    assert float(training_loss(logits, batch, OptimConfig(loss="binary", label_smoothing=0.0))) == pytest.approx(
        float(wanted)
    )


# ---- options ------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(lights: Catalog) -> None:
    assert best_by(RunConfig(), lights) == "map" and best_by(RunConfig(best_by="loss"), lights) == "loss"
    with pytest.raises(
        UserError, match=r"^run.best_by: top1 does not fit images that may have several classes; give map, "
    ):
        best_by(RunConfig(best_by="top1"), lights)
    single = Catalog(Path(), ["a"], np.zeros(1, np.int64), ["a", "b"], bad={})
    assert best_by(RunConfig(), single) == "top1"
    with pytest.raises(
        UserError, match=r"^run.best_by: map does not fit images that have one class each; give top1, mac"
    ):
        best_by(RunConfig(best_by="map"), single)
    with pytest.raises(UserError, match=r"^optim.teacher: runs/x answers with one class, and images have several"):
        fitted_to_classes(OptimConfig(teacher="runs/x"), lights)


@pytest.mark.parametrize(
    ("saved", "now", "same"), [("top1", None, True), (None, "top1", True), ("loss", None, False), (None, "loss", False)]
)
def test_a_run_from_before_the_score_could_be_left_open_goes_on(
    saved: Any, now: Any, same: bool, tmp_path: Path
) -> None:
    text = to_yaml(Config(run=RunConfig(name="a", best_by=saved)))
    assert (first_difference(text, Config(run=RunConfig(name="a", best_by=now))) is None) == same
