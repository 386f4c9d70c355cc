"""The network of a run: one of ours, or one of timm's."""

from torch import nn

from trainer.model.config import ModelConfig, is_timm
from trainer.model.resnet import build_resnet


def build_network(cfg: ModelConfig, classes: int) -> nn.Module:
    """Build a freshly initialised network; its weights are drawn from torch's global generator. Raises `UserError`."""
    if not is_timm(cfg.name):
        return build_resnet(cfg, classes)
    from trainer.model.timm_networks import build_timm  # here, for timm takes seconds to import

    return build_timm(cfg, classes)


def check_network(cfg: ModelConfig) -> None:
    """Raise `UserError` where `cfg` names a network that timm does not have."""
    if is_timm(cfg.name):
        from trainer.model.timm_networks import check_name

        check_name(cfg.name)
