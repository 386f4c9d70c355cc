"""Duties of every engine: the same weights from the same images, by one rank or two, stopped and resumed or not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, update_bn

from data_pipeline.config import DataConfig
from data_pipeline.loader import IGNORE_LABEL, Batch
from tests.support import warm
from tests.trainer.engine.test_engine import CLASSES, assert_equal, batch, join, normalised, part
from trainer.checkpoint.files import WEIGHTS
from trainer.distributed import DistContext
from trainer.engine.base import Engine
from trainer.engine.config import EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.model.normalize import Normalise
from trainer.optim.optimizer import OptimConfig

DDP = EngineConfig(precision="fp32")
ZERO = [EngineConfig("deepspeed", stage, "fp32") for stage in (0, 1, 2, 3)]
SGD, ADAMW = OptimConfig(lr=0.1, weight_decay=1e-2), OptimConfig(name="adamw", lr=1e-2, weight_decay=1e-2)
LAMB = OptimConfig(name="lamb", lr=1e-2, weight_decay=1e-2)
CLIPPED = OptimConfig(lr=0.1, clip_norm=0.2, accumulate=2)
WEIGHTED = OptimConfig(lr=0.1, class_weights=[0.5 + number for number in range(CLASSES)])
AVERAGED = OptimConfig(lr=0.05, ema_decay=0.9)


class Net(nn.Module):
    """Small, with batch norm, and with one weight so large that ZeRO-3 divides it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 128, 3, stride=4, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 128, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(128)
        self.fc = nn.Linear(128, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(images)))
        logits: Tensor = self.fc(functional.relu(self.bn2(self.conv2(x))).mean(dim=(2, 3)))
        return logits


def net(seed: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net()


def build(cfg: EngineConfig, optim: OptimConfig, ctx: DistContext, module: nn.Module) -> Engine:
    engine = DeepSpeedEngine if cfg.name == "deepspeed" else DdpEngine
    return engine(module, Normalise(DataConfig().mean, DataConfig().std, ctx.device), cfg, optim, ctx)


def possible(optim: OptimConfig) -> list[EngineConfig]:
    return ZERO[:3] if optim.ema_decay else ZERO


def updates(micro_batches: int) -> Iterator[list[Batch]]:
    """Four updates: plain, mixed with soft targets, with unread rows, and the last one short of images."""
    rows = 8 * micro_batches
    for seed, total in enumerate((rows, rows, rows, rows - 5)):
        one = batch(rows, seed, total)
        labels = one.labels.clone()
        labels[total:] = IGNORE_LABEL
        if seed == 1:
            shares = torch.rand(rows, CLASSES, generator=torch.Generator().manual_seed(seed))
            one = one._replace(targets=shares / shares.sum(dim=1, keepdim=True))
        if seed == 2:
            labels[1] = IGNORE_LABEL
        one = one._replace(labels=labels, num_real=total)
        yield [part_of(one, slice(start, start + 8)) for start in range(0, rows, 8)]


def part_of(whole: Batch, rows: slice) -> Batch:
    return part(whole, rows)._replace(targets=None if whole.targets is None else whole.targets[rows])


def train(engine: Engine, ctx: DistContext, micro_batches: int = 1) -> Tensor:
    """[4, 5] sums over all ranks of each update."""
    sums = []
    for number, whole in enumerate(updates(micro_batches)):
        mine = [part_of(one, slice(ctx.rank, None, ctx.world)) for one in whole]
        sums.append(engine.step(mine, 0.02 / (1 + number)))
    return ctx.sum(torch.stack(sums))


def saved(engine: Engine, ctx: DistContext, folder: Path) -> dict[str, Tensor]:
    """Weights and statistics as anybody would read them, from a new `folder`."""
    ctx.run_on_rank0(folder.mkdir)
    engine.capture_state({})(folder)
    ctx.barrier()
    return load_file(folder / WEIGHTS)


def check_weights(ctx: DistContext, folder: Path) -> None:
    """DeepSpeed's weights are DDP's bit for bit where nothing is divided, and else up to the rounding of fp32: torch's
    fused kernels round a flat tensor otherwise than the ends of many, and norms and micro-batches are summed otherwise.
    """
    for optim, name in (
        (SGD, "sgd"),
        (ADAMW, "adamw"),
        (CLIPPED, "clipped"),
        (WEIGHTED, "weighted"),
        (AVERAGED, "averaged"),
    ):
        reference = build(DDP, optim, ctx, net())
        wanted_sums = train(reference, ctx, optim.accumulate)
        wanted = saved(reference, ctx, folder / f"{name} ddp")
        assert not optim.clip_norm or (wanted_sums[:, 4] / ctx.world > optim.clip_norm).all()
        assert wanted_sums[:, 3].tolist() == [8 * optim.accumulate - gone for gone in (0, 0, 1, 5)]
        for cfg in possible(optim):
            engine = build(cfg, optim, ctx, net())
            sums = train(engine, ctx, optim.accumulate)
            torch.testing.assert_close(sums, wanted_sums, rtol=1e-5, atol=1e-6)
            weights = saved(engine, ctx, folder / f"{name} {cfg.zero_stage}")
            for key in wanted:
                rtol, atol = (1e-5, 1e-7) if cfg.zero_stage else (0, 0)
                at = f"{name}, ZeRO-{cfg.zero_stage}, {key}"
                torch.testing.assert_close(weights[key], wanted[key], rtol=rtol, atol=atol, msg=f"{at} differs")


def check_predictions(ctx: DistContext, folder: Path) -> None:
    """By the weights that are saved, or their average, with the statistics that all ranks agree on."""
    images = batch(6, seed=5).images
    for optim in (SGD, AVERAGED):
        for cfg in (DDP, *possible(optim)):
            engine = build(cfg, optim, ctx, net())
            train(engine, ctx)
            engine.sync_buffers()
            logits = engine.predict(images)
            theirs = net(seed=8).eval()
            theirs.load_state_dict(saved(engine, ctx, folder / f"{optim.ema_decay} {cfg.name} {cfg.zero_stage}"))
            with torch.no_grad():
                torch.testing.assert_close(logits, theirs(normalised(images)), rtol=1e-4, atol=1e-5)
            everyone = ctx.gather(logits)
            assert all(torch.equal(one, everyone[0]) for one in everyone)
            assert all(layer.training for layer in engine.module.modules())
            train(engine, ctx)


def check_statistics(ctx: DistContext, folder: Path) -> None:
    """After a few updates of constant weights they are a mean over rank 0's batches alone, by every engine."""
    wanted: dict[str, Tensor] = {}
    for number, (whole,) in enumerate(updates(1), start=1):
        alone = net()
        alone.bn1.momentum = alone.bn2.momentum = 1.0
        alone(normalised(part_of(whole, slice(0, None, ctx.world)).images))
        of_batch = {name: value for name, value in alone.named_buffers() if value.is_floating_point()}
        wanted = {name: wanted.get(name, value).lerp(value, 20 / (number + 19)) for name, value in of_batch.items()}
    for cfg in (DDP, *ZERO):
        engine = build(cfg, SGD, ctx, net())
        for (whole,) in updates(1):
            engine.step([part_of(whole, slice(ctx.rank, None, ctx.world))], lr=0.0)
        found = saved(engine, ctx, folder / f"{cfg.name} {cfg.zero_stage}")
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=f"{cfg.name} {name}")


def check_average(ctx: DistContext, folder: Path) -> None:
    """Of weights it is torch's by every engine, of statistics torch's over the batches of all ranks."""
    optim = replace(SGD, swa=0.5)
    for cfg in (DDP, *ZERO[:3]):
        engine = build(cfg, optim, ctx, net())
        train(engine, ctx)
        engine.average(0, ())
        theirs = AveragedModel(engine.module)
        theirs.update_parameters(engine.module)
        train(engine, ctx)
        theirs.update_parameters(engine.module)
        shares = [
            [part_of(whole, slice(rank, None, ctx.world)) for (whole,) in updates(1)] for rank in range(ctx.world)
        ]
        engine.average(1, shares[ctx.rank])
        update_bn([normalised(one.images) for share in shares for one in share], theirs)
        found = saved(engine, ctx, folder / f"{cfg.name} {cfg.zero_stage}")
        for name, value in theirs.module.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=f"{cfg.name} {name}")


def check_resuming(ctx: DistContext, folder: Path) -> None:
    """A fresh engine that loads what another one saved goes on bit by bit, and saves the same bytes."""
    cases = [(DDP, AVERAGED), (ZERO[0], LAMB), (ZERO[1], AVERAGED), (ZERO[2], ADAMW), (ZERO[3], SGD)]
    for number, (cfg, optim) in enumerate(cases):
        place = folder / f"resuming {number}"
        ctx.run_on_rank0(place.mkdir)
        straight = build(cfg, optim, ctx, net())
        train(straight, ctx)
        saved(straight, ctx, place / "middle")
        resumed = build(cfg, optim, ctx, net(seed=8))
        resumed.load(place / "middle")
        told = [train(engine, ctx) for engine in (straight, resumed)]
        ends = [saved(engine, ctx, place / name) for engine, name in ((straight, "straight"), (resumed, "resumed"))]
        assert_equal(ends[1], ends[0])
        assert torch.equal(*told)
        names = sorted(file.name for file in (place / "straight").iterdir())
        assert names == sorted(file.name for file in (place / "resumed").iterdir())
        shards = [f"optimizer-{rank}.pt" for rank in range(ctx.world if cfg.zero_stage else 1)]
        assert names == ["model.safetensors", *(shards if cfg.name == "deepspeed" else ()), "training.pt"]
        for name in names:
            assert (place / "resumed" / name).read_bytes() == (place / "straight" / name).read_bytes(), name


def prove(rank: int, world: int, folder: Path) -> None:
    if world > 1:
        ctx = join(rank, world, folder)
    else:
        torch.set_num_threads(1)
        ctx = DistContext(torch.device("cpu"), 0, 1, 1)
    for check in (check_weights, check_predictions, check_statistics, check_average, check_resuming):
        ctx.run_on_rank0((folder / check.__name__).mkdir)
        check(ctx, folder / check.__name__)


@pytest.mark.parametrize("world", [1, 2])
def test_engines_do_the_same(world: int, tmp_path: Path) -> None:
    warm.start_ranks(prove, (world, tmp_path), world)
