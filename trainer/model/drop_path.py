"""Stochastic depth: in training, some samples pass some residual blocks by the shortcut alone.

Huang et al. 2016 (arXiv 1603.09382), drawn for each sample. Which blocks an image passes so is a function of (seed, epoch,
position), as its crop is: the same in a resumed run, and at any number of ranks.
"""

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.batch import Places, on_device
from data_pipeline.sampling import DEPTH, uniforms


class DropPath(nn.Module):
    """Multiplies a residual branch, in place, by 0 for a share `rate` of the samples and by 1 / (1 - rate) for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.factors: Tensor | None = None
        """[B] float32, of the samples of the next pass (see `draw_paths`); without them nothing is dropped."""

    def forward(self, branch: Tensor) -> Tensor:
        """[B,C,H,W] float, of the same."""
        if self.training and self.factors is not None:
            branch = branch.mul_(self.factors[:, None, None, None])
        return branch


def add_drop_paths(network: nn.Module, rate: float) -> None:
    """Give the blocks of `network` a `drop_path`, of a rate that rises in a straight line from 0 to `rate` for the last."""
    blocks = [module for module in network.modules() if hasattr(module, "drop_path")]
    for number, block in enumerate(blocks):
        share = rate * number / (len(blocks) - 1)
        if share > 0:
            block.drop_path = DropPath(share)


def drop_paths(network: nn.Module) -> list[DropPath]:
    return [module for module in network.modules() if isinstance(module, DropPath)]


def draw_paths(layers: list[DropPath], places: Places | None, device: torch.device) -> None:
    """Draw what the samples at `places` drop in their next pass; nothing without places."""
    if not layers or places is None:
        return
    drawn = uniforms(places.seed, places.epoch, places.positions, DEPTH, -(-len(layers) // 4) * 4)[:, : len(layers)]
    rates = np.array([layer.rate for layer in layers])
    factors = on_device(((drawn >= rates) / (1 - rates)).astype(np.float32).T.copy(), device)
    for layer, row in zip(layers, factors, strict=True):
        layer.factors = row
