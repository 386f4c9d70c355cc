"""Stochastic weight averaging: the plain mean of the weights at the ends of a run's last epochs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.optim.config import OptimConfig

BATCHES = 200
"""Most batches that statistics are estimated from: a mean over so many images moves no more with further ones."""


def averaged_before(epoch: int, cfg: OptimConfig, epochs: int, held: int = 0) -> int:
    """Count the epochs whose weights are in the average before that of `epoch`, from 0, of a run of `epochs` is added.

    The average holds `held` epochs, 0 if that is unknown. It begins anew until the first of the last epochs. In a run that is
    trained on from beyond that one, all that it holds stay in the mean, as none can be taken out: those before count too.
    """
    first = epochs - max(round(cfg.swa * epochs), 1)
    since = max(epoch - first, 0)
    return (held or since) if since else 0


class Swa:
    """The mean of a module's weights (Izmailov et al. 2018, arXiv 1803.05407); `module` is all there is to save.

    A copy of its own: evaluation mode, no gradients, the same memory format.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, count: int) -> None:
        """Add the weights of `module` to the mean of `count`; with none yet they are the mean. Buffers are copied."""
        averages: list[Tensor] = [*self.module.parameters()]
        torch._foreach_lerp_(averages, [*module.parameters()], 1 / (count + 1))
        for ours, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            ours.copy_(theirs)

    @contextmanager
    def estimating(self, trained: nn.Module) -> Iterator[list[Tensor]]:
        """Let forward passes estimate batch norm's statistics anew, each batch weighing the same; yields the statistics.

        Norms that `trained` keeps frozen stay as they are. All else is in evaluation mode, so that nothing is drawn.
        """
        pairs = zip(_norms(self.module), _norms(trained), strict=True)
        norms = [norm for norm, theirs in pairs if theirs.training]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # a cumulative mean
        yield [one for norm in norms for one in (norm.running_mean, norm.running_var) if one is not None]
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
