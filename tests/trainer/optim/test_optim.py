"""Schedules, parameter groups, updates and the weight average, against torch's own and hand-written references."""

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from data_pipeline.common.errors import UserError
from trainer.model.resnet import ModelConfig, ModelName, build_resnet
from trainer.optim.config import OptimConfig, OptimizerName, Schedule
from trainer.optim.optimizer import (
    Ema,
    build_optimizer,
    ema_decay_at,
    lr_at,
    parameter_groups,
    set_lr,
)


def curve(cfg: OptimConfig, total_steps: int) -> list[float]:
    return [lr_at(step, cfg, total_steps) for step in range(total_steps)]


# Learning rate


def torch_curve(cfg: OptimConfig, total_steps: int, warmup_steps: int) -> list[float]:
    """The same schedule composed of torch's schedulers, with the warm-up given in updates (2 or more)."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], cfg.lr)
    peak = warmup_steps - 1
    scheduler: lr_scheduler.LRScheduler
    if cfg.schedule == "onecycle":
        scheduler = lr_scheduler.OneCycleLR(
            optimizer,
            cfg.lr,
            total_steps=total_steps + 1,  # the zero comes one past the last update
            pct_start=warmup_steps / (total_steps + 1),
            anneal_strategy="linear",
            cycle_momentum=False,
            div_factor=warmup_steps,
            final_div_factor=1e30,
        )
    else:
        after: dict[str, Callable[[], lr_scheduler.LRScheduler]] = {
            "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0),
            "step": lambda: lr_scheduler.MultiStepLR(
                optimizer, [round(m * total_steps) - peak for m in cfg.milestones], cfg.gamma
            ),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps - peak),
            "polynomial": lambda: lr_scheduler.PolynomialLR(optimizer, total_steps - peak, cfg.power),
        }
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=peak)
        scheduler = lr_scheduler.SequentialLR(optimizer, [rise, after[cfg.schedule]()], milestones=[peak])
    rates = []
    for _ in range(total_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR calls its parts in a way that torch itself deprecates
            scheduler.step()
    return rates


DESCENDING = [schedule for schedule in get_args(Schedule) if schedule != "cyclic"]


@pytest.mark.parametrize("total_steps", [10, 97, 400])
@pytest.mark.parametrize("schedule", DESCENDING)
def test_lr_is_that_of_torchs_schedulers(schedule: Schedule, total_steps: int) -> None:
    cfg = OptimConfig(lr=0.4, schedule=schedule, warmup=0.2)
    expected = torch_curve(cfg, total_steps, warmup_steps=round(0.2 * total_steps))
    assert curve(cfg, total_steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("constant", 0.5, [0.5, 1.0, 1.0, 1.0]),
        ("constant", 1.0, [0.25, 0.5, 0.75, 1.0]),
        ("onecycle", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("onecycle", 0.25, [1.0, 0.75, 0.5, 0.25]),  # one update of warm-up is at the peak at once
        ("onecycle", 0.5, [0.5, 1.0, 2 / 3, 1 / 3]),
        ("onecycle", 1.0, [0.25, 0.5, 0.75, 1.0]),
        ("cosine", 0.0, [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]),
        ("cosine", 0.5, [0.5, 1.0, 0.75, 0.25]),
        ("polynomial", 0.0, [1.0, 9 / 16, 1 / 4, 1 / 16]),
        ("step", 0.25, [1.0, 1.0, 0.1, 0.01]),
        ("step", 0.5, [0.5, 1.0, 0.1, 0.01]),
    ],
)
def test_lr_by_hand(schedule: Schedule, warmup: float, expected: list[float]) -> None:
    cfg = OptimConfig(lr=1.0, schedule=schedule, warmup=warmup, milestones=(0.5, 0.75))
    assert curve(cfg, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 100, 1001])
@pytest.mark.parametrize("warmup", [0.0, 0.004, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("schedule", DESCENDING)
def test_lr_is_positive_bounded_and_has_one_peak(schedule: Schedule, warmup: float, total_steps: int) -> None:
    milestones = () if warmup == 1.0 else (0.3, 0.6, 0.9)
    cfg = OptimConfig(lr=0.3, schedule=schedule, warmup=warmup, milestones=milestones)
    rates = curve(cfg, total_steps)
    peak = max(round(warmup * total_steps) - 1, 0)
    assert all(0 < rate <= cfg.lr for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    # With three updates or fewer a milestone may fall on the very first.
    assert rates[peak] == pytest.approx(cfg.lr) or (schedule == "step" and total_steps <= 3)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
def test_lr_has_no_jump(schedule: Schedule, warmup: float) -> None:
    total_steps = 1000
    rates = curve(OptimConfig(lr=1.0, schedule=schedule, warmup=warmup), total_steps)
    # No line is steeper than the warm-up, or than half a cosine (pi / 2) over what is left.
    steepest = max(1 / (warmup * total_steps or math.inf), math.pi / 2 / ((1 - warmup) * total_steps))
    assert max(abs(b - a) for a, b in pairwise(rates)) <= steepest * (1 + 1e-9)
    if schedule != "constant":
        assert rates[-1] < 2 / ((1 - warmup) * total_steps)


def cyclic(cycles: int) -> OptimConfig:
    return OptimConfig(lr=4e-4, min_lr=2e-4, schedule="cyclic", warmup=0.0, cycles=cycles)


@pytest.mark.parametrize(("cycles", "total_steps"), [(1, 10), (4, 40), (5, 60), (3, 600)])
def test_cycles_are_those_of_torch(cycles: int, total_steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    half = total_steps // cycles // 2
    scheduler = lr_scheduler.CyclicLR(optimizer, 2e-4, 4e-4, step_size_up=half, cycle_momentum=False)
    rates = []
    for _ in range(total_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    assert curve(cyclic(cycles), total_steps) == pytest.approx(rates, rel=1e-9)
    assert max(rates) == pytest.approx(4e-4)


@pytest.mark.parametrize("total_steps", [1, 2, 7, 101])
def test_cycles_stay_in_their_range(total_steps: int) -> None:
    """However few updates there are, and however unevenly they go into the cycles."""
    assert all(2e-4 <= rate <= 4e-4 for rate in curve(cyclic(4), total_steps))
    assert curve(cyclic(4), total_steps)[0] == 2e-4


@pytest.mark.parametrize("schedule", ["cosine", "polynomial", "onecycle"])
@pytest.mark.parametrize(("start", "lowest", "cooldown"), [(0.0, 0.0, 0.0), (0.01, 1e-3, 0.0), (0.05, 0.02, 0.1)])
def test_lr_is_that_of_timm(schedule: Schedule, start: float, lowest: float, cooldown: float) -> None:
    """Warm-up from a value of its own, end at the lowest rate, cool-down: theirs, one step ahead in the warm-up."""
    total_steps, warmup, power = 200, 0.1, 1.7 if schedule == "polynomial" else 1.0
    end = round((1 - cooldown) * total_steps)
    cfg = OptimConfig(
        lr=0.4,
        schedule=schedule,
        warmup=warmup,
        warmup_start=start,
        min_lr=lowest,
        cooldown=cooldown,
        power=power,
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], cfg.lr)
    scheduler, total = create_scheduler_v2(
        optimizer,
        "cosine" if schedule == "cosine" else "poly",
        num_epochs=end - 19,  # from the peak on, which is the last of twenty steps
        cooldown_epochs=total_steps - end,
        min_lr=lowest,
        warmup_lr=start * cfg.lr,
        warmup_epochs=20,
        warmup_prefix=True,
        decay_rate=power,
    )
    rates = []
    for step in range(total_steps):
        scheduler.step(step + 1)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert total == total_steps + 1
    assert curve(cfg, total_steps) == pytest.approx(rates, rel=1e-9)
    assert min(rates[20:]) == pytest.approx(lowest, abs=0.01)


def test_lr_without_the_later_options_keeps_its_bits() -> None:
    """A run of before goes on with the rates that it would have had."""
    for schedule in ("cosine", "onecycle"):
        for total_steps in (7, 1001):
            peak = max(round(0.3 * total_steps) - 1, 0)
            for step, rate in enumerate(curve(OptimConfig(lr=0.3, schedule=schedule, warmup=0.3), total_steps)):
                progress = (step - peak) / (total_steps - peak)
                falling = 0.3 * (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 0.3 * (1 - progress)
                assert rate == (0.3 * (step + 1) / (peak + 1) if step < peak else falling)


def test_lr_outside_the_run_is_our_own_bug() -> None:
    for step in (-1, 10):
        with pytest.raises(AssertionError, match=f"update {step} of 10"):
            lr_at(step, OptimConfig(), 10)


# Parameters


@pytest.mark.parametrize(("name", "decayed", "spared"), [("resnet18", 21, 41), ("resnet50", 54, 107)])
def test_norms_and_biases_do_not_decay(name: ModelName, decayed: int, spared: int) -> None:
    network = build_resnet(ModelConfig(name), 10)
    weights, rest = parameter_groups(network, 5e-4)
    assert (len(weights["params"]), weights["weight_decay"]) == (decayed, 5e-4)
    assert (len(rest["params"]), rest["weight_decay"]) == (spared, 0.0)

    names = {id(parameter): name for name, parameter in network.named_parameters()}
    weight_names = [names[id(p)] for p in weights["params"]]
    rest_names = [names[id(p)] for p in rest["params"]]
    convolutions_and_linears = {
        f"{path}.weight" for path, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert set(weight_names) == convolutions_and_linears
    assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.1.bias", "fc.bias"} <= set(rest_names)
    # Every parameter once, in the network's order: an optimiser's saved state refers to positions.
    order = list(names.values())
    assert sorted(weight_names + rest_names, key=order.index) == order
    assert weight_names == sorted(weight_names, key=order.index)
    assert rest_names == sorted(rest_names, key=order.index)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_stages_are_those_of_timm(name: ModelName) -> None:
    """Its coarse groups are the stem and the stages, with the head left over for the end."""
    theirs = timm.create_model(name, num_classes=10)
    stages = group_parameters(theirs, theirs.group_matcher(coarse=True), reverse=True)
    network = build_resnet(ModelConfig(name), 10)
    groups = parameter_groups(network, 5e-4, layer_decay=0.75)
    assert len(groups) == 12
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    scales = {}
    for group in groups:
        for parameter in group["params"]:
            scales[names[id(parameter)]] = group["scale"]
            assert group["weight_decay"] == (5e-4 if parameter.ndim > 1 else 0)
    assert scales == {key: 0.75 ** (5 - stages[key]) for key in names.values()}


def test_learning_rates_of_stages() -> None:
    optimizer = build_optimizer(build_resnet(ModelConfig(), 10), OptimConfig(layer_decay=0.5))
    set_lr(optimizer, 0.32)
    assert [group["lr"] for group in optimizer.param_groups[::2]] == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]
    for group in optimizer.param_groups:
        del group["scale"]  # as loaded from a checkpoint without
    set_lr(optimizer, 0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


# Updates


def regression(steps: int = 0, cfg: OptimConfig | None = None) -> nn.Linear:
    """A linear layer, after that many updates on a fixed target; the second update has another learning rate."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    inputs, targets = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    optimizer = build_optimizer(layer, cfg or OptimConfig())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.zero_grad()
        ((layer(inputs) - targets) ** 2).sum().backward()
        optimizer.step()
    return layer


RATES = (0.02, 0.01, 0.03)


def regression_gradient(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    nn.Linear(3, 2)
    inputs, targets = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    error = inputs @ weight.T + bias - targets
    return 2 * error.T @ inputs, 2 * error.sum(0)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_sgd_by_hand(momentum: float, nesterov: bool) -> None:
    decay = 0.1
    cfg = OptimConfig(name="sgd", momentum=momentum, nesterov=nesterov, weight_decay=decay)
    start = regression()
    values = [start.weight.detach(), start.bias.detach()]
    velocity = [torch.zeros_like(v) for v in values]
    for lr in RATES:
        gradients = regression_gradient(*values)
        for i, (gradient, rate) in enumerate(zip(gradients, (decay, 0.0), strict=True)):
            gradient = gradient + rate * values[i]
            velocity[i] = momentum * velocity[i] + gradient
            direction = gradient + momentum * velocity[i] if nesterov else velocity[i]
            values[i] = values[i] - lr * direction
    ours = regression(3, cfg)
    torch.testing.assert_close([ours.weight, ours.bias], values, rtol=1e-12, atol=1e-13)


def test_adamw_by_hand() -> None:
    decay, beta1, beta2 = 0.1, 0.8, 0.95
    cfg = OptimConfig(name="adamw", betas=(beta1, beta2), weight_decay=decay)
    start = regression()
    values = [start.weight.detach(), start.bias.detach()]
    mean = [torch.zeros_like(v) for v in values]
    square = [torch.zeros_like(v) for v in values]
    for t, lr in enumerate(RATES, start=1):
        gradients = regression_gradient(*values)
        for i, (gradient, rate) in enumerate(zip(gradients, (decay, 0.0), strict=True)):
            mean[i] = beta1 * mean[i] + (1 - beta1) * gradient
            square[i] = beta2 * square[i] + (1 - beta2) * gradient**2
            root = (square[i] / (1 - beta2**t)).sqrt() + 1e-8
            values[i] = values[i] - lr * rate * values[i] - lr * mean[i] / (1 - beta1**t) / root
    ours = regression(3, cfg)
    torch.testing.assert_close([ours.weight, ours.bias], values, rtol=1e-12, atol=1e-13)


def test_lars_by_hand() -> None:
    """Layer by layer, the step is a thousandth of the weight's norm to that of its gradient; a bias has the plain rule."""
    decay, momentum = 0.1, 0.9
    start = regression()
    values = [start.weight.detach(), start.bias.detach()]
    velocity = [torch.zeros_like(v) for v in values]
    for lr in RATES:
        gradients = regression_gradient(*values)
        for i, (gradient, rate) in enumerate(zip(gradients, (decay, 0.0), strict=True)):
            trust = 1e-3 * values[i].norm() / (gradient.norm() + rate * values[i].norm()) if rate else 1.0
            velocity[i] = momentum * velocity[i] + trust * (gradient + rate * values[i])
            values[i] = values[i] - lr * velocity[i]
    ours = regression(3, OptimConfig(name="lars", momentum=momentum, nesterov=False, weight_decay=decay))
    torch.testing.assert_close([ours.weight, ours.bias], values, rtol=1e-8, atol=1e-9)


def test_lamb_by_hand() -> None:
    """Adam's step, with decay, as long as the weight itself; a bias has Adam's."""
    decay, beta1, beta2 = 0.1, 0.8, 0.95
    start = regression()
    values = [start.weight.detach(), start.bias.detach()]
    mean = [torch.zeros_like(v) for v in values]
    square = [torch.zeros_like(v) for v in values]
    for t, lr in enumerate(RATES, start=1):
        gradients = regression_gradient(*values)
        for i, (gradient, rate) in enumerate(zip(gradients, (decay, 0.0), strict=True)):
            mean[i] = beta1 * mean[i] + (1 - beta1) * gradient
            square[i] = beta2 * square[i] + (1 - beta2) * gradient**2
            update = mean[i] / (1 - beta1**t) / ((square[i] / (1 - beta2**t)).sqrt() + 1e-6) + rate * values[i]
            trust = values[i].norm() / update.norm() if rate else 1.0
            values[i] = values[i] - lr * trust * update
    ours = regression(3, OptimConfig(name="lamb", betas=(beta1, beta2), weight_decay=decay))
    torch.testing.assert_close([ours.weight, ours.bias], values, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_updates_repeat(name: OptimizerName) -> None:
    first, again = (regression(3, OptimConfig(name=name)) for _ in range(2))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)


# Average


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    return layers.double().to(memory_format=torch.channels_last)


def trained_states(network: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    """The whole state after each of that many real updates."""
    optimizer = build_optimizer(network, OptimConfig(lr=0.01))
    states = []
    for step in range(steps):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        network(torch.randn(4, 3, 8, 8).double()).square().mean().backward()
        optimizer.step()
        states.append({key: value.clone() for key, value in network.state_dict().items()})
    return states


def averaged(states: list[dict[str, Tensor]], cfg: OptimConfig) -> Ema:
    network = small_network()
    ema = Ema(network, cfg)
    for step, state in enumerate(states):
        network.load_state_dict(state)
        ema.update(network, step)
    return ema


def test_ema_by_hand() -> None:
    cfg = OptimConfig(ema_decay=0.3)  # reached at the third update: 1/10, 2/11, 3/12, then 0.3
    average = {key: value.clone() for key, value in small_network().state_dict().items()}
    states = trained_states(small_network(), 6)
    for step, state in enumerate(states):
        decay = (0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3)[step]
        for key, value in state.items():
            average[key] = decay * average[key] + (1 - decay) * value if value.is_floating_point() else value
    result = averaged(states, cfg).module.state_dict()
    assert int(result["1.num_batches_tracked"]) == 6
    assert not torch.equal(result["1.running_var"], states[-1]["1.running_var"])
    torch.testing.assert_close(dict(result), average, rtol=1e-12, atol=1e-14)


def test_ema_repeats_and_resumes_from_its_module_alone() -> None:
    cfg = OptimConfig(ema_decay=0.9)
    states = trained_states(small_network(), 6)
    whole = averaged(states, cfg).module.state_dict()
    network = small_network()
    resumed = Ema(network, cfg)
    resumed.module.load_state_dict(averaged(states[:3], cfg).module.state_dict())
    for step in range(3, 6):
        network.load_state_dict(states[step])
        resumed.update(network, step)
    for key, value in averaged(states, cfg).module.state_dict().items():
        assert torch.equal(whole[key], value)
        assert torch.equal(whole[key], resumed.module.state_dict()[key])


def test_ema_leaves_the_network_alone_and_is_for_evaluation_only() -> None:
    network = small_network().train()
    ema = Ema(network, OptimConfig(ema_decay=0.9))
    state = trained_states(network, 1)[0]
    ema.update(network, 0)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())
    assert not any(module.training for module in ema.module.modules())
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    ours = {tensor.data_ptr() for tensor in ema.module.state_dict().values()}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in network.state_dict().values())


def test_ema_keeps_channels_last_memory() -> None:
    network = build_resnet(ModelConfig("resnet18"), 10).to(memory_format=torch.channels_last)
    ema = Ema(network, OptimConfig(ema_decay=0.9))
    ema.update(network, 0)
    strides = [parameter.stride() for parameter in network.parameters()]
    assert [parameter.stride() for parameter in ema.module.parameters()] == strides
    assert ema.module.get_parameter("layer1.0.conv1.weight").is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("every", [1, 3])
def test_ema_is_torchs_averaged_model(every: int) -> None:
    """Fed at every third step, as torchvision does by --model-ema-steps, with the decays of ours; buffers included."""
    cfg = OptimConfig(ema_decay=0.3, ema_steps=every)
    decays = iter((0.1, 2 / 11, 0.25, *[0.3] * 9))

    def avg_fn(average: Tensor, value: Tensor, _: Tensor | int) -> Tensor:
        return torch.lerp(average, value, 1 - decay) if value.is_floating_point() else value

    network = small_network()
    theirs = AveragedModel(network, avg_fn=avg_fn, use_buffers=True)
    theirs.update_parameters(network)  # the first time it copies
    states = trained_states(small_network(), 12)
    for state in states[every - 1 :: every]:
        decay = next(decays)
        network.load_state_dict(state)
        theirs.update_parameters(network)
    ours = averaged(states, cfg).module.state_dict()
    assert int(ours["1.num_batches_tracked"]) == 12
    torch.testing.assert_close(ours, theirs.module.state_dict(), rtol=1e-12, atol=1e-13)


def test_ema_decay_rises_to_its_limit() -> None:
    cfg = OptimConfig(ema_decay=0.99)
    decays = [ema_decay_at(step, cfg) for step in range(2000)]
    assert decays[:3] == [1 / 10, 2 / 11, 3 / 12]
    assert decays == sorted(decays)
    assert decays.index(0.99) == 890  # (1 + 890) / (10 + 890) is 0.99
    assert ema_decay_at(10**9, replace(cfg, ema_decay=0.0)) == 0.0


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lion"}, "optim.name: 'lion' is unknown; choose one of sgd, adamw, lars, lamb, muon"),
        ({"lr": -1}, "optim.lr: -1 is not positive; give a learning rate above 0"),
        ({"lr": 0.0}, "optim.lr: 0.0 is not positive; give a learning rate above 0"),
        ({"lr": math.nan}, "optim.lr: nan is not positive; give a learning rate above 0"),
        ({"momentum": 1.0}, "optim.momentum: 1.0 is out of range; give a number from 0 to below 1"),
        ({"momentum": -0.1}, "optim.momentum: -0.1 is out of range; give a number from 0 to below 1"),
        (
            {"momentum": 0.0},
            "optim.nesterov: True needs a momentum; set optim.momentum above 0 or optim.nesterov to false",
        ),
        ({"betas": (0.9, 1.0)}, "optim.betas: (0.9, 1.0) is out of range; give two numbers from 0 to below 1"),
        ({"betas": (0.9,)}, "optim.betas: (0.9,) is out of range; give two numbers from 0 to below 1"),
        ({"weight_decay": -1e-4}, "optim.weight_decay: -0.0001 is out of range; give 0 or a number above it"),
        (
            {"schedule": "linear"},
            "optim.schedule: 'linear' is unknown; choose one of constant, step, cosine, polynomial, onecycle, cyclic",
        ),
        ({"warmup": 5}, "optim.warmup: 5 is out of range; give a share of the run from 0 to 1"),
        (
            {"milestones": (0.6, 0.3)},
            "optim.milestones: (0.6, 0.3) is not ascending shares of the run between 0 and 1; sort them",
        ),
        (
            {"milestones": (30, 60, 90)},
            "optim.milestones: (30, 60, 90) is not ascending shares of the run between 0 and 1; sort them",
        ),
        (
            {"schedule": "step", "warmup": 0.5},
            "optim.milestones: (0.3, 0.6, 0.9) begins inside the warm-up; start at 0.5 or later, or lower optim.warmup",
        ),
        (
            {"schedule": "cyclic", "min_lr": 1e-3},
            "optim.warmup: 0.2 does not go with the schedule cyclic, which rises by itself; set optim.warmup to 0",
        ),
        (
            {"schedule": "cyclic", "warmup": 0.0},
            "optim.min_lr: 0.0 is out of range; give a learning rate above 0 and at most optim.lr",
        ),
        (
            {"schedule": "cyclic", "warmup": 0.0, "lr": 0.1, "min_lr": 0.2},
            "optim.min_lr: 0.2 is out of range; give a learning rate above 0 and at most optim.lr",
        ),
        ({"min_lr": 0.1}, "optim.min_lr: 0.1 is out of range; give a learning rate above 0 and at most optim.lr"),
        ({"warmup_start": 2.0}, "optim.warmup_start: 2.0 is out of range; give a share of optim.lr from 0 to 1"),
        (
            {"schedule": "constant", "cooldown": 0.1},
            "optim.cooldown: 0.1 does not fit; give cosine, polynomial, onecycle a share of the run that optim.warmup leaves, "
            "others 0",
        ),
        (
            {"schedule": "cosine", "cooldown": 0.1},
            "optim.cooldown: 0.1 would not change the weights at a learning rate of 0; set optim.min_lr above 0",
        ),
        ({"power": 0.0}, "optim.power: 0.0 is not positive; give a power such as 2"),
        ({"cycles": 0}, "optim.cycles: 0 is not positive; give 1 or more cycles in the run"),
        ({"layer_decay": 0.0}, "optim.layer_decay: 0.0 is out of range; give a factor above 0, or 1 for none"),
        ({"layer_decay": 1.1}, "optim.layer_decay: 1.1 is out of range; give a factor above 0, or 1 for none"),
        ({"gamma": 0.0}, "optim.gamma: 0.0 is out of range; give a factor above 0 and at most 1"),
        ({"clip_norm": -1.0}, "optim.clip_norm: -1.0 is out of range; give a norm above 0, or 0 for none"),
        (
            {"class_weights": [1.0, -1.0]},
            "optim.class_weights: [1.0, -1.0] is no list of factors; give a number from 0 for each class, not all 0",
        ),
        ({"label_smoothing": 1.0}, "optim.label_smoothing: 1.0 is out of range; give a share from 0 to below 1"),
        ({"ema_decay": 1.0}, "optim.ema_decay: 1.0 is out of range; give a decay below 1, or 0 for no average"),
        ({"ema_steps": 0}, "optim.ema_steps: 0 is not positive; give a number of optimizer steps"),
        (
            {"binary_threshold": 1.0},
            "optim.binary_threshold: 1.0 is out of range; give a share from 0 to below 1, or null for none",
        ),
        ({"sam_radius": -1.0}, "optim.sam_radius: -1.0 is out of range; give a length above 0, or 0 for none"),
        ({"sam_steps": 0}, "optim.sam_steps: 0 is not positive; give a number of optimizer steps"),
        ({"swa": 2.0}, "optim.swa: 2.0 is out of range; give a share of the run from 0 to 1"),
        ({"swa": 0.5, "ema_decay": 0.9}, "optim.swa: 0.5 does not go with optim.ema_decay; choose one average"),
        ({"accumulate": 0}, "optim.accumulate: 0 is not positive; give 1 or more micro-batches per optimizer step"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        OptimConfig(**options)
    assert str(caught.value) == message


def test_the_edges_of_every_range_are_accepted() -> None:
    cfg = OptimConfig(momentum=0, nesterov=False, weight_decay=0, warmup=1, milestones=(), gamma=1, label_smoothing=0)
    assert cfg.betas == (0.9, 0.999)
    assert OptimConfig(name="adamw", momentum=0.0, betas=(0.0, 0.0)).nesterov  # SGD's options are not AdamW's concern
    assert OptimConfig(schedule="step", warmup=0.3).milestones[0] == 0.3


def test_no_optimizer_imports_the_compiler() -> None:
    """torch's own do, to keep it out of their methods; that costs a start two seconds and more."""
    program = """
import sys, torch
from trainer.optim.optimizer import OptimConfig, build_optimizer
from trainer.model.resnet import ModelConfig, build_resnet
with torch.device("meta"):
    build_resnet(ModelConfig(), 5)
network = build_resnet(ModelConfig(width=0.125, zero_init_gamma=True), 5)
for name in ("sgd", "adamw", "muon"):
    optimizer = build_optimizer(network, OptimConfig(name=name))
    network(torch.ones(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
