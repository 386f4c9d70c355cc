"""Residual networks for images: ResNet-18, 34, 50, 101 and 152.

After He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), table 1, with a projection
shortcut wherever the shape changes (option B of its section 3.3) and, in a bottleneck, the stride in the 3x3
convolution rather than in the first 1x1 ("v1.5"). Parameters and buffers bear torchvision's names in torchvision's
order, and are drawn in its order too: weights load strictly in both directions, and one seed gives the same start. Some
options leave torchvision's networks, and their weights load into none of them: `shortcut: pool`, `stem: deep` and `attention`
have the names of timm's `ResNet`, `stem: patch` and `width` have other shapes, `blur` has a buffer more for each filter, and
`activation` one in all.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.model.attention import make_attention
from trainer.model.config import SHAPING, Activation, ModelConfig, is_timm
from trainer.model.config import ModelName as ModelName
from trainer.model.config import Shortcut as Shortcut
from trainer.model.config import Stem as Stem
from trainer.model.conv_matmul import Convolution
from trainer.model.drop_path import add_drop_paths

HEAD = "fc"
"""Name of the classifier."""
HEAD_STAGE = 5

BLUR = "blur"
"""Last part of the names of blur filters."""


def unknown_to_torchvision(cfg: ModelConfig) -> str | None:
    """Name the first option, with its value, by which a network is none of torchvision's."""
    if is_timm(cfg.name):
        return f"model.name {cfg.name}"
    plain = ModelConfig()
    options = (name for name in SHAPING if getattr(cfg, name) != getattr(plain, name))
    return next((f"model.{name} {getattr(cfg, name)}" for name in options), None)


class BlurredConvolution(Convolution):
    """A convolution of the image blurred by [1 2 1] along both sides, with zeros beyond its edges.

    The filter is constant, but saved: weights without it would load strictly into a plain network, and give wrong results.
    """

    blur: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, *, padding: int, bias: bool) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=padding, bias=bias)
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer(BLUR, torch.outer(line, line).repeat(inputs, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B,outputs,H/stride,W/stride] of images [B,inputs,H,W], float in channels-last memory."""
        return super().forward(F.conv2d(images, self.blur, padding=1, groups=self.in_channels))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Weights of a plain network to start from, and those of ours from before it was saved, have no filter.
        state_dict.setdefault(f"{prefix}{BLUR}", self.blur)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, *, blur: bool = False) -> nn.Conv2d:
    kind = BlurredConvolution if blur and stride > 1 else Convolution
    return kind(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def make_shortcut(inputs: int, outputs: int, stride: int, cfg: ModelConfig) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if cfg.shortcut == "conv":
        return nn.Sequential(convolution(inputs, outputs, 1, stride, blur=cfg.blur), nn.BatchNorm2d(outputs))
    # Of an odd side, the last position stands alone, as the strided convolution beside the shortcut sees it.
    pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs))


def rectify(x: Tensor) -> Tensor:
    # In place: neither batch norm nor the sum before it keeps its output for the backward pass.
    return F.relu(x, inplace=True)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": rectify, "gelu": F.gelu, "silu": F.silu}


class Block(nn.Module):
    """A residual block: a branch of convolutions beside a shortcut."""

    expansion: int
    """Channels of its result for each of its width."""
    se: nn.Module | None
    downsample: nn.Module
    drop_path: nn.Module | None

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[cfg.activation]
        self.drop_path = None  # see add_drop_paths

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm at the end of the branch."""
        raise NotImplementedError

    def join(self, branch: Tensor, x: Tensor) -> Tensor:
        """Add the shortcut of `x` to what its branch has become, which is changed in place."""
        if self.se is not None:
            branch = self.se(branch)
        if self.drop_path is not None:
            branch = self.drop_path(branch)
        return self.activate(branch.add_(self.downsample(x)))


class BasicBlock(Block):
    """Two 3x3 convolutions: [B,inputs,H,W] to [B,width,H/stride,W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.conv1 = convolution(inputs, width, 3, stride, blur=cfg.blur)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = make_attention(width, cfg.attention)
        self.downsample = make_shortcut(inputs, width, stride, cfg)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = self.activate(self.bn1(self.conv1(x)))
        return self.join(self.bn2(self.conv2(y)), x)


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions: [B,inputs,H,W] to [B,4*width,H/stride,W/stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        outputs = width * self.expansion
        self.conv1 = convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride, blur=cfg.blur)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.se = make_attention(outputs, cfg.attention)
        self.downsample = make_shortcut(inputs, outputs, stride, cfg)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = self.activate(self.bn1(self.conv1(x)))
        y = self.activate(self.bn2(self.conv2(y)))
        return self.join(self.bn3(self.conv3(y)), x)


# Table 1 of the paper: the kind of block, and how many of them each of the four stages has.
ARCHITECTURES: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def stage(
    block: type[BasicBlock | Bottleneck], inputs: int, width: int, count: int, stride: int, cfg: ModelConfig
) -> nn.Sequential:
    first = block(inputs, width, stride, cfg)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1, cfg) for _ in range(count - 1)))


class Activate(nn.Module):
    """An activation within a row of layers."""

    def __init__(self, kind: Activation) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(x)


def make_stem(width: int, cfg: ModelConfig) -> nn.Module:
    """Make the convolutions of [B,3,H,W] before the first norm: to [B,width,H/2,W/2], by patches to a quarter of the side."""
    match cfg.stem:
        case "conv":
            return convolution(3, width, 7, stride=2)
        case "patch":
            return nn.Conv2d(3, width, 4, 4, bias=False)
        case "deep":
            half = width // 2
            return nn.Sequential(
                convolution(3, half, 3, stride=2), nn.BatchNorm2d(half), Activate(cfg.activation),
                convolution(half, half, 3), nn.BatchNorm2d(half), Activate(cfg.activation),
                convolution(half, width, 3),
            )  # fmt: skip


class FrozenNorms(nn.Module):
    """A network whose batch norms stay in evaluation mode while their weights are frozen, and so are frozen whole."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self


class ResNet(FrozenNorms):
    """A stem, four stages of residual blocks, global average pooling and a linear classifier."""

    def __init__(self, cfg: ModelConfig, classes: int) -> None:
        super().__init__()
        block, counts = ARCHITECTURES[cfg.name]
        widths = [math.ceil(cfg.width * width / 8) * 8 for width in (64, 128, 256, 512)]
        inputs = [widths[0], *(width * block.expansion for width in widths)]
        self.activate = ACTIVATIONS[cfg.activation]
        self.conv1 = make_stem(widths[0], cfg)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.Identity() if cfg.stem == "patch" else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = stage(block, inputs[0], widths[0], counts[0], 1, cfg)
        self.layer2 = stage(block, inputs[1], widths[1], counts[1], 2, cfg)
        self.layer3 = stage(block, inputs[2], widths[2], counts[2], 2, cfg)
        self.layer4 = stage(block, inputs[3], widths[3], counts[3], 2, cfg)
        self.fc = nn.Linear(inputs[4], classes)
        if cfg.activation != "relu":
            # Saved, as weights without it would load strictly into a network of another activation, and give wrong results.
            self.register_buffer(cfg.activation, torch.tensor(1))
        for module in self.modules():
            # On "meta" there is nothing to draw, and torch would import its compiler for it, in two seconds.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B,classes] of normalised images [B,3,H,W], both float; any H and W, 32 times smaller at the end."""
        x = self.bn1(self.conv1(images))
        # The maximum of rectified values is the rectified maximum, of which there are a quarter as many. Others fall at first.
        x = rectify(self.pool(x)) if self.activate is rectify else self.pool(self.activate(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def build_resnet(cfg: ModelConfig, classes: int) -> ResNet:
    """Build a freshly initialised network; its weights are drawn from torch's global generator.

    Convolutions: normal, fan out (He et al. 2015, arXiv 1502.01852). Batch norm: gamma 1, beta 0. Classifier: torch's
    default for a linear layer.
    """
    network = ResNet(cfg, classes)
    set_options(network, cfg)
    for module in network.modules():
        if isinstance(module, Block) and cfg.zero_init_gamma:
            nn.init.zeros_(module.last_norm.weight)
    return network


def set_options(network: nn.Module, cfg: ModelConfig) -> None:
    """Set what any residual network has: momentum of batch norms, drop paths, the head's bias."""
    add_drop_paths(network, cfg.drop_path)
    if cfg.head_bias is not None:
        nn.init.constant_(network.get_parameter(f"{HEAD}.bias"), cfg.head_bias)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = cfg.bn_momentum


def freeze(network: nn.Module, cfg: ModelConfig, epoch: int) -> None:
    """Freeze the parts of a network that `cfg` keeps unchanged in `epoch`, counted from 0, and nothing else.

    A frozen parameter has no gradient, so no optimiser decays or moves it, and no backward pass goes through it.
    """
    only_head = cfg.head_only or epoch < cfg.freeze_until
    norms = [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    learning = (HEAD, *norms[-1:]) if cfg.head_norm else (HEAD,)
    for name, module in network.named_modules():
        kept = only_head or (cfg.freeze_bn and isinstance(module, _BatchNorm))
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(name in learning or not kept)
    network.train(network.training)


def stage_of(name: str) -> int:
    """Place of a parameter, counted from the images: 0 the stem, 1 to 4 the stages, HEAD_STAGE the head."""
    child = name.partition(".")[0]
    return HEAD_STAGE if child == HEAD else int(child[-1]) if child.startswith("layer") else 0
