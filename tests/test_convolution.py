"""Convolutions of small images against torch's own."""

import pytest
import torch
from torch import Tensor, nn

from trainer.convolution import Convolution


def both(kernel: int, stride: int) -> tuple[Convolution, nn.Conv2d]:
    torch.manual_seed(0)
    ours = Convolution(12, 20, kernel, stride, padding=kernel // 2, bias=False).double()
    theirs = nn.Conv2d(12, 20, kernel, stride, padding=kernel // 2, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    return ours.to(memory_format=torch.channels_last), theirs


def images(height: int, width: int) -> Tensor:
    return torch.randn(5, 12, height, width, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def gradients(convolution: nn.Conv2d, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of pixels and weights for a fixed gradient of the output."""
    pixels = pixels.clone().requires_grad_()
    result = convolution(pixels)
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result))
    assert pixels.grad is not None and convolution.weight.grad is not None
    return result.detach(), pixels.grad, convolution.weight.grad


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (3, 5), (8, 7), (16, 16)])
def test_output_and_gradients_are_torchs(kernel: int, stride: int, size: tuple[int, int]) -> None:
    ours, theirs = both(kernel, stride)
    pixels = images(*size)
    for got, wanted in zip(gradients(ours, pixels), gradients(theirs, pixels), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    result, _, weight = gradients(ours, pixels)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_only_training_on_small_images_differs() -> None:
    def graph(convolution: nn.Conv2d, pixels: Tensor) -> str:
        return type(convolution(pixels).grad_fn).__name__

    ours, theirs = both(3, 1)
    few, many = images(4, 4), images(4, 5)
    assert graph(ours, few) == "PermuteBackward0"
    assert graph(ours, many) == graph(theirs, many)
    assert graph(ours.eval(), few) == graph(theirs, few)
