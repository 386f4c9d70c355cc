"""The optimiser, its learning rate over time, and the average of the weights.

Everything that changes during a run is a pure function of the number of the optimizer step, counted from 0: `lr_at` and
`ema_decay_at`. A resumed run needs that number and no hidden counter.
"""

import copy
import inspect
import math
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer.model.resnet import HEAD_STAGE, stage_of
from trainer.optim.config import OptimConfig
from trainer.optim.config import OptimizerName as OptimizerName
from trainer.optim.muon import Muon

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


def lr_at(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Compute the learning rate of step `step` of `total_steps`, 0 <= step < total_steps; always above 0.

    With warm-up over w steps (w = warmup * total_steps, rounded), step s < w has (s + 1) / w of the way from
    warmup_start * lr to the peak: step w - 1 is the peak. From there the schedules fall towards min_lr, which they reach
    one past the last step, or where the cool-down begins. Without warm-up the peak is step 0.

    onecycle is the plain triangle of FFCV's CIFAR-10 example: that of Smith 2018 (arXiv 1803.09820), but from and to
    zero, with no last phase below it and with constant momentum. step is as in He et al. 2015 (arXiv 1512.03385,
    section 4.2), cosine as in Loshchilov and Hutter 2017 (arXiv 1608.03983) without restarts, polynomial as in You et al.
    2017 (arXiv 1708.03888), cyclic the policy "triangular" of Smith 2017 (arXiv 1506.01186, section 3.1), and the warm-up as
    in Goyal et al. 2017 (arXiv 1706.02677, section 2.2).
    """
    assert 0 <= step < total_steps, f"update {step} of {total_steps}"
    # Warm-up: a straight line up to the peak.
    peak = max(round(cfg.warmup * total_steps) - 1, 0)
    if step < peak:
        lowest = cfg.warmup_start * cfg.lr
        return lowest + (cfg.lr - lowest) * (step + 1) / (peak + 1)
    # Afterwards `progress` runs from 0 to 1, which it reaches where the cool-down begins.
    end = max(total_steps - round(cfg.cooldown * total_steps), peak + 1)
    progress = min((step - peak) / (end - peak), 1.0)
    height = cfg.lr - cfg.min_lr
    match cfg.schedule:
        case "constant":
            return cfg.lr
        case "step":
            passed = sum(step >= round(milestone * total_steps) for milestone in cfg.milestones)
            return cfg.lr * cfg.gamma**passed
        case "cosine":
            return cfg.min_lr + height * (1 + math.cos(math.pi * progress)) / 2
        case "polynomial":
            return cfg.min_lr + height * (1 - progress) ** cfg.power
        case "onecycle":
            return cfg.min_lr + height * (1 - progress)
        case "cyclic":
            return cfg.min_lr + height * (1 - abs(2 * (progress * cfg.cycles % 1) - 1))


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Make two groups in the order of `named_parameters`: weights with decay, then norms and biases (ndim <= 1) without.

    With layer_decay below 1, make two for each stage of a ResNet, from the stem on. A group's "scale" is its share of the
    learning rate (see `set_lr`): layer_decay to the power of the stages behind it, 1 for the head.
    """
    stages: dict[int, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        stages.setdefault(HEAD_STAGE if layer_decay == 1 else stage_of(name), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "scale": layer_decay ** (HEAD_STAGE - stage)}
        for stage, members in sorted(stages.items())
        for decay, parameters in (
            (weight_decay, [p for p in members if p.ndim > 1]),
            (0.0, [p for p in members if p.ndim <= 1]),
        )
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate `lr` of the next step, scaled in each of the groups of `parameter_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)  # older checkpoints have no scale


def muon_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Divide `parameter_groups` into the matrices that Muon makes orthogonal and the rest: the head, norms and biases."""
    head = {id(parameter) for name, parameter in module.named_parameters() if stage_of(name) == HEAD_STAGE}
    return [
        {**group, "params": parameters, "orthogonal": orthogonal}
        for group in parameter_groups(module, weight_decay, layer_decay)
        for orthogonal in (True, False)
        if (parameters := [p for p in group["params"] if (p.ndim > 1 and id(p) not in head) == orthogonal])
    ]


def build_optimizer(module: nn.Module, cfg: OptimConfig, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """Build the optimiser of a module's parameters; the caller sets each step's learning rate by `set_lr`.

    SGD and AdamW update a parameter in one fused kernel: on a CPU ResNet-18's take half the time of "foreach". LARS and
    LAMB leave weights without decay (norms and biases) to the plain rule. Muon multiplies matrices in `dtype`.
    """
    groups = parameter_groups(module, cfg.weight_decay, cfg.layer_decay)
    nesterov = cfg.nesterov and cfg.momentum > 0
    match cfg.name:
        case "sgd":
            return _uncompiled(torch.optim.SGD)(groups, cfg.lr, cfg.momentum, nesterov=nesterov, fused=True)
        case "adamw":
            return _uncompiled(torch.optim.AdamW)(groups, cfg.lr, cfg.betas, fused=True)
        case "muon":
            groups = muon_groups(module, cfg.weight_decay, cfg.layer_decay)
            return _uncompiled(Muon)(groups, cfg.lr, cfg.momentum, cfg.betas, nesterov=nesterov, dtype=dtype)
        case "lars":
            from timm.optim.lars import Lars

            return _uncompiled(Lars)(groups, cfg.lr, cfg.momentum, nesterov=nesterov)
        case "lamb":
            from timm.optim.lamb import Lamb

            return _uncompiled(Lamb)(groups, cfg.lr, betas=cfg.betas, max_grad_norm=None)


def _uncompiled(optimizer: type[Optimizer]) -> type[Optimizer]:
    """Remove torch's wrappers, which keep compilers out of the class's methods: each would import `torch._dynamo`.

    That takes more than two seconds of a start. Nothing here compiles an optimiser.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    plain = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    step = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), {**plain, "step": step})


def state_share(cfg: OptimConfig) -> float:
    """Bytes that the optimiser keeps for each byte of weights, as one step on a small layer shows."""
    layer, weight = nn.Module(), nn.Parameter(torch.ones(16, 16, 3, 3))
    layer.register_parameter("weight", weight)
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer(layer, cfg)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.ndim]
    return sum(value.nbytes for value in kept) / weight.nbytes


def ema_decay_at(step: int, cfg: OptimConfig) -> float:
    """Compute the average's decay at step `step`: it rises from 0.1 to ema_decay, so that early weights are soon forgotten.

    min(ema_decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage with `num_updates`; n counts the times
    that the average was brought up to date before.
    """
    times = step // cfg.ema_steps
    return min(cfg.ema_decay, (1 + times) / (10 + times))


class Ema:
    """An exponential moving average of a module's parameters and buffers.

    `module` is a copy of its own (evaluation mode, no gradients, the same memory format) and all there is to save.
    Running statistics of batch norm are averaged like weights; integer buffers, which only count, are copied.
    """

    def __init__(self, module: nn.Module, cfg: OptimConfig) -> None:
        self.cfg = cfg
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards `module` as it is after step `step`, counted from 0, if this is one of every ema_steps."""
        if (step + 1) % self.cfg.ema_steps:
            return
        averages, values = [], []
        for average, value in zip(_tensors(self.module), _tensors(module), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - ema_decay_at(step, self.cfg))


def _tensors(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())
