"""The GPU's path on a machine without one: fake tensors, and the calls that an option leads to.

The graph of DALI operators is held to in test_loader.py, tests that need a GPU are marked `gpu`.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from data_pipeline.config import DataConfig
from trainer.engine.compilation import compiled
from trainer.engine.config import EngineConfig
from trainer.engine.precision import resolve_precision
from trainer.model.normalize import Normalise
from trainer.model.resnet import ModelConfig, ModelName, build_resnet
from trainer.optim.optimizer import OptimConfig, OptimizerName, build_optimizer

CUDA = torch.device("cuda")


def on_gpu() -> FakeTensorMode:
    """Tensors without data, which may be said to lie on a GPU that is not there; entered once a network is built."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def network(name: ModelName = "resnet18") -> nn.Module:
    return build_resnet(ModelConfig(name), 10).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_images_go_through_in_channels_last(name: ModelName) -> None:
    """Pixels as the loader hands them out, to logits, without leaving the device or the memory format."""
    layouts: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert output.device.type == "cuda"
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    model = network(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(look)
    with on_gpu():
        model.to(CUDA)
        pixels = torch.zeros(4, 64, 64, 3, dtype=torch.uint8, device=CUDA).permute(0, 3, 1, 2)
        images = Normalise(DataConfig().mean, DataConfig().std, CUDA)(pixels)
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
        logits = model(images)
    assert logits.device.type == "cuda" and logits.shape == (4, 10)
    assert all(layouts) and len(layouts) > 30


@pytest.mark.parametrize("name", ["lars", "lamb", "muon"])
def test_updates_stay_on_the_device(name: OptimizerName) -> None:
    """An update that asked the GPU for a number would make each step wait for it; a fake tensor has none to give."""
    model = network()
    with on_gpu():
        model.to(CUDA)
        optimizer = build_optimizer(model, OptimConfig(name=name, nesterov=False))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert states and all(value.device.type == "cuda" for value in states)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_updates_are_fused(name: OptimizerName) -> None:
    assert build_optimizer(network(), OptimConfig(name=name)).defaults["fused"] is True


def test_what_is_compiled() -> None:
    model = network()
    assert compiled(model, EngineConfig(), CUDA) is not model, "auto, on a GPU"
    assert compiled(model, EngineConfig(compile="off"), CUDA) is model
    assert compiled(model, EngineConfig(), torch.device("cpu")) is model


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_precision_of_a_gpu(bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert resolve_precision("auto", CUDA) == precision
    assert resolve_precision("fp32", CUDA) == "fp32"


def test_the_loss_scale_follows_fp16_alone() -> None:
    """On the CPU, whose scaler is the same code."""
    from tests.trainer.engine.test_engine import build, small_net

    assert build(small_net(), precision="fp16").scaler.is_enabled()
    assert not build(small_net(), precision="bf16").scaler.is_enabled()
