"""Channel attention: each channel of an image is multiplied by a share between 0 and 1, found from the means of all channels.

Parameters bear timm's names.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.config import Attention


def make_attention(channels: int, kind: Attention) -> nn.Module | None:
    match kind:
        case "none":
            return None
        case "se":
            return SqueezeExcitation(channels)
        case "eca":
            return EfficientChannelAttention(channels)


class SqueezeExcitation(nn.Module):
    """Shares by two layers, of which the first has a sixteenth of the channels (Hu et al. 2017, arXiv 1709.01507, figure 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(8, int(channels / 16 + 4) // 8 * 8)  # rounded to a multiple of 8, as in timm
        self.fc1 = nn.Conv2d(channels, narrow, 1)
        self.fc2 = nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] float, of the same."""
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(means), inplace=True)))


class EfficientChannelAttention(nn.Module):
    """Shares by a convolution over neighbouring channels, the more of them the more channels there are.

    Wang et al. 2019 (arXiv 1910.03151, section 3.2.3): their number k is the odd one near (log2(C) + 1) / 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = int((math.log2(channels) + 1) / 2)
        size = max(size if size % 2 else size + 1, 3)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] float, of the same."""
        means = x.mean(dim=(2, 3))
        return x * torch.sigmoid(self.conv(means[:, None]))[:, 0, :, None, None]
