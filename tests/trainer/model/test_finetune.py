"""Training a part of a network: what is frozen stays bit for bit, the rest is what torch alone makes of it, and a run that
was stopped before, at or after the unfreezing ends as one that was not."""

import copy
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.loader import Batch
from tests.support import warm
from tests.support.runs import SOLO, TINTS, Job, dotted, images, settings_of, torchvision_network
from tests.trainer.engine.test_engine import CLASSES, assert_equal, batch, join, normalised, part
from trainer.checkpoint.files import STATE, WEIGHTS
from trainer.checkpoint.store import Store
from trainer.config import Config, load
from trainer.distributed import DistContext
from trainer.engine.config import EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.loop import fit
from trainer.model.normalize import Normalise
from trainer.model.pretrained import load_weights_to_start
from trainer.model.resnet import ModelConfig, build_resnet, freeze
from trainer.optim.optimizer import OptimConfig
from trainer.resilience.signals import StopFlag
from trainer.run_config import RunConfig

PLAIN = OptimConfig(lr=0.1, weight_decay=1e-2, nesterov=False, label_smoothing=0.0)
FIRST = ModelConfig(weights="given", freeze_until=2)
"""Two epochs for the head, before all is trained. The weights are loaded by the tests."""


pytestmark = pytest.mark.usefixtures("one_thread")


def pretrained() -> nn.Module:
    """torchvision's network, with running statistics of images like ours."""
    torch.manual_seed(1)
    network: nn.Module = torchvision.models.resnet18(num_classes=CLASSES).train()
    with torch.no_grad():
        for seed in range(20):
            network(normalised(batch(8, 100 + seed).images))
    return network


def engine_of(
    network: nn.Module, model: ModelConfig, optim: OptimConfig = PLAIN, ctx: DistContext = SOLO, **options: Any
) -> DdpEngine:
    ours = build_resnet(model, CLASSES)
    ours.load_state_dict(network.state_dict())
    freeze(ours, model, epoch=100)
    cfg = EngineConfig(**{"precision": "fp32", **options})
    return DdpEngine(ours, Normalise(DataConfig().mean, DataConfig().std, ctx.device), cfg, optim, ctx)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def body(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def loss_of(network: nn.Module, one: Batch) -> Tensor:
    return functional.cross_entropy(network(normalised(one.images)), one.labels)


# What is frozen


@pytest.mark.parametrize(
    ("options", "epoch", "kinds"),
    [
        ({}, 0, {"conv", "norm", "head"}),
        ({"freeze_until": 2}, 0, {"head"}),
        ({"freeze_until": 2}, 1, {"head"}),
        ({"freeze_until": 2}, 2, {"conv", "norm", "head"}),
        ({"freeze_until": 2, "freeze_bn": True}, 1, {"head"}),
        ({"freeze_until": 2, "freeze_bn": True}, 2, {"conv", "head"}),
        ({"head_only": True}, 9, {"head"}),
        ({"freeze_bn": True}, 0, {"conv", "head"}),
    ],
)
def test_what_is_trained_is_a_function_of_the_epoch(options: dict[str, Any], epoch: int, kinds: set[str]) -> None:
    cfg = ModelConfig(weights="given", **options)
    for before in (0, 100):  # whatever the epoch was before
        network = build_resnet(cfg, CLASSES)
        freeze(network, cfg, before)
        freeze(network, cfg, epoch)
        trained = set()
        for layer in network.eval().train().modules():
            kind = {nn.Linear: "head", nn.BatchNorm2d: "norm"}.get(type(layer), "conv")
            trained |= {kind for parameter in layer.parameters(recurse=False) if parameter.requires_grad}
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.training == ("norm" in kinds)
        assert trained == kinds


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "lamb"])
def test_the_head_alone_is_a_linear_layer_on_features(optimizer: Any) -> None:
    """All else stays bit for bit, statistics, average and state of the optimiser included."""
    optim = replace(PLAIN, name=optimizer, ema_decay=0.5)
    theirs = pretrained()
    before = state_of(theirs)
    engine = engine_of(theirs, ModelConfig(weights="given", head_only=True), optim)
    for seed in range(3):
        engine.step([batch(8, seed)], 0.05)
        assert engine.predict(batch(3, 9).images).shape == (3, CLASSES)
    assert engine.ema is not None
    for network in (engine.module, engine.ema.module):
        assert_equal(body(state_of(network)), body(before))
        assert not torch.equal(network.get_parameter("fc.weight"), before["fc.weight"])
    named = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    assert {named[id(parameter)] for parameter in engine.optimizer.state} == {"fc.weight", "fc.bias"}

    if optimizer == "sgd":
        fc = theirs.eval().get_submodule("fc")
        assert isinstance(fc, nn.Linear)
        groups: list[dict[str, Any]] = [{"params": [fc.weight], "weight_decay": 1e-2}, {"params": [fc.bias]}]
        sgd = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        for seed in range(3):
            sgd.zero_grad()
            loss_of(theirs, batch(8, seed)).backward()
            sgd.step()
        torch.testing.assert_close(engine.module.get_parameter("fc.weight"), fc.weight, rtol=1e-4, atol=1e-5)


# Thawing

RATE = 0.002
"""So low that eight updates do not blow rounding up: it makes 2e-6 of a loss, any stage's factor doubled 6e-4 and more."""


def assert_told_the_same(told: list[list[float]], wanted: Tensor) -> None:
    """Losses and gradient norms; of those a ReLU that rounds to the other side of zero makes up to 8e-4, a factor 4e-3."""
    ours = torch.tensor(told)
    torch.testing.assert_close(ours[:, 0], wanted[:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours[:, 1], wanted[:, 1], rtol=2e-3, atol=0)


def in_epochs(engine: DdpEngine, model: ModelConfig, ctx: DistContext = SOLO, epochs: int = 4) -> list[list[float]]:
    """Two updates an epoch, the second of them of two micro-batches; [loss, gradient norm] of each over all ranks."""
    told = []
    for epoch in range(epochs):
        freeze(engine.module, model, epoch)
        for number in range(2):
            whole = batch(16, seed=10 * epoch + number)
            rows = [slice(0, 16)] if number == 0 else [slice(0, 8), slice(8, 16)]
            mine = [part(part(whole, some), slice(ctx.rank, None, ctx.world)) for some in rows]
            sums = ctx.sum(engine.step(mine, RATE))
            told.append([sums[0].item() / 16, sums[4].item() / ctx.world])
    return told


def by_torch(network: nn.Module, scales: list[float]) -> list[list[float]]:
    """The same with torchvision's network and torch's optimiser; batch norm is frozen, and the body for two epochs."""
    network = copy.deepcopy(network).eval()
    convolutions = [name for name, value in network.named_parameters() if value.ndim == 4]
    groups: list[dict[str, Any]] = []
    for name, value in network.named_parameters():
        if name in convolutions or name.startswith("fc."):
            stage = 5 if name.startswith("fc.") else int(name[5]) if name.startswith("layer") else 0
            groups.append({"params": [value], "weight_decay": 1e-2 * (value.ndim > 1), "lr": RATE * scales[stage]})
        else:
            value.requires_grad_(False)
    sgd = torch.optim.SGD(groups, momentum=0.9)
    told = []
    for epoch in range(4):
        for name in convolutions:
            network.get_parameter(name).requires_grad_(epoch >= 2)
        for number in range(2):
            sgd.zero_grad()
            loss = loss_of(network, batch(16, seed=10 * epoch + number))
            loss.backward()
            norms = [value.grad.norm() for value in network.parameters() if value.grad is not None]
            sgd.step()
            told.append([loss.item(), torch.stack(norms).norm().item()])
    return told


def test_the_last_norm_learns_with_the_head() -> None:
    """As by torch alone, with that norm and the head in training; all else stays as it is."""
    theirs = pretrained()
    theirs.get_buffer("layer4.1.bn2.num_batches_tracked").fill_(1000)  # its statistics move as torch's, then
    engine = engine_of(theirs, ModelConfig(weights="given", head_only=True, head_norm=True), PLAIN)
    before, network = state_of(theirs), copy.deepcopy(theirs).eval()
    learning = {name: network.get_submodule(name) for name in ("layer4.1.bn2", "fc")}
    for layer in learning.values():
        layer.train()
    weights = [value for layer in learning.values() for value in layer.parameters()]
    groups = [{"params": [value], "weight_decay": 1e-2 * (value.ndim > 1)} for value in weights]
    sgd = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for seed in range(3):
        images = batch(8, seed)
        engine.step([images], 0.05)
        engine.predict(images.images)
        sgd.zero_grad()
        loss_of(network, images).backward()
        sgd.step()
    ours = state_of(engine.module)
    for name, value in state_of(network).items():
        learns = name.rpartition(".")[0] in learning
        assert learns or torch.equal(ours[name], before[name]), name
        assert not learns or not torch.equal(ours[name], before[name]), name
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_thawing_is_what_torch_does(layer_decay: float, tmp_path: Path) -> None:
    """On one process and on two, where batch norm keeps its statistics: the images then count each for itself."""
    network = pretrained()
    wanted = torch.tensor(by_torch(network, [layer_decay**behind for behind in (5, 4, 3, 2, 1, 0)]))
    model, optim = replace(FIRST, freeze_bn=True), replace(PLAIN, layer_decay=layer_decay)
    engine = engine_of(network, model, optim)
    assert_told_the_same(in_epochs(engine, model), wanted)
    for name, value in network.state_dict().items():
        moved = not torch.equal(engine.module.state_dict()[name], value)
        assert moved == (value.ndim > 1 or name == "fc.bias"), name

    if layer_decay == 1:
        return
    warm.start_ranks(as_one_of_two, (tmp_path, layer_decay), 2)
    ranks = [torch.load(tmp_path / f"rank {rank}", weights_only=True) for rank in range(2)]
    assert_told_the_same(ranks[0]["told"], wanted)
    assert_equal(ranks[1]["state"], ranks[0]["state"])
    assert_equal(ranks[0]["again"], ranks[0]["state"])
    for name, value in engine.module.state_dict().items():
        torch.testing.assert_close(ranks[0]["state"][name], value, rtol=1e-2, atol=1e-4, msg=name)


def as_one_of_two(rank: int, folder: Path, layer_decay: float) -> None:
    ctx = join(rank, 2, folder)
    network = pretrained()
    model, optim = replace(FIRST, freeze_bn=True), replace(PLAIN, layer_decay=layer_decay)
    engine, again = (engine_of(network, model, optim, ctx) for _ in range(2))
    told = in_epochs(engine, model, ctx)
    in_epochs(again, model, ctx)
    saved = {"told": told, "state": state_of(engine.module), "again": state_of(again.module)}
    torch.save(saved, folder / f"rank {rank}")


# Whole runs


STOPS = (3, 5, 8)
"""Updates after which a run is stopped: within the first epoch, when all but the head is frozen, at its end, and after."""
OPTIONS = {"model.freeze_until": "1", "optim.layer_decay": "0.5", "optim.ema_decay": "0", "engine.precision": "fp32"}


def options(base: Path, run: Path, **more: str) -> dict[str, str]:
    """Ten updates in two epochs from weights of torchvision's shape."""
    weights = base / "pretrained.pth"
    if not weights.exists():
        torch.manual_seed(4)
        torch.save(torchvision_network(1000).state_dict(), weights)
    return {**settings_of(base, run, epochs=2), **OPTIONS, "model.weights": str(weights), **more}


def stopped_again_and_again(cfg: Config, ctx: DistContext) -> None:
    for stop in STOPS:
        fit(replace(cfg, run=replace(cfg.run, max_steps=stop)), ctx, StopFlag())
        assert Store(cfg.folder).progress().step == stop
    assert fit(cfg, ctx, StopFlag()).finished


def assert_same_end(run: Path, whole: Path) -> None:
    """Bit by bit, but for how often a name is spelled out in a file."""
    ours, theirs = (folder / "checkpoints/last" for folder in (run, whole))
    assert_equal(load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS))
    states = [torch.load(folder / STATE, weights_only=True) for folder in (ours, theirs)]
    assert flat(states[0]).keys() == flat(states[1]).keys()
    for name, value in flat(states[1]).items():
        same = (
            torch.equal(flat(states[0])[name], value) if isinstance(value, Tensor) else flat(states[0])[name] == value
        )
        assert same, name


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: value for key, child in items for name, value in flat(child, f"{prefix}/{key}").items()}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    images(base)
    return base


def test_stopped_run_of_one_process(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By AdamW, whose state of a weight begins when that is first trained; batch norm stays frozen for good."""
    more = {"model.freeze_bn": "true", "optim.name": "adamw", "optim.lr": "1e-3"}
    whole, run = (load(dotted(options(base, tmp_path / name, **more))) for name in ("whole", "stopped"))
    assert fit(whole, SOLO, StopFlag()).finished
    said = capsys.readouterr().out
    assert f"{whole.model.weights}; its head is for 1000 other classes, so the one for {len(TINTS)} starts anew" in said
    stopped_again_and_again(run, SOLO)
    assert capsys.readouterr().out.count("starting from") == 1, "only the first start reads the weights"
    assert_same_end(run.folder, whole.folder)

    best = load_file(run.folder / "checkpoints/best" / WEIGHTS)
    network = build_resnet(ModelConfig(width=run.model.width), len(TINTS))
    from_run = load_weights_to_start(
        network, ModelConfig(width=run.model.width, weights=str(run.folder)), sorted(TINTS), SOLO
    )
    assert from_run == f"starting from {run.folder}, head included"
    assert_equal(state_of(network), best)


def prove_two_ranks(rank: int, base: Path, folder: Path) -> None:
    ctx = join(rank, 2, folder)
    whole, run = (load(dotted(options(base, folder / name))) for name in ("whole", "stopped"))
    fit(whole, ctx, StopFlag())
    stopped_again_and_again(run, ctx)


@pytest.mark.slow
def test_stopped_run_of_two_ranks(base: Path, tmp_path: Path) -> None:
    """And a killed one."""
    options(base, tmp_path / "first")  # so that the weights are there
    warm.start_ranks(prove_two_ranks, (base, tmp_path), 2)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")

    run = tmp_path / "killed"
    arguments = dotted(options(base, run))
    job = Job(2, tmp_path / "log", "trainer", *arguments)
    job.wait_for_step(run, 7)
    job.kill()
    assert job.process.returncode == -signal.SIGKILL, job.output()
    job = Job(2, tmp_path / "log", "trainer", *arguments)
    assert job.wait() == 0, job.output()
    assert_same_end(run, tmp_path / "whole")


# Refused


@pytest.mark.parametrize("option", [{"freeze_until": 1}, {"head_only": True}, {"freeze_bn": True}])
def test_deepspeed_refuses_to_freeze(option: dict[str, Any]) -> None:
    (name, value), *_ = option.items()
    with pytest.raises(UserError) as error:
        Config(model=ModelConfig(weights="given", **option), engine=EngineConfig("deepspeed"))
    assert str(error.value) == f"model.{name}: {value} is for DDP only; leave it out, or set engine.name to ddp"


def test_an_epoch_must_be_left_for_the_rest() -> None:
    with pytest.raises(
        UserError, match=r"^model\.freeze_until: 3 leaves none of 3 epochs to the rest of the network; "
    ):
        Config(run=RunConfig(epochs=3), model=ModelConfig(weights="given", freeze_until=3))
    Config(run=RunConfig(epochs=4), model=replace(FIRST, freeze_until=3))
