"""Images to logits, outside of training."""

import torch
from torch import Tensor, nn

from trainer.engine.compilation import compiled
from trainer.engine.config import EngineConfig
from trainer.engine.precision import Autocast


class Predictor:
    """Images to logits: `network` in evaluation mode, normalisation and precision included."""

    def __init__(self, network: nn.Module, normalise: nn.Module, cfg: EngineConfig, device: torch.device) -> None:
        self.network, self.normalise = network, normalise
        self.autocast = Autocast(cfg.precision, device)
        self._forward = compiled(network, cfg, device)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, classes] float32 of `images` [B, 3, H, W] uint8."""
        was_training = self.network.training
        self.network.eval()
        with torch.inference_mode(), self.autocast():
            logits = self._forward(self.normalise(images)).float()
        self.network.train(was_training)
        return logits
