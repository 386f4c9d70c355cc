"""mixup and cutmix: against torchvision's with the same draws, soft targets, and what must stay out of them."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from torchvision.transforms import v2  # type: ignore[import-untyped]

from data_pipeline.config import AugmentConfig
from data_pipeline.loader import IGNORE_LABEL, Batch, Cursor, Loader
from data_pipeline.mixing import Mixing, box, mix
from data_pipeline.mixing import draw as draw_mixing
from data_pipeline.sampling import MIX, philox
from tests.conftest import config
from tests.support.runs import SOLO
from trainer.engine.config import EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.optim.optimizer import OptimConfig

CLASSES = 7
BOTH = AugmentConfig(mixup=0.4, cutmix=1.0)


def some_images(rows: int, height: int = 12, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, height, width, 3] uint8, and labels."""
    draws = torch.Generator().manual_seed(rows)
    images = torch.randint(0, 256, (rows, height, width, 3), dtype=torch.uint8, generator=draws)
    return images, torch.randint(0, CLASSES, (rows,), generator=draws)


def own_of(labels: torch.Tensor) -> torch.Tensor:
    """[rows, CLASSES] the class of each image, as the loader gives it."""
    return functional.one_hot(labels.clamp(min=0), CLASSES) * (labels >= 0).float()[:, None]


@dataclass
class Fixed:
    """A distribution that always gives the same."""

    value: float

    def sample(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full(shape, self.value, dtype=torch.float64)


def torchvisions(
    images: torch.Tensor, labels: torch.Tensor, mixing: Mixing, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each pair by its MixUp or CutMix: it mixes a row with the one before, in a batch of two the other."""
    transform = (v2.CutMix if mixing.cut else v2.MixUp)(num_classes=CLASSES)
    transform._dist = Fixed(mixing.share)
    centre = iter([mixing.x, mixing.y] * len(images))  # in the order in which it draws them
    monkeypatch.setattr(torch, "randint", lambda limit, size: torch.full(size, int(next(centre) * limit)))
    pixels = images.permute(0, 3, 1, 2)
    pairs = [
        transform(pair if mixing.cut else pair.float(), classes)
        for pair, classes in zip(pixels.split(2), labels.split(2), strict=True)
    ]
    return torch.cat([pair[0] for pair in pairs]).permute(0, 2, 3, 1), torch.cat([pair[1] for pair in pairs])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("centre", [(0.3, 0.95), (0.0, 0.5)])
def test_mixes_as_torchvision(
    cut: bool, share: float, centre: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels exactly where they are swapped, to a thousandth of a level where they are blended; shares to 1e-6."""
    images, labels = some_images(8)
    mixing, before = Mixing(cut, share, *centre), images.clone()
    ours, dominant, targets = mix(images, labels, own_of(labels), mixing)
    theirs, wanted = torchvisions(images, labels, mixing, monkeypatch)
    assert ours.dtype == (torch.uint8 if cut else torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if cut else 1e-3)
    torch.testing.assert_close(targets, wanted, rtol=0, atol=1e-6)
    assert (targets.gather(1, dominant[:, None])[:, 0] >= 0.5 - 1e-6).all()
    assert torch.equal(images, before), "the images that come in are DALI's memory"


@pytest.mark.parametrize("cut", [False, True])
def test_pairs_that_do_not_wholly_count_stay_as_they_are(cut: bool) -> None:
    """Bit for bit, and without a trace in the other's target; and the pair beside them is mixed."""
    images, labels = some_images(8)
    labels[:] = torch.tensor([3, IGNORE_LABEL, IGNORE_LABEL, 2, IGNORE_LABEL, IGNORE_LABEL, 1, 5])
    mixing = Mixing(cut, 0.3, 0.5, 0.5)
    mixed, dominant, targets = mix(images, labels, own_of(labels), mixing)
    assert torch.equal(mixed[:6], images[:6].to(mixed.dtype))
    assert not torch.equal(mixed[6:], images[6:].to(mixed.dtype))
    assert dominant.tolist() == [3, IGNORE_LABEL, IGNORE_LABEL, 2, IGNORE_LABEL, IGNORE_LABEL, 5, 1], (
        "own shares are below a half"
    )
    assert targets[0, 3] == targets[3, 2] == 1
    assert targets.sum(dim=1).tolist() == pytest.approx([1, 0, 0, 1, 0, 0, 1, 1])


def draw(seed: int, epoch: int, start: int, cfg: AugmentConfig) -> Any:
    """The mixing, or None; for type checkers, which cannot know where there is one."""
    return draw_mixing(seed, epoch, start, cfg)


def test_draws_are_a_function_of_the_update_alone() -> None:
    drawn = {
        place: draw(*place, BOTH) for place in [(0, 0, 0), (0, 0, 64), (0, 1, 0), (1, 0, 0), (2**63 - 1, 9, 10**9)]
    }
    assert len(set(drawn.values())) == len(drawn)
    assert all(draw(*place, BOTH) == mixing for place, mixing in drawn.items())


@pytest.mark.parametrize(
    ("cfg", "cuts"),
    [(AugmentConfig(mixup=0.4), 0.0), (AugmentConfig(cutmix=0.4), 1.0), (AugmentConfig(mixup=0.4, cutmix=0.4), 0.5)],
)
def test_draws_follow_their_distribution(cfg: AugmentConfig, cuts: float) -> None:
    """Beta(.4, .4) has mean 1/2 and variance 1 / (4 (2 * .4 + 1))."""
    drawn = [draw(3, epoch, update, cfg) for epoch in range(4) for update in range(0, 64_000, 64)]
    table = np.array(drawn, float)
    cut, share, y, x = table.T
    assert cut.mean() == pytest.approx(cuts, abs=0.03)
    assert share.mean() == pytest.approx(0.5, abs=0.03)
    assert share.var() == pytest.approx(1 / (4 * 1.8), rel=0.05)
    for place in (y, x):
        assert place.min() >= 0 and place.max() < 1
        assert np.quantile(place, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.03)
    assert abs(np.corrcoef(table[:, 1:], rowvar=False) - np.eye(3)).max() < 5 / math.sqrt(len(table))


@pytest.mark.parametrize(("chance", "cutmix_chance"), [(1.0, 0.5), (0.8, 0.3), (0.25, 1.0), (0.0, 0.5)])
def test_steps_are_mixed_as_often_as_timm_mixes_them(chance: float, cutmix_chance: float) -> None:
    """And what a step that is mixed draws does not depend on these chances, but for which of the two it is."""
    np.random.seed(0)
    theirs = timm.data.Mixup(0.4, 0.4, prob=chance, switch_prob=cutmix_chance)
    expected = [theirs._params_per_batch() for _ in range(4000)]
    cfg = AugmentConfig(mixup=0.4, cutmix=0.4, mix_chance=chance, cutmix_chance=cutmix_chance)
    places = [(3, epoch, start) for epoch in range(4) for start in range(0, 64_000, 64)]
    found = [draw(*place, cfg) for place in places]
    for ours, wanted in (
        ([mixing is not None for mixing in found], [share < 1 for share, _ in expected]),
        ([mixing is not None and mixing.cut for mixing in found], [cut for _, cut in expected]),
    ):
        assert np.mean(ours) == pytest.approx(np.mean(wanted), abs=0.04)
    for place, mixing in zip(places, found, strict=True):
        always = draw(*place, BOTH)
        assert mixing is None or (mixing.y, mixing.x) == (always.y, always.x)


def test_chances_that_are_not_given_leave_the_draws_of_before() -> None:
    """A run goes on with the numbers that it would have had."""
    generator = np.random.Generator(philox(5, MIX, 1, 64))
    either, y, x = generator.random(3)
    assert draw(5, 1, 64, AugmentConfig(mixup=0.4, cutmix=0.4)) == Mixing(either < 0.5, generator.beta(0.4, 0.4), y, x)


def test_the_last_epochs_are_not_mixed(folder: Path) -> None:
    """Their images are those of a run without mixing, bit for bit, with labels alone."""
    augment = AugmentConfig(min_area=0.2, mixup=0.4, mix_until=0.5)
    mixed, plain = (
        Loader(config(folder, batch=8, augment=augment), seed=1, epochs=3)
        for augment in (augment, replace(augment, mixup=0.0))
    )
    for epoch in range(3):
        for loader in (mixed, plain):
            loader.seek(Cursor(epoch))
        ours, theirs = (next(iter(loader)) for loader in (mixed, plain))
        assert (ours.targets is None) == (epoch == 2)  # of 1.5 epochs two are mixed
        assert torch.equal(ours.images, theirs.images) == (epoch == 2)
        assert torch.equal(ours.labels, theirs.labels) or epoch < 2


def test_box_covers_the_rest_of_the_area() -> None:
    for share in (0.0, 0.2, 0.64, 1.0):
        top, left, bottom, right = box(Mixing(True, share, 0.5, 0.5), 100, 200)
        assert (bottom - top) * (right - left) == pytest.approx((1 - share) * 100 * 200, rel=0.04)
    assert box(Mixing(True, 0.0, 0.0, 0.999), 100, 200) == (0, 99, 50, 200), "cut off at the edges"


# In the engine


class Mean(nn.Module):
    """Logits from the mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(images.float().mean(dim=(2, 3)) / 255)
        return logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_engine_learns_from_shares_of_classes(smoothing: float) -> None:
    """Loss and update are those of cross-entropy with probabilities; rows that do not count leave no trace."""
    torch.manual_seed(0)
    optim = OptimConfig(momentum=0.0, nesterov=False, weight_decay=0.0, label_smoothing=smoothing)
    engine = DdpEngine(Mean(), nn.Identity(), EngineConfig(precision="fp32"), optim, SOLO)
    images, labels = some_images(8)
    labels[5:] = IGNORE_LABEL
    mixed, dominant, targets = mix(images, labels, own_of(labels), Mixing(False, 0.3, 0, 0))
    batch = Batch(mixed.permute(0, 3, 1, 2), dominant, torch.arange(8), 5, 5, targets)

    reference = Mean()
    reference.load_state_dict(engine.module.state_dict())
    logits = reference(batch.images[:5])
    smooth = targets[:5] * (1 - smoothing) + smoothing / CLASSES
    losses = -(smooth * functional.log_softmax(logits, dim=1)).sum(dim=1)
    losses.mean().backward()

    loss, top1, _, counted, _ = engine.step([batch], lr=0.5).tolist()
    assert counted == 5
    assert loss == pytest.approx(losses.sum().item(), rel=1e-6)
    assert top1 == (logits.argmax(dim=1) == targets[:5].argmax(dim=1)).sum().item()
    for ours, theirs in zip(engine.module.parameters(), reference.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs - 0.5 * theirs.grad)


def test_hard_labels_and_their_one_hot_targets_train_alike() -> None:
    images, labels = some_images(8)
    labels[7] = IGNORE_LABEL
    batch = Batch(images.permute(0, 3, 1, 2), labels, torch.arange(8), 7, 7)
    targets = functional.one_hot(labels.clamp(min=0), CLASSES).float() * (labels >= 0)[:, None]
    results = []
    for targeted in (batch, batch._replace(targets=targets)):
        torch.manual_seed(0)
        module = Mean()
        engine = DdpEngine(module, nn.Identity(), EngineConfig(precision="fp32"), OptimConfig(), SOLO)
        results.append((engine.step([targeted], lr=0.1), module.linear.weight.detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
