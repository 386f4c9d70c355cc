"""Running statistics of batch normalisation against averages of single batches, from the first one on."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from trainer.model.running_stats import EarlyStatistics, batch_weight, keep_statistics


class Net(nn.Module):
    """Two norms, of which the second sees small numbers."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=momentum)
        self.bn2, self.fc = nn.BatchNorm2d(8, momentum=momentum), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv(images)).relu()
        logits: Tensor = self.fc(self.bn2(0.01 * x).mean(dim=(2, 3)))
        return logits


def net(momentum: float | None) -> Net:
    torch.manual_seed(1)
    return Net(momentum)


def images(number: int) -> Tensor:
    return torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(number))


def statistics(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in module.buffers() if buffer.is_floating_point()]


def variance(module: nn.Module, norm: str = "bn1") -> Tensor:
    return module.get_buffer(f"{norm}.running_var")


def batch_statistics(number: int) -> list[Tensor]:
    """Those of one batch alone, by torch."""
    alone = net(momentum=1.0)
    alone(images(number))
    return statistics(alone)


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_they_are_a_weighted_mean_of_the_batches_alone(momentum: float) -> None:
    """Of those of each batch, by torch, with nothing of mean 0 and variance 1 left; the newest batches weigh most."""
    module, batches = net(momentum), [batch_statistics(number) for number in range(1, 16)]
    early = EarlyStatistics(module)
    for number in range(1, 16):
        with early():
            module(images(number)).sum().backward()
    newest = [max(20 / (number + 19), momentum) for number in range(1, 16)]
    weights = [newest[k] * math.prod(1 - later for later in newest[k + 1 :]) for k in range(15)]
    assert sum(weights) == pytest.approx(1) and weights == sorted(weights)
    wanted = [sum(w * one for w, one in zip(weights, tensors, strict=True)) for tensors in zip(*batches, strict=True)]
    torch.testing.assert_close(statistics(module), wanted, rtol=1e-5, atol=1e-8)


def test_torchs_statistics_come_after_the_first_batches() -> None:
    assert [batch_weight(number, 0.1) for number in (1, 21, 181, 182, 10**9)] == [1, 0.5, 0.1, 0.1, 0.1]
    ours, theirs = net(0.1), net(0.1)
    for module in (ours, theirs):
        for name in ("bn1", "bn2"):
            module.get_buffer(f"{name}.num_batches_tracked").fill_(180)
    with EarlyStatistics(ours)():
        ours(images(1))
    theirs(images(1))
    assert all(torch.equal(one, other) for one, other in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_they_keep_up_with_weights_that_move() -> None:
    """Nearer to exact statistics of the weights at the end, of all batches, than torch's are, by far."""
    distances = {}
    for early in (True, False):
        module = net(0.1)
        statistics_of = EarlyStatistics(module) if early else nullcontext
        for number in range(1, 13):
            with statistics_of():
                module(images(number))
            with torch.no_grad():
                module.conv.weight.mul_(1.15)  # as fast as a high learning rate grows them
        exact = net(momentum=None)
        exact.load_state_dict(
            {name: value for name, value in module.state_dict().items() if "weight" in name}, strict=False
        )
        for number in range(1, 13):
            exact(images(number))
        distances[early] = (variance(module) / variance(exact)).log().abs().max().exp().item()
    assert distances[True] < 2 and distances[False] > 2 * distances[True], distances


def test_statistics_that_were_loaded_are_kept() -> None:
    """Pretrained ones without a count, as old files have them; a network that never trained has none to keep."""
    pretrained, fresh = net(0.1), net(0.1)
    for buffer in pretrained.buffers():
        buffer.fill_(0 if buffer.dtype == torch.int64 else 3)
    for module in (pretrained, fresh):
        keep_statistics(module)
        with EarlyStatistics(module)():
            module(images(1))
    alone = batch_statistics(1)
    torch.testing.assert_close(statistics(pretrained), [2.7 + 0.1 * new for new in alone])
    torch.testing.assert_close(statistics(fresh), alone)


def test_frozen_norms_stay_as_they_are() -> None:
    module = net(0.1)
    early = EarlyStatistics(module)
    module.bn1.eval()
    with early():
        module(images(1))
    assert all(torch.equal(was, now) for was, now in zip(statistics(net(0.1).bn1), statistics(module.bn1), strict=True))
    assert variance(module, "bn2").max() < 1
    module.eval()
    before = statistics(module)
    with early():
        module(images(2))
    assert all(torch.equal(was, now) for was, now in zip(before, statistics(module), strict=True))
