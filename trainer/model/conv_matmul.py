"""A convolution that a training CPU computes by Winograd's filters in fp32, and as a matrix where images have become small."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.common.launcher import warn_on_rank0

FEW = 16  # positions of an output, 4 x 4: with more, copying the windows costs more than it saves
MANY = 8  # images for each position of an output: with fewer, writing the matrix of a whole image does not pay


class Convolution(nn.Conv2d):
    """nn.Conv2d with an odd kernel, half of it as padding, and no bias: the same up to rounding, but faster.

    oneDNN divides a convolution by positions, of which the last stages of a ResNet leave few: at 2 x 2 it reaches a tenth
    of the speed that it has at 16 x 16, in the gradient of the weights less still. There, a training CPU has one matrix
    product: of whole images, where the kernel at each output position reaches all of the image, else of the windows around
    the output positions, gathered as rows. At 2 x 2 five ninths of a window would be padding.

    In fp32 a kernel of 3 x 3 takes a quarter of the products, at most sizes (see `winograd`).
    """

    def forward(self, images: Tensor) -> Tensor:
        """[B,outputs,H/stride,W/stride] of images [B,inputs,H,W], float in channels-last memory."""
        if self._takes_winograd(images) and (winograd := _winograd()):
            return winograd(images.permute(0, 2, 3, 1).contiguous(), self.weight).permute(0, 3, 1, 2)
        height, width = (_positions(side, self.stride[0]) for side in images.shape[2:])
        if height * width > FEW or images.device.type != "cpu" or not self.training:
            return super().forward(images)
        pixels, weight = images.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1)
        reach, size = self.kernel_size[0] // 2, images.shape[2:]
        if self.stride[0] == 1 and max(size) <= reach + 1 and len(images) >= MANY * height * width:
            products = F.linear(pixels.flatten(1), _Whole.apply(weight, *size))
        else:
            rows = _Windows.apply(pixels, self.kernel_size[0], self.stride[0])
            products = F.linear(rows, weight.flatten(1))
        return products.view(len(images), height, width, -1).permute(0, 3, 1, 2)

    def _takes_winograd(self, images: Tensor) -> bool:
        """True for training in fp32 on a CPU, on images that fill the tiles and are many enough for each thread.

        Tiles are of 4 x 4 positions, and each thread must use a transformed filter often enough for it to pay for itself.
        """
        count, channels, height, width = images.shape
        tiles = -(-height // 4) * -(-width // 4)
        return (
            self.training
            and images.device.type == "cpu"
            and images.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()  # a compiler sees no way through
            and self.kernel_size == (3, 3)
            and self.stride == (1, 1)
            and channels % 8 == self.out_channels % 8 == 0
            and 8 * tiles <= height * width
            and 16 * (count // torch.get_num_threads()) * tiles >= channels  # last: a compiler cannot follow it
        )


@cache
def _winograd() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Load Winograd's convolution; None, and one line with the reason, where numba does not work."""
    try:
        from trainer.model.winograd import Winograd
    except Exception as error:  # numba raises a hundred kinds of errors, and torch convolves too
        why = " ".join(f"{type(error).__name__}: {error}".split())
        warn_on_rank0(f"numba does not work here, so torch convolves, which takes longer ({why})")
        return None
    convolve: Callable[[Tensor, Tensor], Tensor] = Winograd.apply
    return convolve


class _Whole(torch.autograd.Function):
    """[H * W * outputs, H * W * inputs] of weights [outputs,size,size,inputs]: the matrix that maps whole images [H,W,inputs]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, height: int, width: int) -> Tensor:
        ctx.shape, ctx.sides = weight.shape, (height, width)
        return torch.cat([taps.flatten(1) for taps in _taps_of_positions(weight, height, width)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight = gradients[0].new_zeros(ctx.shape)
        parts = gradients[0].view(-1, len(weight), *ctx.sides, weight.shape[3])
        for taps, part in zip(_taps_of_positions(weight, *ctx.sides), parts, strict=True):
            taps += part
        return weight, None, None


def _taps_of_positions(weight: Tensor, height: int, width: int) -> list[Tensor]:
    """Views [outputs,height,width,inputs] of weights: those that each output position, row by row, has for the image."""
    reach = weight.shape[1] // 2
    return [
        weight[:, reach - row : reach - row + height, reach - column : reach - column + width]
        for row in range(height)
        for column in range(width)
    ]


class _Windows(torch.autograd.Function):
    """[B * positions, size * size * C]: the window of pixels [B,H,W,C] at each output position."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, size: int, stride: int) -> Tensor:
        ctx.shape, ctx.size, ctx.stride = pixels.shape, size, stride
        padded = F.pad(pixels, (0, 0, size // 2, size // 2, size // 2, size // 2))
        return torch.cat(_taps(padded, size, stride), dim=3).flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (images, height, width, channels), edge = ctx.shape, ctx.size // 2
        padded = gradients[0].new_zeros(images, height + 2 * edge, width + 2 * edge, channels)
        taps = _taps(padded, ctx.size, ctx.stride)
        parts = gradients[0].view(*taps[0].shape[:3], -1).split(channels, dim=3)
        for tap, part in zip(taps, parts, strict=True):
            tap += part
        return padded[:, edge : edge + height, edge : edge + width], None, None


def _taps(padded: Tensor, size: int, stride: int) -> list[Tensor]:
    """Views [B,height,width,C] of pixels: those that each of the kernel's weights meets at the output positions."""
    height, width = (_positions(side - size // 2 * 2, stride) for side in padded.shape[1:3])
    return [
        padded[:, top : top + stride * (height - 1) + 1 : stride, left : left + stride * (width - 1) + 1 : stride]
        for top in range(size)
        for left in range(size)
    ]


def _positions(side: int, stride: int) -> int:
    """Count the outputs along a side of an image, padded by half of an odd kernel."""
    return (side - 1) // stride + 1
