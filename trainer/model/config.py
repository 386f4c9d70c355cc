"""Options of the network. No torch is imported here: a mistake in them is reported before anything heavy is loaded."""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from data_pipeline.common.errors import require

ModelName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
TIMM = "timm:"
"""Beginning of the name of a network, or of weights, that timm has."""
Stem = Literal["conv", "deep", "patch"]
Shortcut = Literal["conv", "pool"]
Attention = Literal["none", "se", "eca"]
Activation = Literal["relu", "gelu", "silu"]

SHAPING = ("stem", "width", "blur", "shortcut", "attention", "activation")
"""Options by which a network of ours is none of torchvision's, and its weights have other names or shapes."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of the network, and its start."""

    name: ModelName | str = "resnet18"
    """Architecture; the number is its depth in weighted layers. Or timm:NAME, a residual network that timm builds, such as
    timm:resnext50_32x4d, timm:wide_resnet50_2 or timm:resnetrs50."""

    zero_init_gamma: bool = False
    """Start every residual block as its shortcut: its last batch-norm gamma is 0 (Goyal et al. 2017, section 5.1)."""

    head_bias: float | None = None
    """Start of the head's biases, such as -log(classes) with a binary loss, for each class is rare; if not given, they are drawn
    as in torchvision."""

    stem: Stem = "conv"
    """First layers, which make a map of a quarter of the image's side: conv, as in torchvision, by a 7x7 convolution and a
    maximum; deep by three 3x3 convolutions and a maximum (ResNet-C and -D, He et al. 2018, arXiv 1812.01187, figure 2b); patch
    by one 4x4 convolution of patches that do not overlap (Liu et al. 2022, "ConvNeXt", arXiv 2201.03545, section 2.2), which
    takes less time."""

    whiten: bool = False
    """Start the stem's filters from the principal components of patches of training images (Jordan 2024, arXiv 2404.00498,
    section 3.2) instead of random numbers."""

    width: float = 1.0
    """Factor of the channels in all stages (Zagoruyko and Komodakis 2016, arXiv 1605.07146), to the next multiple of 8."""

    blur: bool = False
    """Blur what a convolution with a stride is about to sample, the stem excepted (Zhang 2019, "BlurPool", arXiv 1904.11486;
    before the convolution, as FFCV's ResNets have it)."""

    bn_momentum: float = 0.1
    """Weight of the newest batch in the running statistics of batch normalisation, above 0 and at most 1."""

    shortcut: Shortcut = "conv"
    """Way in which a shortcut halves the image: conv, as in torchvision, looks at one of four positions; pool averages them
    first (ResNet-D in He et al. 2018, arXiv 1812.01187, figure 2c) and learns more in the same time."""

    attention: Attention = "none"
    """Weighting of the channels at the end of each residual branch by what their means tell: se by two layers (Hu et al. 2017,
    "Squeeze-and-Excitation", arXiv 1709.01507), eca by a convolution over neighbouring channels (Wang et al. 2019, arXiv
    1910.03151)."""

    activation: Activation = "relu"
    """Nonlinearity: relu; gelu (Hendrycks and Gimpel 2016, arXiv 1606.08415); silu (Elfwing et al. 2017, arXiv 1702.03118)."""

    drop_path: float = 0.0
    """Stochastic depth, for each sample (Huang et al. 2016, arXiv 1603.09382): share of the images that pass the last residual
    block by its shortcut alone, from 0 to below 1; it rises in a straight line from 0 for the first block, as in timm."""

    weights: str | None = None
    """Weights to start from: a name of torchvision's such as ResNet50_Weights.IMAGENET1K_V2, which is downloaded and brings
    data.mean, std and eval_crop unless they are given; timm's, as timm:resnet50d.ra2_in1k, which do the same; a file of
    torchvision, timm or safetensors; or a run folder. A head for other classes is left out."""

    freeze_until: int = 0
    """Epochs in which only the head is trained; weights and running statistics of the rest stay unchanged."""

    head_only: bool = False
    """Train the head alone in all epochs."""

    head_norm: bool = False
    """Train the last batch norm along with the head where only that is trained, statistics included: for images of another size
    (FixRes; Touvron et al. 2019, arXiv 1906.06423, section 3.3)."""

    freeze_bn: bool = False
    """Keep batch normalisation unchanged: gamma, beta and the running statistics, with which it then normalises."""

    def __post_init__(self) -> None:
        require(
            is_timm(self.name) or self.name in get_args(ModelName),
            f"model.name: {self.name!r} is unknown; choose one of {', '.join(get_args(ModelName))}, or a network of timm's "
            "such as timm:resnext50_32x4d",
        )
        for option in SHAPING if is_timm(self.name) else ():
            value, own = getattr(self, option), type(self).__dataclass_fields__[option].default
            require(
                value == own,
                f"model.{option}: {value} is for networks of our own, and {self.name} has what timm gives it; leave it out",
            )
        require(
            self.head_bias is None or math.isfinite(self.head_bias),
            f"model.head_bias: {self.head_bias} is no bias; give a number such as -6.9, or leave it out",
        )
        require(
            self.stem in get_args(Stem),
            f"model.stem: {self.stem!r} is unknown; choose one of {', '.join(get_args(Stem))}",
        )
        require(
            not self.whiten or self.weights is None,
            f"model.whiten: {self.whiten} is for random weights, and model.weights gives others; leave one of them out",
        )
        require(0 < self.width <= 16, f"model.width: {self.width} is out of range; give a factor above 0, up to 16")
        require(
            0 < self.bn_momentum <= 1,
            f"model.bn_momentum: {self.bn_momentum} is out of range; give a share above 0, up to 1",
        )
        require(
            self.shortcut in get_args(Shortcut),
            f"model.shortcut: {self.shortcut!r} is unknown; choose one of {', '.join(get_args(Shortcut))}",
        )
        require(
            self.attention in get_args(Attention),
            f"model.attention: {self.attention!r} is unknown; choose one of {', '.join(get_args(Attention))}",
        )
        require(
            self.activation in get_args(Activation),
            f"model.activation: {self.activation!r} is unknown; choose one of {', '.join(get_args(Activation))}",
        )
        require(
            0 <= self.drop_path < 1,
            f"model.drop_path: {self.drop_path} is out of range; give a share from 0 to below 1",
        )
        require(self.weights != "", "model.weights: it is empty; give a file or a name, or leave it out")
        if self.weights is not None and is_torchvision(self.weights):
            theirs = self.weights.partition("_")[0].lower()
            require(
                theirs == self.name,
                f"model.weights: {self.weights} is for {theirs}; set model.name to it, or give others",
            )
        if self.weights is not None and is_timm(self.weights) and is_timm(self.name):
            theirs = self.weights.partition(".")[0]
            require(
                theirs == self.name,
                f"model.weights: {self.weights} is for {theirs}; set model.name to it, or give others",
            )
        require(self.freeze_until >= 0, f"model.freeze_until: {self.freeze_until} is negative; give a number of epochs")
        require(
            not self.head_norm or ((self.head_only or self.freeze_until > 0) and not self.freeze_bn),
            f"model.head_norm: {self.head_norm} is for runs that train the head alone; set model.head_only, without freeze_bn",
        )
        for option in ("freeze_until", "head_only", "freeze_bn"):
            value = getattr(self, option)
            require(
                self.weights is not None or not value,
                f"model.{option}: {value} keeps weights as they are, and these are random; give model.weights",
            )


def is_timm(name: str) -> bool:
    """Return True for the name of a network or of weights from timm."""
    return name.startswith(TIMM)


def is_torchvision(weights: str) -> bool:
    """Return True for a name of weights from torchvision."""
    return re.fullmatch(r"ResNet\d+_Weights\.\w+", weights) is not None
