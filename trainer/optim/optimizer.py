"""The optimiser, its learning rate over time, and the average of the weights.

Everything that changes during a run is a pure function of the number of the update, counted from 0: `lr_at` and
`ema_decay_at`. A resumed run needs that number and no hidden counter.
"""

import copy
import math
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from trainer.model.resnet import HEAD_STAGE, stage_of
from trainer.optim.muon import Muon

OptimizerName = Literal["sgd", "adamw", "lars", "lamb", "muon"]
Loss = Literal["cross_entropy", "binary"]
Schedule = Literal["constant", "step", "cosine", "onecycle", "cyclic"]


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are updated."""

    name: OptimizerName = "sgd"
    """Rule of the update: SGD with momentum, AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), for large batches LARS
    (You et al. 2017, arXiv 1708.03888) and LAMB (You et al. 2019, arXiv 1904.00962) by timm, or Muon (Jordan et al. 2024),
    which leaves the head, norms and biases to AdamW."""

    lr: float = 0.05
    """Peak learning rate, for the global batch as it stands; nothing scales it."""

    momentum: float = 0.9
    """Momentum of SGD, LARS and Muon, from 0 to below 1."""

    nesterov: bool = True
    """Nesterov's momentum in SGD, LARS and Muon."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's, LAMB's and Muon's averages of the gradient and of its square, each from 0 to below 1."""

    weight_decay: float = 5e-4
    """Decay of the weights of convolutions and linear layers; biases and norms have none. In SGD it is added to the
    gradient (L2), in AdamW and Muon it is decoupled from it."""

    schedule: Schedule = "onecycle"
    """Learning rate after the warm-up: constant; multiplied by gamma at the milestones (step); half a cosine to zero;
    or a straight line to zero (onecycle). cyclic rises from min_lr to lr and falls back, cycles times, in straight lines."""

    warmup: float = 0.2
    """Share of the run, from 0 to 1, over which the learning rate first rises in a straight line to its peak."""

    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Shares of the run, ascending, at which the schedule `step` multiplies the learning rate by gamma."""

    gamma: float = 0.1
    """Factor at each milestone, above 0 and at most 1."""

    min_lr: float = 0.0
    """Learning rate where the schedule `cyclic` begins and ends each cycle, above 0 and at most lr."""

    cycles: int = 4
    """Cycles of the schedule `cyclic` in the run; Smith advises 3 or more, each of 4 to 20 epochs."""

    layer_decay: float = 1.0
    """Factor of the learning rate from one stage of the network to the one before it, above 0 and at most 1: with 0.75 the
    head has all of it, layer4 0.75, layer3 0.56 and the stem 0.24 (Bao et al. 2022, "BEiT", arXiv 2106.08254). 1 is off."""

    clip_norm: float = 0.0
    """Largest global L2 norm of the gradient; longer gradients are scaled down to it. 0 is off."""

    loss: Loss = "cross_entropy"
    """What training minimises: cross-entropy, or for each class by itself the binary cross-entropy of whether it is there,
    mixed in or not (Wightman et al. 2021, arXiv 2110.00476, section 2.2), the mean over classes. Evaluation has the first."""

    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes, from 0 to below 1."""

    ema_decay: float = 0.0
    """Decay per update of the exponential moving average of the weights, from 0 to below 1. 0 is off."""

    accumulate: int = 1
    """Micro-batches per update."""

    def __post_init__(self) -> None:
        late = all(milestone >= self.warmup for milestone in self.milestones)
        rules = (
            ("name", self.name in get_args(OptimizerName), f"is unknown; choose one of {_listed(OptimizerName)}"),
            ("lr", 0 < self.lr < math.inf, "is not positive; give a learning rate above 0"),
            ("momentum", 0 <= self.momentum < 1, "is out of range; give a number from 0 to below 1"),
            (
                "nesterov",
                self.momentum > 0 or not self.nesterov or self.name not in ("sgd", "lars", "muon"),
                "needs a momentum; set optim.momentum above 0 or optim.nesterov to false",
            ),
            (
                "betas",
                len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
                "is out of range; give two numbers from 0 to below 1",
            ),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "is out of range; give 0 or a number above it"),
            ("schedule", self.schedule in get_args(Schedule), f"is unknown; choose one of {_listed(Schedule)}"),
            ("warmup", 0 <= self.warmup <= 1, "is out of range; give a share of the run from 0 to 1"),
            (
                "milestones",
                _ascending(self.milestones),
                "is not ascending shares of the run between 0 and 1; sort them",
            ),
            (
                "milestones",
                self.schedule != "step" or late,
                f"begins inside the warm-up; start at {self.warmup} or later, or lower optim.warmup",
            ),
            (
                "warmup",
                self.schedule != "cyclic" or self.warmup == 0,
                "does not go with the schedule cyclic, which rises by itself; set optim.warmup to 0",
            ),
            (
                "min_lr",
                self.schedule != "cyclic" or 0 < self.min_lr <= self.lr,
                "is out of range; give a learning rate above 0 and at most optim.lr",
            ),
            ("cycles", self.cycles >= 1, "is not positive; give 1 or more cycles in the run"),
            ("gamma", 0 < self.gamma <= 1, "is out of range; give a factor above 0 and at most 1"),
            ("layer_decay", 0 < self.layer_decay <= 1, "is out of range; give a factor above 0, or 1 for none"),
            ("clip_norm", 0 <= self.clip_norm < math.inf, "is out of range; give a norm above 0, or 0 for none"),
            ("loss", self.loss in get_args(Loss), f"is unknown; choose one of {_listed(Loss)}"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "is out of range; give a share from 0 to below 1"),
            ("ema_decay", 0 <= self.ema_decay < 1, "is out of range; give a decay below 1, or 0 for no average"),
            ("accumulate", self.accumulate >= 1, "is not positive; give 1 or more micro-batches per update"),
        )
        for option, holds, fault in rules:
            if not holds:
                raise UserError(f"optim.{option}: {getattr(self, option)!r} {fault}")


def _listed(choice: object) -> str:
    return ", ".join(get_args(choice))


def _ascending(shares: tuple[float, ...]) -> bool:
    return all(earlier < later for earlier, later in pairwise((0.0, *shares, 1.0)))


def lr_at(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Learning rate of update `step` of `total_steps`, 0 <= step < total_steps; always above 0.

    With warm-up over w updates (w = warmup * total_steps, rounded), update s < w has (s + 1) / w of the peak: the first
    is above zero, and update w - 1 is the peak. From there the schedules fall towards zero at s = total_steps, one past
    the last update. Without warm-up the peak is update 0.

    onecycle is the plain triangle of FFCV's CIFAR-10 example: that of Smith 2018 (arXiv 1803.09820), but from and to
    zero, with no last phase below it and with constant momentum. step is as in He et al. 2015 (arXiv 1512.03385,
    section 4.2), cosine as in Loshchilov and Hutter 2017 (arXiv 1608.03983) without restarts, cyclic the policy
    "triangular" of Smith 2017 (arXiv 1506.01186, section 3.1), and the warm-up as in Goyal et al. 2017 (arXiv 1706.02677,
    section 2.2).
    """
    assert 0 <= step < total_steps, f"update {step} of {total_steps}"
    peak = max(round(cfg.warmup * total_steps) - 1, 0)
    if step < peak:
        return cfg.lr * (step + 1) / (peak + 1)
    progress = (step - peak) / (total_steps - peak)
    match cfg.schedule:
        case "constant":
            return cfg.lr
        case "step":
            passed = sum(step >= round(milestone * total_steps) for milestone in cfg.milestones)
            return cfg.lr * cfg.gamma**passed
        case "cosine":
            return cfg.lr * (1 + math.cos(math.pi * progress)) / 2
        case "onecycle":
            return cfg.lr * (1 - progress)
        case "cyclic":
            height = 1 - abs(2 * (progress * cfg.cycles % 1) - 1)
            return cfg.min_lr + (cfg.lr - cfg.min_lr) * height


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Two groups in the order of `named_parameters`: weights with decay, then norms and biases (ndim <= 1) without.

    With layer_decay below 1 two for each stage of a ResNet, from the stem on. A group's "scale" is its share of the
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
    """Let the next update have the learning rate `lr`, scaled in each of the groups of `parameter_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)  # there is none in a checkpoint from before there were any


def muon_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """`parameter_groups`, divided into the matrices that Muon makes orthogonal and the rest: the head, norms and biases."""
    head = {id(parameter) for name, parameter in module.named_parameters() if stage_of(name) == HEAD_STAGE}
    return [
        {**group, "params": parameters, "orthogonal": orthogonal}
        for group in parameter_groups(module, weight_decay, layer_decay)
        for orthogonal in (True, False)
        if (parameters := [p for p in group["params"] if (p.ndim > 1 and id(p) not in head) == orthogonal])
    ]


def build_optimizer(module: nn.Module, cfg: OptimConfig, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """The optimiser of a module's parameters; the caller gives each update its learning rate by `set_lr`.

    SGD and AdamW update a parameter in one fused kernel: on a CPU ResNet-18's take half the time of "foreach". LARS and
    LAMB leave weights without decay (norms and biases) to the plain rule. Muon multiplies matrices in `dtype`.
    """
    groups = parameter_groups(module, cfg.weight_decay, cfg.layer_decay)
    nesterov = cfg.nesterov and cfg.momentum > 0
    match cfg.name:
        case "sgd":
            return torch.optim.SGD(groups, cfg.lr, cfg.momentum, nesterov=nesterov, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, cfg.lr, cfg.betas, fused=True)
        case "muon":
            groups = muon_groups(module, cfg.weight_decay, cfg.layer_decay)
            return Muon(groups, cfg.lr, cfg.momentum, cfg.betas, nesterov=nesterov, dtype=dtype)
        case "lars":
            from timm.optim.lars import Lars

            return Lars(groups, cfg.lr, cfg.momentum, nesterov=nesterov)
        case "lamb":
            from timm.optim.lamb import Lamb

            return Lamb(groups, cfg.lr, betas=cfg.betas, max_grad_norm=None)


def ema_decay_at(step: int, cfg: OptimConfig) -> float:
    """Decay of the average at update `step`: it rises from 0.1 to ema_decay, so that early weights are soon forgotten.

    min(ema_decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage has it with `num_updates`.
    """
    return min(cfg.ema_decay, (1 + step) / (10 + step))


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
        """Move towards `module` as update `step`, counted from 0, has left it."""
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
