"""Stems, attention and activations that torchvision lacks, against timm's networks; and random depth."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.common.errors import UserError
from trainer.model.resnet import ModelConfig, build_resnet

CLASSES = 10
D = {"stem": "deep", "shortcut": "pool"}  # ResNet-D


pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits in training, the gradient of each parameter, and the running statistics behind it."""
    logits = network.train()(images)
    loss = functional.cross_entropy(logits, torch.arange(len(images)))
    return [logits.detach(), *torch.autograd.grad(loss, list(network.parameters())), *network.buffers()]


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ({"name": "resnet18", **D}, "resnet18d", {}),
        ({"name": "resnet18", "attention": "se"}, "seresnet18", {}),
        ({"name": "resnet18", "attention": "eca", **D}, "resnet18d", {"block_args": {"attn_layer": "eca"}}),
        pytest.param({"name": "resnet50", **D}, "resnet50d", {}, marks=pytest.mark.slow),
        pytest.param({"name": "resnet50", "attention": "se"}, "seresnet50", {}, marks=pytest.mark.slow),
        ({"name": "resnet50", "attention": "eca", **D}, "ecaresnet50d", {}),
        ({"name": "resnet18", "activation": "gelu"}, "resnet18", {"act_layer": "gelu"}),
        pytest.param(
            {"name": "resnet50", "activation": "silu", "attention": "se", **D},
            "seresnet50",
            {"act_layer": "silu"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_blocks_are_timms(ours: dict[str, Any], theirs: str, options: dict[str, Any]) -> None:
    """The same names, logits, gradients and statistics, in double precision: rounded values may fall on zero's other side."""
    torch.manual_seed(0)
    network = build_resnet(ModelConfig(**ours), CLASSES).double()
    if "activation" in ours and "stem" in ours:
        options = {**options, "stem_type": "deep", "stem_width": 32, "avg_down": True}
    reference = timm.create_model(theirs, num_classes=CLASSES, **options).double()
    state = {name: value for name, value in network.state_dict().items() if name != ours.get("activation")}
    assert list(state) == list(reference.state_dict())
    reference.load_state_dict(state)
    images = torch.randn(3, 3, 40, 33, dtype=torch.float64)
    got = [value for value in gradients(network, images) if value.is_floating_point()]
    expected = [value for value in gradients(reference, images) if value.is_floating_point()]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_weights_of_another_activation_do_not_load() -> None:
    """Nothing else in them tells."""
    relu, gelu = (build_resnet(ModelConfig(activation=kind), CLASSES) for kind in ("relu", "gelu"))
    for one, other in ((relu, gelu), (gelu, relu)):
        with pytest.raises(RuntimeError, match="gelu"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "d"}, "model.stem: 'd' is unknown; choose one of conv, deep, patch"),
        ({"attention": "cbam"}, "model.attention: 'cbam' is unknown; choose one of none, se, eca"),
        ({"activation": "mish"}, "model.activation: 'mish' is unknown; choose one of relu, gelu, silu"),
    ],
)
def test_unknown_blocks_are_users_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig(**options)
    assert str(error.value) == message
