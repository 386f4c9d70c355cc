"""FLOPs of a network beside torch's own counter, and the speed of a product."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.model.config import ModelConfig
from trainer.model.flops import flops_per_image, matmul_flops_per_s
from trainer.model.network import build_network


def counted_by_torch(cfg: ModelConfig, size_px: int) -> float:
    with torch.device("meta"):
        model, images = build_network(cfg, 7), torch.empty(2, 3, size_px, size_px)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / 2


def test_flops_are_those_that_torch_counts() -> None:
    for cfg in (ModelConfig("resnet18", shortcut="pool"), ModelConfig("resnet50", width=0.5)):
        assert flops_per_image(cfg, 7, 64) == counted_by_torch(cfg, 64)


def test_measuring_draws_no_number_of_the_run() -> None:
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        assert matmul_flops_per_s(torch.device("cpu"), dtype) > 1e7
    assert torch.equal(before, torch.get_rng_state())
