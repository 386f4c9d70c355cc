"""Muon: against singular values, timm's Muon and torch's AdamW."""

import copy
from functools import partial
from typing import Any

import pytest
import timm.optim.muon
import torch
from timm.optim.muon import Muon as TimmMuon
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.model.resnet import ModelConfig, build_resnet
from trainer.optim.muon import MOST_NUMBERS, QUINTIC, RMS, STEPS, Muon, batches, orthogonal
from trainer.optim.optimizer import OptimConfig, build_optimizer, muon_groups, set_lr


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_singular_values_follow_the_polynomial(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    a, b, c = QUINTIC
    for _ in range(STEPS):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonal(matrix[None])[0], left * values @ right)


def test_a_rounded_one_is_as_orthogonal() -> None:
    matrix = torch.randn(64, 576, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, rounded = (
        torch.linalg.svdvals(orthogonal(matrix[None].to(dtype))[0].double())
        for dtype in (torch.float64, torch.bfloat16)
    )
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)
    assert exact.min() > 0.5 and exact.max() < 1.3


def test_a_matrix_of_zeros_stays() -> None:
    assert not orthogonal(torch.zeros(1, 3, 5)).any()


def test_a_matrix_in_a_batch_is_as_by_itself() -> None:
    matrices = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonal(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonal(matrices), alone, rtol=1e-5, atol=1e-6)


def test_weights_of_one_shape_go_together() -> None:
    weights = list(build_resnet(ModelConfig("resnet50"), 10).parameters())
    taken = list(batches(weights))
    assert sorted(id(weight) for batch in taken for weight in batch) == sorted(map(id, weights))
    for batch in taken:
        assert len({weight.shape for weight in batch}) == 1
        assert len(batch) == 1 or sum(weight.numel() for weight in batch) <= MOST_NUMBERS


class Count(TorchDispatchMode):
    """Counts the operations that start kernels: all that give more than another view of a tensor."""

    kernels = 0

    def __torch_dispatch__(
        self, function: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        views = any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns)
        self.kernels += function.namespace == "aten" and not views and "empty" not in function.__name__
        return function(*args, **kwargs or {})


def test_a_step_starts_few_kernels() -> None:
    """On a GPU, by tensors without data: some 2,000 were started when each weight was moved by itself."""
    network = build_resnet(ModelConfig("resnet50"), 1000).to(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to("cuda")
        optimizer = build_optimizer(network, OptimConfig(name="muon"), torch.bfloat16)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with Count() as count:
            optimizer.step()
    assert 100 < count.kernels < 600


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    for step in range(steps):
        set_lr(optimizer, 0.02 / (step + 1))
        network(torch.randn(16, 3, 8, 8, generator=draws)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("nesterov", [True, False])
def test_weights_are_those_of_timm(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    in_fp32 = partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)  # by itself it rounds to bf16
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", in_fp32)
    ours, theirs = small(), small()
    cfg = OptimConfig(name="muon", momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    reference = TimmMuon(
        [{"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1}],
        momentum=0.9,
        nesterov=nesterov,
        ns_steps=STEPS,
        ns_coefficients="original",
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [{"params": [p for p in ours.parameters() if p.ndim > 1], "weight_decay": 0.1, "orthogonal": True}]
    optimizer = Muon(groups, 0.02, 0.9, cfg.betas, nesterov=nesterov, dtype=torch.float32)
    torch.testing.assert_close(train(ours, optimizer), train(theirs, reference), rtol=1e-3, atol=1e-5)


def test_the_rest_is_torchs_adamw() -> None:
    ours, theirs = small(), small()
    options = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}
    reference = torch.optim.AdamW(theirs.parameters(), **options)  # type: ignore[arg-type]
    groups = [{"params": list(ours.parameters()), "weight_decay": 0.1}]
    optimizer = Muon(groups, 0.02, 0.9, (0.8, 0.95), nesterov=True, dtype=torch.float32)
    torch.testing.assert_close(train(ours, optimizer), train(theirs, reference), rtol=1e-4, atol=1e-6)


def test_memory_layout_does_not_matter() -> None:
    plain, last = small(), small().to(memory_format=torch.channels_last)
    networks = [
        train(
            network,
            Muon(
                [{"params": list(network.parameters())[:1], "orthogonal": True}],
                0.02,
                0.9,
                (0.9, 0.99),
                nesterov=True,
                dtype=torch.float32,
            ),
        )
        for network in (plain, last)
    ]
    torch.testing.assert_close(networks[0], networks[1], rtol=1e-3, atol=1e-4)


def test_an_update_is_as_long_as_adamws() -> None:
    layer = nn.Conv2d(8, 16, 3, bias=False)
    before = layer.weight.detach().clone()
    optimizer = Muon(
        [{"params": [layer.weight], "orthogonal": True}], 1.0, 0.9, (0.9, 0.99), nesterov=True, dtype=torch.float32
    )
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    assert (layer.weight.detach() - before).square().mean().sqrt() == pytest.approx(RMS, rel=0.4)


def test_head_norms_and_biases_are_the_rest() -> None:
    network = build_resnet(ModelConfig(), 10)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = muon_groups(network, 0.1)
    rest = {names[id(p)] for group in groups if not group["orthogonal"] for p in group["params"]}
    assert rest == {name for name, p in network.named_parameters() if p.ndim == 1 or name == "fc.weight"}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {group["weight_decay"] for group in groups if group["orthogonal"]} == {0.1}
    staged = muon_groups(network, 0.1, layer_decay=0.5)
    assert {group["scale"] for group in staged} == {0.5**n for n in range(6)}


def test_a_restored_one_goes_on_bit_for_bit() -> None:
    cfg = OptimConfig(name="muon", lr=0.02)
    whole, halted = small(), small()
    expected = train(whole, build_optimizer(whole, cfg), steps=5)
    first = build_optimizer(halted, cfg)
    draws = torch.Generator().manual_seed(1)
    for step in range(5):
        if step == 2:
            state = copy.deepcopy(first.state_dict())
            first = build_optimizer(halted, cfg)
            first.load_state_dict(state)
        set_lr(first, 0.02 / (step + 1))
        halted(torch.randn(16, 3, 8, 8, generator=draws)).square().mean().backward()
        first.step()
        first.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(expected, halted.parameters(), strict=True))
