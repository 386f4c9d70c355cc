"""Residual networks for images: ResNet-18, 34, 50, 101 and 152.

After He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), table 1, with a projection
shortcut wherever the shape changes (option B of its section 3.3) and, in a bottleneck, the stride in the 3x3
convolution rather than in the first 1x1 ("v1.5"). Parameters and buffers bear torchvision's names in torchvision's
order, and are drawn in its order too: weights load strictly in both directions, and one seed gives the same start. (With
`shortcut: pool` they are timm's, of `ResNet(avg_down=True)`.)
"""

import re
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_pipeline.config import require
from trainer.convolution import Convolution

ModelName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Shortcut = Literal["conv", "pool"]

HEAD = "fc"
"""Name of the classifier."""
HEAD_STAGE = 5


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained."""

    name: ModelName = "resnet18"
    """Architecture; the number is its depth in weighted layers."""

    zero_init_gamma: bool = False
    """Start every residual block as its shortcut: its last batch-norm gamma is 0 (Goyal et al. 2017, section 5.1)."""

    shortcut: Shortcut = "conv"
    """How a shortcut halves the image: conv, as torchvision has it, looks at one of four positions; pool averages them
    first (ResNet-D in He et al. 2018, arXiv 1812.01187, figure 2c) and learns more in as much time."""

    weights: str | None = None
    """Weights to start from: a name of torchvision's such as ResNet50_Weights.IMAGENET1K_V2, which is downloaded and brings
    data.mean, std and eval_crop unless they are given; a file of torchvision, timm or safetensors; or a run folder. A head
    for other classes is left out."""

    freeze_until: int = 0
    """Epochs in which only the head is trained; the weights and running statistics of the rest stay as they are."""

    head_only: bool = False
    """Train the head alone in all epochs."""

    freeze_bn: bool = False
    """Keep batch normalisation as it is, the running statistics that it then normalises with as well as gamma and beta."""

    def __post_init__(self) -> None:
        require(
            self.name in get_args(ModelName),
            f"model.name: {self.name!r} is unknown; choose one of {', '.join(get_args(ModelName))}",
        )
        require(
            self.shortcut in get_args(Shortcut),
            f"model.shortcut: {self.shortcut!r} is unknown; choose one of {', '.join(get_args(Shortcut))}",
        )
        require(self.weights != "", "model.weights: it is empty; give a file or a name, or leave it out")
        if self.weights is not None and is_torchvision(self.weights):
            theirs = self.weights.partition("_")[0].lower()
            require(
                theirs == self.name,
                f"model.weights: {self.weights} is for {theirs}; set model.name to it, or give others",
            )
        require(self.freeze_until >= 0, f"model.freeze_until: {self.freeze_until} is negative; give a number of epochs")
        for option in ("freeze_until", "head_only", "freeze_bn"):
            value = getattr(self, option)
            require(
                self.weights is not None or not value,
                f"model.{option}: {value} keeps weights as they are, and these are random; give model.weights",
            )


def is_torchvision(weights: str) -> bool:
    """Whether weights are given by torchvision's name for them."""
    return re.fullmatch(r"ResNet\d+_Weights\.\w+", weights) is not None


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return Convolution(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def make_shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "conv":
        return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    # Of an odd side, the last position stands alone, as the strided convolution beside the shortcut sees it.
    pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs))


def rectify(x: Tensor) -> Tensor:
    # In place: neither batch norm nor the sum before it keeps its output for the backward pass.
    return F.relu(x, inplace=True)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: [B,inputs,H,W] to [B,width,H/stride,W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1, shortcut: Shortcut = "conv") -> None:
        super().__init__()
        self.conv1 = convolution(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = make_shortcut(inputs, width, stride, shortcut)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = rectify(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return rectify(y.add_(self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions: [B,inputs,H,W] to [B,4*width,H/stride,W/stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1, shortcut: Shortcut = "conv") -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = make_shortcut(inputs, outputs, stride, shortcut)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = rectify(self.bn1(self.conv1(x)))
        y = rectify(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return rectify(y.add_(self.downsample(x)))


Block = BasicBlock | Bottleneck

# Table 1 of the paper: the kind of block, and how many of them each of the four stages has.
ARCHITECTURES: dict[ModelName, tuple[type[Block], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def stage(block: type[Block], inputs: int, width: int, count: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = block(inputs, width, stride, shortcut)
    return nn.Sequential(first, *(block(width * block.expansion, width) for _ in range(count - 1)))


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, global average pooling and a linear classifier."""

    def __init__(
        self, block: type[Block], counts: tuple[int, int, int, int], classes: int, shortcut: Shortcut = "conv"
    ) -> None:
        super().__init__()
        self.conv1 = convolution(3, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(block, 64, 64, counts[0], 1, shortcut)
        self.layer2 = stage(block, 64 * block.expansion, 128, counts[1], 2, shortcut)
        self.layer3 = stage(block, 128 * block.expansion, 256, counts[2], 2, shortcut)
        self.layer4 = stage(block, 256 * block.expansion, 512, counts[3], 2, shortcut)
        self.fc = nn.Linear(512 * block.expansion, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def train(self, mode: bool = True) -> Self:
        """Set the mode of training; batch norms whose weights are frozen stay in evaluation mode, and so are frozen whole."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B,classes] of normalised images [B,3,H,W], both float; any H and W, 32 times smaller at the end."""
        # The maximum of rectified values is the rectified maximum, of which there are a quarter as many.
        x = F.max_pool2d(self.bn1(self.conv1(images)), kernel_size=3, stride=2, padding=1)
        x = rectify(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def build_resnet(cfg: ModelConfig, classes: int) -> ResNet:
    """A freshly initialised network; its weights are drawn from torch's global generator.

    Convolutions: normal, fan out (He et al. 2015, arXiv 1502.01852). Batch norm: gamma 1, beta 0. Classifier: torch's
    default for a linear layer.
    """
    block, counts = ARCHITECTURES[cfg.name]
    network = ResNet(block, counts, classes, cfg.shortcut)
    if cfg.zero_init_gamma:
        for module in network.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.last_norm.weight)
    return network


def freeze(network: nn.Module, cfg: ModelConfig, epoch: int) -> None:
    """Freeze what `cfg` keeps as it is of a `ResNet` in `epoch`, counted from 0, and nothing else.

    What is frozen has no gradient, so no optimiser decays or moves it, and no backward pass goes through it.
    """
    only_head = cfg.head_only or epoch < cfg.freeze_until
    for name, module in network.named_modules():
        kept = only_head or (cfg.freeze_bn and isinstance(module, _BatchNorm))
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(name == HEAD or not kept)
    network.train(network.training)


def stage_of(name: str) -> int:
    """Where a parameter lies, counted from the images: 0 the stem, 1 to 4 the stages, HEAD_STAGE the head."""
    child = name.partition(".")[0]
    return HEAD_STAGE if child == HEAD else int(child[-1]) if child.startswith("layer") else 0
