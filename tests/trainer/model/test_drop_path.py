"""Stochastic depth: what torchvision and timm compute, drawn from the places of the samples alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.batch import Batch, Places
from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sharding import RankInfo
from tests.support import warm
from tests.support.runs import SOLO, checkpoint, dotted, images, settings_of
from tests.trainer.engine.test_engine import join
from trainer.config import load
from trainer.distributed import DistContext
from trainer.engine.config import EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.loop import fit
from trainer.model.drop_path import DropPath, draw_paths, drop_paths
from trainer.model.resnet import ModelConfig, build_resnet
from trainer.optim.config import OptimConfig
from trainer.resilience.signals import StopFlag

RATE = 0.5
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    images(base)
    return base


def places(*positions: int, epoch: int = 0, seed: int = 0) -> Places:
    return Places(seed, epoch, np.array(positions))


def factors(network: nn.Module, where: Places) -> Tensor:
    """[layers, B] as drawn."""
    layers = drop_paths(network)
    draw_paths(layers, where, CPU)
    return torch.stack([layer.factors for layer in layers if layer.factors is not None])


class Noted(nn.Module):
    """A drop path of another program, with our draw."""

    def __init__(self, of: DropPath) -> None:
        super().__init__()
        self.of = of

    def forward(self, branch: Tensor) -> Tensor:
        assert self.of.factors is not None
        return branch * self.of.factors.to(branch)[:, None, None, None]


def test_rates_and_their_place_are_timms() -> None:
    """Logits and gradients are equal where both have the same draw."""
    torch.manual_seed(0)
    ours = build_resnet(ModelConfig("resnet18", drop_path=RATE, attention="se"), 10).double()
    theirs = timm.create_model("seresnet18", num_classes=10, drop_path_rate=RATE).double()
    theirs.load_state_dict(ours.state_dict())
    named = dict(ours.named_modules())
    rates = {name: m.drop_prob for name, m in theirs.named_modules() if isinstance(m, timm.layers.DropPath)}
    assert {name: m.rate for name, m in named.items() if isinstance(m, DropPath)} == pytest.approx(rates)
    assert factors(ours, places(*range(6))).unique().numel() > 6  # each layer has a factor of its own
    for name in rates:
        layer = named[name]
        assert isinstance(layer, DropPath)
        theirs.set_submodule(name, Noted(layer))
    pixels = torch.randn(6, 3, 40, 40, dtype=torch.float64)
    results = []
    for network in (ours, theirs):
        logits = network.train()(pixels)
        loss = functional.cross_entropy(logits, torch.arange(6))
        results.append([logits, *torch.autograd.grad(loss, list(network.parameters()))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_a_layer_is_torchvisions() -> None:
    layer = DropPath(0.3)
    draw_paths([layer], places(*range(4000)), CPU)
    branch = torch.ones(4000, 2, 1, 1)
    ours = layer(branch.clone())
    theirs = torchvision.ops.stochastic_depth(branch, 0.3, "row")
    assert torch.equal(ours.unique(), theirs.unique())
    assert float(ours.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(branch), branch)


def test_draws_follow_from_the_place_alone() -> None:
    network = build_resnet(ModelConfig("resnet152", drop_path=RATE, width=0.01), 3)
    table = factors(network, places(*range(100)))
    assert table.shape == (49, 100)
    assert torch.equal(factors(network, places(3, 17, 98)), table[:, [3, 17, 98]])
    for other in (places(*range(100), epoch=1), places(*range(100), seed=1)):
        assert not torch.equal(factors(network, other), table)
    # Blocks and images have draws of their own.
    dropped = (factors(network, places(*range(5000))) == 0).numpy()
    np.testing.assert_allclose(dropped.mean(axis=1), [RATE * n / 49 for n in range(1, 50)], atol=0.03)
    apart = np.corrcoef(dropped[-6:]) - np.eye(6)
    assert abs(apart).max() < 0.06
    assert abs(np.corrcoef(dropped[-1, :-1], dropped[-1, 1:])[0, 1]) < 0.06


def test_ranks_share_the_draws_out(base: Path) -> None:
    """Each image has the same, whatever the number of ranks and wherever they begin."""

    def drawn(world: int) -> dict[tuple[int, int], list[float]]:
        found = {}
        network = build_resnet(ModelConfig(drop_path=RATE, width=0.1), 7)
        for rank in range(world):
            cfg = DataConfig(path=str(images(base)), batch=12, size_px=32)
            for batch in Loader(cfg, None, RankInfo(CPU, rank, world), seed=5, epochs=1):
                assert batch.places
                columns = factors(network, batch.places).T.tolist()
                for row in range(batch.num_real):
                    found[int(batch.places.positions[row]), int(batch.ids[row])] = columns[row]
        return found

    assert len(drawn(1)) == 57 and drawn(1) == drawn(2)
    (batch, *_) = Loader(DataConfig(path=str(images(base)), batch=12, size_px=32), training=False)
    assert batch.places is None


def test_pieces_of_a_batch_have_its_draws() -> None:
    """As `engine.fit_memory` cuts it."""
    network = build_resnet(ModelConfig(drop_path=RATE, width=0.1), 3)
    engine = DdpEngine(network, nn.Identity(), EngineConfig(), OptimConfig(), SOLO)
    engine.pieces[8, 32] = 3
    batch = Batch(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64), torch.arange(8), 8, 8)
    seen: list[Tensor] = []
    last = drop_paths(network)[-1]
    last.register_forward_hook(lambda *_: seen.append(last.factors) if last.factors is not None else None)
    engine.step([batch._replace(places=places(*range(10, 18)))], 0.1)
    assert [len(part) for part in seen] == [3, 3, 2]
    assert torch.equal(torch.cat(seen), factors(network, places(*range(10, 18)))[-1])


def stopped(base: Path, folder: Path, ctx: DistContext) -> None:
    """Train five steps whole, and again with a stop after the third, within the epoch."""
    for name in ("whole", "run"):
        settings = settings_of(base, folder / name, epochs=1) | {"model.drop_path": "0.4"}
        cfg = load(dotted(settings))
        if name == "run":
            fit(replace(cfg, run=replace(cfg.run, max_steps=3)), ctx, StopFlag())
        assert fit(cfg, ctx, StopFlag()).finished


def test_a_resumed_run_ends_with_the_same_bits(base: Path, tmp_path: Path) -> None:
    stopped(base, tmp_path, SOLO)
    whole, run = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "run")
    for name in ("model.safetensors", "training.pt"):
        assert whole[name] == run[name]


def prove_two_ranks(rank: int, base: Path, folder: Path) -> None:
    stopped(base, folder, join(rank, 2, folder))


@pytest.mark.slow
def test_two_ranks_resume_with_the_same_bits(base: Path, tmp_path: Path) -> None:
    warm.start_ranks(prove_two_ranks, (base, tmp_path), 2)
    assert checkpoint(tmp_path / "whole") == checkpoint(tmp_path / "run")


@pytest.mark.slow
def test_new_draws_compile_nothing_anew() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    network = build_resnet(ModelConfig(drop_path=RATE, width=0.1), 3)
    compiled = torch.compile(network, backend=counter, dynamic=False)
    for start in (0, 8, 16):
        draw_paths(drop_paths(network), places(*range(start, start + 8)), CPU)
        expected = network(torch.ones(8, 3, 32, 32))
        # Their kernels may differ; a path that is dropped in one of them alone changes more than rounding does.
        torch.testing.assert_close(compiled(torch.ones(8, 3, 32, 32)), expected, rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 1


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_out_of_range_is_a_users_mistake(rate: float) -> None:
    with pytest.raises(UserError, match=r"^model\.drop_path: .* is out of range; give a share from 0 to below 1$"):
        ModelConfig(drop_path=rate)
