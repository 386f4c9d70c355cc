"""The GPU's path on a machine without one: fake tensors, and the calls that an option leads to.

The graph of DALI operators is held to in test_loader.py, tests that need a GPU are marked `gpu`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.batch import Batch, Places
from data_pipeline.config import DataConfig
from data_pipeline.mixing import Mixing, mix, thin_out
from trainer.check.items.common import CLASSES, MEAN, STD
from trainer.check.items.variants import VARIANTS
from trainer.distributed import DistContext
from trainer.engine.compilation import compiled
from trainer.engine.config import EngineConfig, Precision
from trainer.engine.ddp import DdpEngine
from trainer.engine.precision import resolve_precision
from trainer.model.network import build_network
from trainer.model.normalize import Normalise
from trainer.model.resnet import ModelConfig, ModelName, build_resnet
from trainer.node import clock
from trainer.node.clock import HostClock
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


# ---- whole steps -----------------------------------------------------------------------------------------------------


class HostWaits(TorchDispatchMode):
    """Lists the copies between GPU and CPU for which the host waits. Values that are asked for raise by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, goes_on = args[name == "copy_"], kwargs.get("non_blocking") or args[2:3] == (True,)
            if source.device != result.device and (result.device.type == "cpu" or not goes_on):
                self.seen.append(f"{name} of {list(source.shape)} from {source.device} to {result.device}")
        return result


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let autocast and loss scaling work for a GPU that is not there, and gradients be there without a backward pass."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.amp.grad_scaler, "amp_definitely_not_available", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(clock, "GpuClock", HostClock)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)

    def backward(engine: DdpEngine, loss: Tensor) -> None:
        scaled = engine.scaler.scale(loss)
        assert scaled.device.type == "cuda" and scaled.dtype == torch.float32
        for weight in engine.trained:
            weight.grad = torch.zeros_like(weight)

    monkeypatch.setattr(DdpEngine, "_backward", backward)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # in a copy of a network
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_waits_for_nothing(name: str, pretended: None) -> None:
    """Of each variant that `trainer.check` makes on a GPU: every tensor is there, and none is asked for its values."""
    variant = VARIANTS[name]
    # The fused kernel of SGD has no fake.
    optim = replace(variant.optim, name="adamw") if variant.optim.name == "sgd" else variant.optim
    # Torch's loss scaling waits for optimizers that are not fused.
    precisions: list[Precision] = ["bf16", *(["fp16"] if optim.name == "adamw" else [])]  # type: ignore[list-item]
    for precision in precisions:
        network = build_network(variant.model, CLASSES).to(memory_format=torch.channels_last)
        with on_gpu():
            ctx = DistContext(torch.device("cuda", 0))
            taught = (lambda images: torch.zeros(len(images), CLASSES, device=CUDA)) if variant.taught else None
            cfg = EngineConfig(precision=precision, compile="off")
            engine = DdpEngine(network, Normalise(MEAN, STD, CUDA), cfg, optim, ctx, taught)
            engine.early_statistics._batches = 1  # otherwise read from the network, once
            pixels = torch.zeros(8, 64, 64, 3, dtype=torch.uint8, device=CUDA)
            thinned = thin_out(pixels, 0, 0, 0, 48)
            own, labels = torch.zeros(8, CLASSES, device=CUDA), torch.zeros(8, dtype=torch.long, device=CUDA)
            with HostWaits() as waits:
                images, labels, targets = mix(thinned, labels, own, Mixing(cut=False, share=0.3, y=0.5, x=0.5))
                places = Places(0, 0, np.arange(8))
                batch = Batch(
                    images.permute(0, 3, 1, 2), labels, torch.arange(8), 8, 8, targets, places, variant.multi_label
                )
                for _ in range(2):
                    sums = engine.step([batch], 0.1)
        assert sums.shape == (5,) and sums.device.type == "cuda"
        assert not waits.seen
