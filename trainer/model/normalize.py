"""Normalisation of pixels for a network."""

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """uint8 pixels [B, 3, H, W] to (pixel / 255 - mean) / std, float32, in the same memory layout."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        super().__init__()
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(1, 3, 1, 1))
        self.shift = -torch.tensor(mean, device=device).view(1, 3, 1, 1) / torch.tensor(std, device=device).view(
            1, 3, 1, 1
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)
