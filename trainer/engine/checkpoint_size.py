"""Room that a checkpoint takes on disk."""

from torch import nn

from trainer.engine.config import Compression
from trainer.optim.config import OptimConfig
from trainer.optim.optimizer import state_share


def checkpoint_bytes(module: nn.Module, optim: OptimConfig, compression: Compression, world: int) -> int:
    """Estimate the size of a checkpoint of `module` on disk, the files of all ranks together."""
    state = sum(tensor.nbytes for tensor in module.state_dict().values())
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    errors = world if compression == "powersgd" else 0
    return round(state * (2 if optim.ema_decay > 0 or optim.swa > 0 else 1) + trained * (state_share(optim) + errors))
