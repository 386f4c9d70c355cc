"""timm's residual networks, built by timm: ResNeXt, Wide ResNet, SE-, ECA-, ResNet-RS, ResNeSt, Res2Net, SKNet and the like.

They all have the stages and the head of our own under the same names, so all that is done to a network works on them.
"""

import difflib
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import is_model_in_modules
from timm.models.resnet import ResNet
from torch import Tensor, nn

from data_pipeline.common.errors import UserError, require
from trainer.model.config import TIMM, ModelConfig, is_timm
from trainer.model.resnet import FrozenNorms, set_options

MODULES = ("resnet", "resnest", "sknet", "res2net")
"""timm's modules of networks that are its ResNet with blocks of their own."""
_FILE = "model.safetensors"


class TimmResNet(FrozenNorms, ResNet):
    """timm's ResNet, whose frozen norms stay in evaluation mode."""


def build_timm(cfg: ModelConfig, classes: int) -> nn.Module:
    """Build the network `cfg.name` with freshly drawn weights. Raises `UserError` where timm has none of that name."""
    name = check_name(cfg.name)
    network: nn.Module = timm.create_model(name, num_classes=classes, zero_init_last=cfg.zero_init_gamma)
    assert type(network) is ResNet
    network.__class__ = TimmResNet
    set_options(network, cfg)
    return network


def check_name(option: str) -> str:
    """Return NAME of an option timm:NAME. Raises `UserError` unless it is a residual network of timm's."""
    name, _, tag = option.removeprefix(TIMM).partition(".")
    require(
        not tag,
        f"model.name: {option} names weights as well; give model.name {TIMM}{name} and model.weights {option}",
    )
    known = [one for module in MODULES for one in timm.list_models(module=module)]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, known, 3, 0.5) or ["resnext50_32x4d"]
        raise UserError(f"model.name: timm has no {name!r}; did you mean {' or '.join(TIMM + one for one in near)}?")
    require(
        is_model_in_modules(name, MODULES),
        f"model.name: {option} is no ResNet, of which alone the stages and the head are known; give one of timm's modules "
        f"{', '.join(MODULES)}, such as {TIMM}resnext50_32x4d",
    )
    return name


def antialiasing_of(name: str) -> list[str]:
    """List the kinds of the modules by which the network `name` smooths what it is about to sample: none in one of our own.

    They hold nothing that is saved, so weights do not tell them; `name` is an option timm:NAME, or one that timm need not have.
    """
    if not (is_timm(name) and is_model_in_modules(name.removeprefix(TIMM), MODULES)):
        return []
    with torch.device("meta"):
        modules = timm.create_model(name.removeprefix(TIMM)).named_modules()
    return sorted({type(one).__name__ for where, one in modules if where.endswith(".aa")} - {nn.Identity.__name__})


def preprocessing_of(weights: str) -> dict[str, Any]:
    """Mean, deviation and crop of validation images that the weights timm:NAME.TAG were trained for. Raises `UserError`."""
    about = _about(weights)
    return {"mean": list(about.mean), "std": list(about.std), "eval_crop": about.crop_pct}


def download(weights: str) -> dict[str, Tensor]:
    """Load the weights timm:NAME.TAG, without a TAG timm's default, from the hub's cache or the hub. Raises `UserError`."""
    import huggingface_hub  # timm brings it along

    repository = _about(weights).hf_hub_id
    file = huggingface_hub.try_to_load_from_cache(repository, _FILE)
    try:
        if not isinstance(file, str):
            file = huggingface_hub.hf_hub_download(repository, _FILE)  # nosec B615 # safetensors run no code
        state: dict[str, Tensor] = load_file(file)
    except Exception as error:  # the hub's client has errors of its own, and those of whatever speaks HTTP for it
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"model.weights: cannot download {weights} ({why}); fetch "
            f"{huggingface_hub.hf_hub_url(repository, _FILE)} elsewhere, and give the file"
        ) from None
    return state


def _about(weights: str) -> Any:
    """Look up timm's entry of weights. Raises `UserError` where there is none."""
    name = weights.removeprefix(TIMM)
    known = [one for one in timm.list_pretrained() if one.partition(".")[0] == name.partition(".")[0]]
    if name not in known and not (name.partition(".")[2] == "" and known):
        near = known or difflib.get_close_matches(name, timm.list_pretrained(), 3, 0.5)
        remedy = f"choose one of {', '.join(TIMM + one for one in near)}" if near else "give a file"
        raise UserError(f"model.weights: timm has no {name}; {remedy}")
    return timm.get_pretrained_cfg(name)
