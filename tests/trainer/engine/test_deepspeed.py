"""The engine deepspeed by itself: precision, memory layout, what it refuses; and whole runs from the command line."""

import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from tests.support import warm
from tests.support.runs import SOLO, Job, checkpoint, dotted, environment, rows, settings_of
from tests.trainer.engine.test_contract import ADAMW, CLIPPED, DDP, SGD, ZERO, build, net, saved, train
from tests.trainer.engine.test_engine import assert_equal, batch, join, small_net
from trainer.checkpoint.files import STATE, WEIGHTS, load_state
from trainer.checkpoint.store import Store
from trainer.distributed import DistContext
from trainer.engine.base import Engine
from trainer.engine.config import EngineConfig, Precision
from trainer.engine.ddp import DdpEngine
from trainer.engine.deepspeed import DeepSpeedEngine, check_deepspeed
from trainer.engine.optimizer_state import adopt, groups_of, read_whole
from trainer.optim.optimizer import OptimConfig, build_optimizer


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.mark.parametrize(
    ("cfg", "optim", "wanted"),
    [
        (ZERO[0], OptimConfig(sam_radius=0.5), "optim.sam_radius: 0.5 is for DDP only"),
        (ZERO[3], OptimConfig(swa=0.5), "optim.swa: 0.5 needs whole weights"),
        (ZERO[3], OptimConfig(ema_decay=0.9), "optim.ema_decay: 0.9 needs whole weights"),
        (ZERO[1], OptimConfig(name="lars"), "optim.name: lars needs whole weights"),
        (ZERO[2], OptimConfig(name="lamb"), "optim.name: lamb needs whole weights"),
        (replace(ZERO[3], compile="on"), SGD, "engine.compile: on does not work with ZeRO-3"),
        (replace(ZERO[0], compression="bf16"), SGD, "engine.compression: bf16 is for DDP only"),
        (replace(ZERO[0], sync_bn=True), SGD, "engine.sync_bn: it is for DDP only"),
    ],
)
def test_what_cannot_be_is_refused(cfg: EngineConfig, optim: OptimConfig, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        check_deepspeed(cfg, optim)
    check_deepspeed(replace(cfg, name="ddp"), optim)


@pytest.mark.parametrize("optim", [OptimConfig(name="lars"), OptimConfig(name="lamb", ema_decay=0.9), CLIPPED])
def test_what_can_be_is_not(optim: OptimConfig) -> None:
    check_deepspeed(ZERO[0], optim)


def in_a_process_of_its_own(rank: int, folder: Path) -> None:
    """DeepSpeed keeps a process group for as long as the process lives, and so it shall not be that of the tests."""
    torch.set_num_threads(1)
    for check in (check_low_precision, check_overflow, check_layout, check_what_is_loaded):
        (folder / check.__name__).mkdir()
        check(folder / check.__name__)


def test_one_process(tmp_path: Path) -> None:
    warm.start_ranks(in_a_process_of_its_own, (tmp_path,), 1)


def parameters(engine: Engine) -> dict[str, Tensor]:
    with engine.whole_weights() if isinstance(engine, DeepSpeedEngine) else nullcontext():
        return {name: value.detach().clone() for name, value in engine.module.named_parameters()}


def zero(stage: int, optim: OptimConfig, module: nn.Module, precision: Precision = "fp32") -> DeepSpeedEngine:
    engine = build(replace(ZERO[stage], precision=precision), optim, SOLO, module)
    assert isinstance(engine, DeepSpeedEngine)
    return engine


def check_low_precision(folder: Path) -> None:
    """As DDP has it: weights and logits in fp32, and the arithmetic the same."""
    precisions: list[Precision] = ["bf16", "fp16"]
    for precision in precisions:
        reference = build(replace(DDP, precision=precision), CLIPPED, SOLO, small_net())
        wanted = train(reference, SOLO, 2)
        for stage in range(4):
            engine = zero(stage, CLIPPED, small_net(), precision)
            torch.testing.assert_close(train(engine, SOLO, 2), wanted, rtol=1e-4, atol=1e-6)
            assert engine.predict(batch(4).images).dtype == torch.float32
            torch.testing.assert_close(engine.predict(batch(4).images), reference.predict(batch(4).images))
            for name, value in parameters(engine).items():
                assert value.dtype == torch.float32
                torch.testing.assert_close(value, reference.module.get_parameter(name), rtol=1e-4, atol=1e-6)


def check_overflow(folder: Path) -> None:
    """fp16 leaves out an update that overflows, halves its scale and goes on; it resumes with the scale it had."""
    for stage in range(4):
        engine = zero(stage, SGD, small_net(), "fp16")
        before, scale = parameters(engine), engine.scale
        huge = batch(8)._replace(total=1e-30)  # type: ignore[arg-type]
        assert not torch.isfinite(engine.step([huge], 0.1)[4])
        assert_equal(parameters(engine), before)
        assert engine.scale == scale / 2
        engine.clean_updates = 1999
        assert torch.isfinite(engine.step([batch(8)], 0.1)).all()
        assert not torch.equal(parameters(engine)["fc.weight"], before["fc.weight"])
        assert (engine.scale, engine.clean_updates) == (scale, 0), "it is tried higher after so many updates"
        engine.scale = 4.0
        place = folder / str(stage)
        place.mkdir()
        engine.capture_state({})(place)
        scales: list[tuple[Precision, float]] = [("fp16", 4.0), ("fp32", 1.0)]
        for precision, wanted in scales:
            resumed = zero(stage, SGD, small_net(), precision)
            resumed.load(place)
            assert resumed.scale == wanted
            assert_equal(parameters(resumed), parameters(engine))


def check_layout(folder: Path) -> None:
    """Maps in the network are channels-last at every stage, whatever DeepSpeed makes of the weights."""
    for stage in range(4):
        engine = zero(stage, SGD, net())
        maps: list[bool] = []

        def look(layer: nn.Module, given: tuple[Tensor], result: Tensor, maps: list[bool] = maps) -> None:
            maps.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (given[0], result))

        for layer in engine.module.modules():
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                layer.register_forward_hook(look)
        for update in range(2):
            engine.step([batch(4, update)], 0.01)
        engine.predict(batch(4).images)
        assert maps == [True] * (3 * 2 * 4)
        if stage == 0:
            moments = [state["momentum_buffer"] for state in engine.optimizer.state.values()]
            weights = [x for x in (*engine.module.parameters(), *moments) if x.ndim == 4]
            assert len(weights) == 2 * 2
            assert all(x.is_contiguous(memory_format=torch.channels_last) for x in weights)


def check_what_is_loaded(folder: Path) -> None:
    """Every engine goes on from every other's checkpoint."""
    reference = give(SOLO, folder, ADAMW)
    for giver in (DDP, *ZERO):
        for taker in (DDP, *ZERO):
            check_taking(SOLO, place_of(folder, ADAMW, giver), ADAMW, taker, reference)


def place_of(folder: Path, optim: OptimConfig, engine: EngineConfig) -> Path:
    return folder / f"{optim.name} of {engine.name} {engine.zero_stage}"


def give(ctx: DistContext, folder: Path, optim: OptimConfig) -> DdpEngine:
    """Train and save by each engine. Returns DDP's, in which each moment belongs to a parameter."""
    engines = {cfg: build(cfg, optim, ctx, net()) for cfg in (DDP, *ZERO)}
    for cfg, engine in engines.items():
        train(engine, ctx)
        saved(engine, ctx, place_of(folder, optim, cfg))
    reference = engines[DDP]
    assert isinstance(reference, DdpEngine)
    return reference


def check_taking(ctx: DistContext, place: Path, optim: OptimConfig, taker: EngineConfig, reference: DdpEngine) -> None:
    """An engine that loads the checkpoint in `place` has its weights to the bit, and the reference's moments, and trains."""
    resumed = build(taker, optim, ctx, net(seed=8))
    resumed.load(place)
    again = place.with_name(f"{place.name} by {taker.name} {taker.zero_stage} of {ctx.world}")
    assert_equal(saved(resumed, ctx, again), load_file(place / WEIGHTS))
    state = load_state(again / STATE, ctx.device)
    kept = read_whole(again, state, groups_of(reference.module, reference.optimizer), ctx.device)
    for name, parameter in reference.module.named_parameters():
        theirs = reference.optimizer.state[parameter]
        assert theirs and kept[name].keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(kept[name][key], value, rtol=1e-4, atol=1e-6, msg=f"{again}: {key} of {name}")
    assert torch.isfinite(resumed.step([batch(4, ctx.rank)], 0.01)).all()


def test_each_parameter_counts_its_own_steps() -> None:
    """ZeRO has one count for a group; were it the same tensor in all parameters, a step would add one for each of them."""
    module, count = small_net(), torch.tensor(5.0)
    optimizer = build_optimizer(module, ADAMW)
    names = dict(module.named_parameters())
    zeros = {name: {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")} for name, p in names.items()}
    adopt(optimizer, {name: {"step": count, **kept} for name, kept in zeros.items()}, names)
    for parameter in names.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in names.values()] == [6.0] * len(names)


def give_by_two(rank: int, folder: Path) -> None:
    ctx = join(rank, 2, folder)
    ctx.run_on_rank0((folder / "two").mkdir)
    for optim in (SGD, ADAMW):
        reference = give(ctx, folder / "two", optim)
        for giver, taker in ((ZERO[1], ZERO[3]), (ZERO[3], ZERO[2])):
            check_taking(ctx, place_of(folder / "two", optim, giver), optim, taker, reference)


def take_alone(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for optim in (SGD, ADAMW):
        reference = build(DDP, optim, SOLO, net())
        assert isinstance(reference, DdpEngine)
        reference.load(place_of(folder / "two", optim, DDP))
        for giver, taker in ((ZERO[1], ZERO[1]), (ZERO[2], DDP), (ZERO[3], ZERO[0]), (ZERO[3], ZERO[3])):
            check_taking(SOLO, place_of(folder / "two", optim, giver), optim, taker, reference)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    warm.start_ranks(give_by_two, (tmp_path,), 2)
    warm.start_ranks(take_alone, (tmp_path,), 1)


# Whole runs


def start(ranks: int, base: Path, run: Path, stage: int, **options: str) -> Job:
    settings = settings_of(base, run, 1) | {"engine.name": "deepspeed", "engine.zero_stage": str(stage)}
    return Job(ranks, run.with_name(run.name + ".log"), "trainer", *dotted(settings | options))


@pytest.mark.slow
def test_killed_run_ends_as_an_undisturbed_one(base: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "a run"
    job = start(2, base, whole, 2)
    assert job.wait() == 0, job.output()
    job = start(2, base, run, 2)
    while job.process.poll() is None and not Store(run).progress().step:
        time.sleep(0.01)
    job.kill()
    assert rows(run)[-1]["step"] < 5, job.output()
    job = start(2, base, run, 2)
    assert job.wait() == 0, job.output()
    assert f"resuming {run} at step 3 of 5" in job.output()
    ours, theirs = checkpoint(run), checkpoint(whole)
    assert ours.keys() == theirs.keys() >= {"optimizer-0.pt", "optimizer-1.pt"}
    for name in ours:
        assert ours[name] == theirs[name], f"{name} differs"


@pytest.mark.slow
def test_run_without_a_launcher_or_a_compiler(base: Path, tmp_path: Path) -> None:
    """One process, its batch norms' statistics in the saved weights, and not a word of DeepSpeed's."""
    tools = tmp_path / "tools"
    tools.mkdir()
    settings = settings_of(base, tmp_path / "run", 1) | {"engine.name": "deepspeed", "optim.ema_decay": "0"}
    settings |= {
        "engine.zero_stage": "3",
        "run.max_steps": "2",
        "engine.precision": "fp32",
    }  # as on a CPU evaluation is
    command = [sys.executable, "-m", "trainer", *dotted(settings)]
    done = subprocess.run(
        command, env=environment() | {"PATH": str(tools)}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert shutil.which("g++", path=str(tools)) is None
    said = (done.stdout + done.stderr).lower()
    assert "deepspeed" not in said.replace(str(tmp_path).lower(), "") and "warning" not in said, said
    arguments = [str(tmp_path / "run"), "--engine.name", "ddp"]
    evaluated = warm.run("trainer.evaluate", *arguments, environment=environment())
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"top-1 {rows(tmp_path / 'run')[-1]['val/top1_pct']:.2f} %" in evaluated.stdout
