"""Floating-point operations of a network: what an image costs in training, and what a device does at best."""

import time

import torch
from torch import Tensor, nn

from trainer.model.config import ModelConfig
from trainer.model.network import build_network

_LONG_ENOUGH_S = 0.0015  # of a product: a larger one gains little
_LARGEST = 8192  # side of a matrix: 0.5 GiB in all, in bf16


def flops_per_image(cfg: ModelConfig, classes: int, size_px: int) -> float:
    """Count the FLOPs of forward and backward pass for one image: two for each multiplication with its addition.

    Convolutions and linear layers count, and not the products of attention. Touches no weights and draws nothing.
    """
    with torch.device("meta"):
        model = build_network(cfg, classes).eval()
    # On the CPU, with zeros: a pass on the device meta would import `torch._dynamo`, for more than a second.
    for module in model.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(torch.zeros(weight.shape), requires_grad=False))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    counted: list[int] = []

    def count(layer: nn.Module, _: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        places = result.shape[1:-1] if isinstance(layer, nn.Linear) else result.shape[2:]
        forward = 2 * layer.weight.numel() * places.numel()
        # The backward pass has a product for the weights, and one for the input, which the first layer does not need.
        counted.append(forward * (3 if counted else 2))

    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, size_px, size_px))
    return float(sum(counted))


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a product of two square matrices, on the threads and in the dtype of a run; some 0.05 s.

    The matrices grow until a product takes long enough to be measured. No random number of the run is drawn.
    """
    draw, best, side = torch.Generator(device).manual_seed(0), 0.0, 512
    while True:
        left, right = torch.empty(2, side, side, device=device, dtype=dtype).uniform_(-1, 1, generator=draw).unbind()
        product = torch.empty_like(left)
        taken_s = min(_seconds(left, right, product) for _ in range(3))
        best = max(best, 2 * side**3 / taken_s)
        if taken_s > _LONG_ENOUGH_S or side >= _LARGEST:
            return best
        side *= 2


def _seconds(left: Tensor, right: Tensor, product: Tensor) -> float:
    start_s = time.perf_counter()
    torch.mm(left, right, out=product)
    if product.is_cuda:
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - start_s
