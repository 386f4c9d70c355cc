"""Options of the optimiser. No torch is imported here: a mistake in them is reported before anything heavy is loaded."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from data_pipeline.common.errors import UserError

OptimizerName = Literal["sgd", "adamw", "lars", "lamb", "muon"]
Loss = Literal["cross_entropy", "binary"]
Schedule = Literal["constant", "step", "cosine", "polynomial", "onecycle", "cyclic"]
FALLING = ("cosine", "polynomial", "onecycle")
"""Schedules that fall from the peak to min_lr."""


@dataclass(frozen=True)
class OptimConfig:
    """Options of the optimiser, its schedule and the loss."""

    name: OptimizerName = "sgd"
    """Optimiser: SGD with momentum, AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), for large batches LARS
    (You et al. 2017, arXiv 1708.03888) and LAMB (You et al. 2019, arXiv 1904.00962) by timm, or Muon (Jordan et al. 2024),
    which leaves the head, norms and biases to AdamW."""

    lr: float = 0.05
    """Peak learning rate, for the global batch as given; nothing scales it."""

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
    """Learning rate after the warm-up: constant; multiplied by gamma at the milestones (step); or falling to min_lr in half a
    cosine, with a power of what is left (polynomial), or in a straight line (onecycle). cyclic rises from min_lr to lr and
    falls back, cycles times, in straight lines."""

    warmup: float = 0.2
    """Share of the run, from 0 to 1, over which the learning rate first rises in a straight line to its peak: 5 of 90 epochs
    are 0.0556."""

    warmup_start: float = 0.0
    """Share of the peak, from 0 to 1, that the warm-up rises from."""

    cooldown: float = 0.0
    """Share of the run at its end, from 0 to 1, that stays at min_lr, where the learning rate falls to it before."""

    power: float = 2.0
    """Power of the schedule `polynomial`, above 0."""

    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Shares of the run, ascending, at which the schedule `step` multiplies the learning rate by gamma."""

    gamma: float = 0.1
    """Factor at each milestone, above 0 and at most 1."""

    min_lr: float = 0.0
    """Lowest learning rate, from 0 to lr: where cosine, polynomial and onecycle end, and cyclic begins and ends each cycle."""

    cycles: int = 4
    """Cycles of the schedule `cyclic` in the run; Smith advises 3 or more, each of 4 to 20 epochs."""

    layer_decay: float = 1.0
    """Factor of the learning rate from one stage of the network to the one before it, above 0 and at most 1: with 0.75 the
    head has the full rate, layer4 0.75, layer3 0.56 and the stem 0.24 (Bao et al. 2022, "BEiT", arXiv 2106.08254). 1 is off."""

    clip_norm: float = 0.0
    """Largest global L2 norm of the gradient; longer gradients are scaled down to it. 0 is off."""

    sam_radius: float = 0.0
    """Length of the way up the gradient to the place whose gradient a step follows, so that it seeks flat minima (Foret et al.
    2021, "SAM", arXiv 2010.01412); such a step takes twice the time. 0 is off."""

    sam_steps: int = 1
    """Optimizer steps from one such step to the next, the first included; the others are plain."""

    loss: Loss = "cross_entropy"
    """Loss of training: cross-entropy, or binary cross-entropy for each class, present or not, also in mixed images
    (Wightman et al. 2021, arXiv 2110.00476, section 2.2), the mean over classes. Evaluation always uses cross-entropy. Where
    images have several classes both are binary."""

    binary_threshold: float | None = 0.2
    """Share of a mixed image, from 0 to below 1, above which the binary loss takes a class to be there. null takes each
    class's share for its chance instead."""

    binary_sum: bool = False
    """Sum the binary loss over the classes, as Composer does, instead of their mean: it wants a lower learning rate."""

    class_weights: Literal["none", "balanced"] | list[float] = "none"
    """Factors of the loss by class: none; balanced, the mean number of training images of a class over that of this one; or
    a list with one for each class, in the order of the classes. In mixed images, and for label smoothing, each class's
    share has its own. They are not normalised: a mean of 1 over the images keeps the learning rate's meaning. Where images
    have several classes, the factor of a class's loss where it is there; balanced, the images without it over those with it."""

    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes, from 0 to below 1."""

    teacher: str | None = None
    """Network whose answers are learned beside the labels (Hinton et al. 2015, arXiv 1503.02531): a run folder, whose chosen
    weights it takes, or a name such as ResNet50_Weights.IMAGENET1K_V2 or timm:resnet50.a1_in1k. It sees the same crops as the
    network in training, mixed images too (Beyer et al. 2022, arXiv 2106.05237), and does not change."""

    teacher_share: float = 0.5
    """Share of the loss that compares with the teacher, above 0 and at most 1; the labels have the rest."""

    teacher_answer: Literal["soft", "hard"] = "soft"
    """Answer that is learned: soft is the teacher's probabilities, by their Kullback-Leibler divergence; hard is its likeliest
    class, by cross-entropy (Touvron et al. 2021, "DeiT", arXiv 2012.12877, section 3)."""

    temperature: float = 1.0
    """Divisor of both networks' logits in the soft loss, above 0, which is then multiplied by its square; 1 changes nothing."""

    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights each time that it is brought up to date, from 0 to below 1. 0 is
    off."""

    ema_steps: int = 1
    """Optimizer steps from one time to the next. Of k steps the decay is that of one to the power of k."""

    swa: float = 0.0
    """Share of the run at its end, from 0 to 1, whose epochs' last weights are averaged plainly, with batch norm's statistics
    estimated anew from training images (Izmailov et al. 2018, arXiv 1803.05407). It wants a learning rate that does not go to
    zero. 0 is off."""

    accumulate: int = 1
    """Micro-batches per optimizer step."""

    def __post_init__(self) -> None:
        weights = self.class_weights
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
            ("warmup_start", 0 <= self.warmup_start <= 1, "is out of range; give a share of optim.lr from 0 to 1"),
            (
                "cooldown",
                self.cooldown == 0 or (self.schedule in FALLING and 0 < self.cooldown <= 1 - self.warmup),
                f"does not fit; give {', '.join(FALLING)} a share of the run that optim.warmup leaves, others 0",
            ),
            (
                "cooldown",
                self.cooldown == 0 or self.min_lr > 0,
                "would not change the weights at a learning rate of 0; set optim.min_lr above 0",
            ),
            ("power", 0 < self.power < math.inf, "is not positive; give a power such as 2"),
            (
                "min_lr",
                0 <= self.min_lr <= self.lr and (self.min_lr > 0 or self.schedule != "cyclic"),
                "is out of range; give a learning rate above 0 and at most optim.lr",
            ),
            ("cycles", self.cycles >= 1, "is not positive; give 1 or more cycles in the run"),
            ("gamma", 0 < self.gamma <= 1, "is out of range; give a factor above 0 and at most 1"),
            ("layer_decay", 0 < self.layer_decay <= 1, "is out of range; give a factor above 0, or 1 for none"),
            ("clip_norm", 0 <= self.clip_norm < math.inf, "is out of range; give a norm above 0, or 0 for none"),
            ("sam_radius", 0 <= self.sam_radius < math.inf, "is out of range; give a length above 0, or 0 for none"),
            ("sam_steps", self.sam_steps >= 1, "is not positive; give a number of optimizer steps"),
            ("loss", self.loss in get_args(Loss), f"is unknown; choose one of {_listed(Loss)}"),
            (
                "class_weights",
                isinstance(weights, str) or (all(0 <= weight < math.inf for weight in weights) and any(weights)),
                "is no list of factors; give a number from 0 for each class, not all 0",
            ),
            (
                "binary_threshold",
                self.binary_threshold is None or 0 <= self.binary_threshold < 1,
                "is out of range; give a share from 0 to below 1, or null for none",
            ),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "is out of range; give a share from 0 to below 1"),
            ("teacher", self.teacher != "", "is empty; give a run folder or the name of weights, or leave it out"),
            ("teacher_share", 0 < self.teacher_share <= 1, "is out of range; give a share above 0, up to 1"),
            ("teacher_answer", self.teacher_answer in ("soft", "hard"), "is unknown; choose one of soft, hard"),
            ("temperature", 0 < self.temperature < math.inf, "is not positive; give a number above 0, or 1 for none"),
            ("ema_decay", 0 <= self.ema_decay < 1, "is out of range; give a decay below 1, or 0 for no average"),
            ("ema_steps", self.ema_steps >= 1, "is not positive; give a number of optimizer steps"),
            ("swa", 0 <= self.swa <= 1, "is out of range; give a share of the run from 0 to 1"),
            ("swa", not (self.swa and self.ema_decay), "does not go with optim.ema_decay; choose one average"),
            ("accumulate", self.accumulate >= 1, "is not positive; give 1 or more micro-batches per optimizer step"),
        )
        for option, holds, fault in rules:
            if not holds:
                raise UserError(f"optim.{option}: {getattr(self, option)!r} {fault}")


def _listed(choice: object) -> str:
    return ", ".join(get_args(choice))


def _ascending(shares: tuple[float, ...]) -> bool:
    return all(earlier < later for earlier, later in pairwise((0.0, *shares, 1.0)))
