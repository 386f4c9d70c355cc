"""Weights to start a run from: torchvision's or timm's by name, or a file or run folder of PyTorch, timm, safetensors or ours."""

import pickle
import re
from itertools import product
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data_pipeline.common.errors import UserError, require
from data_pipeline.common.safe_yaml import read_yaml
from trainer.checkpoint.files import WEIGHTS, read_classes
from trainer.checkpoint.store import Store
from trainer.distributed import DistContext
from trainer.model.config import SHAPING, Activation, Attention, ModelConfig, Shortcut, Stem, is_timm, is_torchvision
from trainer.model.network import build_network
from trainer.model.resnet import ARCHITECTURES, BLUR, HEAD
from trainer.model.running_stats import keep_statistics
from trainer.model.weight_files import State, deepspeed_file, few, read_network

PREPROCESSING = ("mean", "std", "eval_crop")
"""Options of `data` that weights bring with them, where known."""

_CONSTANT = (
    "num_batches_tracked",
    f".{BLUR}",
)  # entries that files may lack: old ones all, and those of plain networks
_DIFFERING = ("name", *SHAPING)  # options by which networks differ in what they hold


def load_weights_to_start(network: nn.Module, cfg: ModelConfig, classes: list[str], ctx: DistContext) -> str:
    """Give the network, on the machine's device, the weights `cfg.weights`; the first rank reads them. Collective.

    The head stays as it is where the weights have none, or one for other classes. Returns a line that says what was
    loaded; raises `UserError`, on every rank.
    """
    told = ctx.raise_together(lambda: _load(network, cfg, classes) if ctx.primary else "")
    network.to(ctx.device)
    ctx.broadcast(list(network.state_dict().values()))
    return told


def preprocessing(weights: str) -> dict[str, Any]:
    """Read mean, deviation and crop of validation images that weights were trained for, where known, by option of `data`.

    torchvision's enum tells, timm's entry, and a run folder. Raises `UserError`.
    """
    if is_timm(weights):
        from trainer.model.timm_networks import preprocessing_of

        return preprocessing_of(weights)
    if is_torchvision(weights):
        preset = _torchvision(weights).transforms()
        known = {"mean": preset.mean, "std": preset.std, "eval_crop": preset.crop_size[0] / preset.resize_size[0]}
    else:
        known = _options_of_run(Path(weights).absolute(), "data")
    return {name: known[name] for name in PREPROCESSING if name in known}


def _options_of_run(path: Path, section: str) -> dict[str, Any]:
    """Read a section of the options of the run that a path belongs to: its folder, or that of a checkpoint in it."""
    saved = next((file for run in (path, *path.parents[1:2]) if (file := run / "config.yaml").is_file()), None)
    if saved is None or not path.is_dir():
        return {}
    try:
        options: dict[str, Any] = read_yaml(saved)[section]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        raise UserError(f"model.weights: {saved} is not the configuration of a run; mend it, or give a file") from None
    return options


def _load(network: nn.Module, cfg: ModelConfig, classes: list[str]) -> str:
    assert cfg.weights
    state, beside, theirs = _read(cfg.weights)
    wanted = network.state_dict()
    _check_smoothing(cfg.weights, cfg)
    head = state.get(f"{HEAD}.weight")
    same = head is not None and head.shape == wanted[f"{HEAD}.weight"].shape and theirs in (None, classes)
    if not same:
        state, wanted = _without_head(state), _without_head(wanted)
    faults = _faults(state, wanted)
    if faults:
        remedy = _remedy(_without_head(state), cfg) or f"give weights of a {cfg.name}"
        raise UserError(f"model.weights: {cfg.weights} does not fit {cfg.name}: {', '.join(faults)}; {remedy}")
    network.load_state_dict(state, strict=False)
    keep_statistics(network)
    rest = f"; left out {len(beside)} beside the network ({few(beside)})" if beside else ""
    if same:
        return f"starting from {cfg.weights}, head included{rest}"
    left = "it has no head" if head is None else f"its head is for {len(head)} other classes"
    return f"starting from {cfg.weights}; {left}, so the one for {len(classes)} starts anew{rest}"


def _check_smoothing(weights: str, cfg: ModelConfig) -> None:
    """Raise `UserError` where the weights are known to be of a network that smooths before it samples in another way.

    Their names and shapes do not tell. Files other than those of runs do not say what they were trained in.
    """
    saved = {} if is_timm(weights) else _options_of_run(Path(weights).absolute(), "model")
    require(
        cfg.blur or not saved.get("blur"), f"model.weights: {weights} was trained with blur; set model.blur to true"
    )
    theirs = weights.partition(".")[0] if is_timm(weights) else saved.get("name", cfg.name)
    if theirs == cfg.name or not (is_timm(theirs) or is_timm(cfg.name)):
        return
    from trainer.model.timm_networks import antialiasing_of

    require(
        antialiasing_of(theirs) == antialiasing_of(cfg.name),
        f"model.weights: {weights} is for {theirs}, which smooths what it samples otherwise than {cfg.name}; "
        f"set model.name to {theirs}",
    )


def _without_head(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith(f"{HEAD}.")}


def _remedy(body: State, cfg: ModelConfig) -> str | None:
    """Suggest options for a network that fits weights without their head; None where there are none."""
    widths = {cfg.width, *(len(norm) / 64 for name, norm in body.items() if name == "bn1.weight")}
    names = [name for name in ARCHITECTURES if _blocks(_body_of(ModelConfig(name))) == _blocks(body)]
    activations = [kind for kind in get_args(Activation) if kind in body] or ["relu"]
    choices = product(
        names, get_args(Stem), sorted(widths), (False, True), get_args(Shortcut), get_args(Attention), activations
    )
    own = {option: getattr(cfg, option) for option in _DIFFERING}
    changes = [
        {option: value for option, value in zip(_DIFFERING, choice, strict=True) if value != own[option]}
        for choice in choices
    ]
    for change in sorted(changes, key=len):
        if not _faults(body, _body_of(ModelConfig(**{**own, **change}))):
            return f"set {' and '.join(f'model.{option} to {str(value).lower()}' for option, value in change.items())}"
    return None


def _blocks(state: State) -> set[str]:
    """Names of the convolutions in residual blocks, which tell an architecture whatever its other options."""
    return {name for name in state if re.fullmatch(r"layer\d\.\d+\.conv\d\.weight", name)}


def _body_of(cfg: ModelConfig) -> State:
    """Shapes of such a network's body, without memory."""
    with torch.device("meta"):
        return _without_head(build_network(cfg, 1).state_dict())


def _faults(state: State, wanted: State) -> list[str]:
    """Describe how `state` differs from `wanted`, in words."""
    shapes = [
        f"{name} is {list(state[name].shape)} and not {list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in state and not name.endswith(_CONSTANT)],
        "unknown": [name for name in state if name not in wanted],
        "of another shape": shapes,
    }
    return [f"{len(names)} {kind} ({few(names)})" for kind, names in kinds.items() if names]


def _read(weights: str) -> tuple[State, list[str], list[str] | None]:
    """Read tensors by their names in our networks, names of those left out, and the classes of the head where known."""
    if is_timm(weights):
        from trainer.model.timm_networks import download

        return download(weights), [], None
    if is_torchvision(weights):
        return _download(weights), [], None
    path = Path(weights)
    require(
        path.exists(),
        f"model.weights: {weights} does not exist; give a file, a run folder, or a name such as ResNet18_Weights.IMAGENET1K_V1",
    )
    try:
        file = deepspeed_file(path) if path.is_dir() else path
        if file:
            return *read_network(file), None
        checkpoint = path if (path / WEIGHTS).is_file() else Store(path).chosen()
        if checkpoint is None:
            raise UserError(f"model.weights: {weights} holds no complete checkpoint; give the folder of a trained run")
        return load_file(checkpoint / WEIGHTS), [], read_classes(checkpoint)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.weights: {weights} cannot be read ({error}); give another file") from None


def _torchvision(name: str) -> Any:
    """Look up torchvision's entry of that name. Raises `UserError`."""
    from torchvision import models  # type: ignore[import-untyped] # here, for it takes a second

    try:
        return models.get_weight(name)
    except (ValueError, KeyError):
        known = [str(entry) for model in ARCHITECTURES for entry in models.get_model_weights(model)]
        raise UserError(f"model.weights: torchvision has no {name}; choose one of {', '.join(known)}") from None


def _download(name: str) -> State:
    """Load torchvision's weights, from TORCH_HOME or downloaded if they are not there. Raises `UserError`."""
    entry = _torchvision(name)
    try:
        state: State = entry.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except (URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"model.weights: cannot download {name} ({error}); fetch {entry.url} elsewhere, and give the file"
        ) from None
    return state
