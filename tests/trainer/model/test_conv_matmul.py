"""Convolutions of small images against torch's own."""

import pytest
import torch
from torch import Tensor, nn

from trainer.model.conv_matmul import Convolution


def both(kernel: int, stride: int) -> tuple[Convolution, nn.Conv2d]:
    torch.manual_seed(0)
    ours = Convolution(12, 20, kernel, stride, padding=kernel // 2, bias=False).double()
    theirs = nn.Conv2d(12, 20, kernel, stride, padding=kernel // 2, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    return ours.to(memory_format=torch.channels_last), theirs


def images(height: int, width: int, count: int = 5) -> Tensor:
    return torch.randn(count, 12, height, width, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def gradients(convolution: nn.Conv2d, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of pixels and weights for a fixed gradient of the output."""
    pixels = pixels.clone().requires_grad_()
    result = convolution(pixels)
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result))
    assert pixels.grad is not None and convolution.weight.grad is not None
    return result.detach(), pixels.grad, convolution.weight.grad


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (4, 4), (3, 5), (8, 7), (16, 16)])
@pytest.mark.parametrize("count", [5, 40])
def test_output_and_gradients_are_torchs(kernel: int, stride: int, size: tuple[int, int], count: int) -> None:
    ours, theirs = both(kernel, stride)
    pixels = images(*size, count)
    for got, wanted in zip(gradients(ours, pixels), gradients(theirs, pixels), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    result, _, weight = gradients(ours, pixels)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def graph(convolution: nn.Conv2d, pixels: Tensor) -> str:
    """Operation that made an output."""
    return type(convolution(pixels).grad_fn).__name__


def operators(convolution: nn.Conv2d, pixels: Tensor) -> set[str]:
    """All that took part in an output."""
    found, ahead = set[str](), [convolution(pixels).grad_fn]
    while ahead:
        node = ahead.pop()
        if node:
            found.add(type(node).__name__)
            ahead += [before for before, _ in node.next_functions]
    return found


def test_many_images_that_the_kernel_overlooks_are_multiplied_whole() -> None:
    ours, _ = both(3, 1)
    assert "_WholeBackward" in operators(ours, images(2, 2, 40)) & operators(ours, images(1, 1, 8))
    for size in [(2, 2, 31), (2, 3, 200), (4, 4, 200)]:
        assert "_WindowsBackward" in operators(ours, images(*size).requires_grad_())
    strided, _ = both(3, 2)
    assert "_WindowsBackward" in operators(strided, images(2, 2, 200).requires_grad_())


def test_only_training_on_small_images_differs() -> None:
    ours, theirs = both(3, 1)
    few, many = images(4, 4), images(4, 5)
    assert graph(ours, few) == "PermuteBackward0"
    assert graph(ours, many) == graph(theirs, many)
    assert graph(ours.eval(), few) == graph(theirs, few)
