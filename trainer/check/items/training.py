"""Items about optimizer steps: they are finite, wait for nothing, repeat to the bit, and fit into memory. Without DALI."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.batch import Batch
from data_pipeline.common.errors import UserError
from trainer.check.items import common
from trainer.check.items.common import CLASSES, EAGER, make_engine, noise, synchronize
from trainer.check.results import Found, Skip
from trainer.distributed import open_dist_context
from trainer.engine.arithmetic import deterministic_kernels
from trainer.engine.base import Engine
from trainer.engine.compilation import check_graphs
from trainer.engine.config import Precision
from trainer.engine.ddp import DdpEngine
from trainer.optim.config import OptimConfig, OptimizerName
from trainer.tracking.meter import Meter

OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
OF_TIMM = ("lars", "lamb")
WARM = 3
"""Steps after which a step does only what every later one does."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


def optimizers() -> Found:
    steps, names = 0, available()
    with open_dist_context() as ctx:
        plain, mixed = noise(ctx), noise(ctx, mixed=True)
        for name in names:
            for precision in PRECISIONS:
                engine = make_engine(ctx, OptimConfig(name=name), replace(EAGER, precision=precision))
                before = [weights.clone() for weights in engine.module.parameters()]
                for batch in (plain, mixed, plain):  # fp16 may leave out the first, as its scale is too high
                    sums = engine.step([batch], 1e-3)
                    assert torch.isfinite(sums[:4]).all(), f"{name} in {precision}: {sums.tolist()}"
                    steps += 1
                after = list(engine.module.parameters())
                assert all(bool(torch.isfinite(weights).all()) for weights in after), f"{name} in {precision}: weights"
                assert not all(map(torch.equal, before, after)), f"{name} in {precision} changes no weight"
    return Found(f"{steps} steps, mixed and not, in {', '.join(PRECISIONS)}{without(names)}")


def available() -> list[OptimizerName]:
    """List the optimizers whose packages are installed."""
    try:
        import timm.optim.lars as _  # noqa: F401
    except ModuleNotFoundError:
        return [name for name in OPTIMIZERS if name not in OF_TIMM]
    return list(OPTIMIZERS)


def without(names: Sequence[OptimizerName]) -> str:
    """Say which optimizers are not among `names`, and why."""
    missing = [name for name in OPTIMIZERS if name not in names]
    return f"; without {' and '.join(missing)}, as timm is not installed" if missing else ""


def no_host_sync() -> Found:
    """On a GPU torch raises where a step waits for it. Elsewhere the operators are watched that would wait there."""
    names = available()
    with open_dist_context() as ctx:
        batches, meter = [noise(ctx), noise(ctx, mixed=True)], Meter(ctx, [], CLASSES)
        for name in names:
            # In fp16, torch's loss scaling waits for all optimizers that are not fused.
            for precision in ("bf16", "fp16") if name in ("sgd", "adamw") else ("bf16",):
                optim = OptimConfig(name=name, clip_norm=1.0, ema_decay=0.9)
                engine = make_engine(ctx, optim, replace(EAGER, precision=precision))
                for _ in range(WARM):
                    engine.step(batches, 1e-3)
                synchronize(ctx)
                if ctx.device.type == "cuda":
                    with alarm_of_torch():
                        meter.add(engine.step(batches, 1e-3))
                    continue
                counters = [group["step"] for group in engine.optimizer.param_groups if "step" in group]
                with Waits(on_host=counters) as waits:
                    meter.add(engine.step(batches, 1e-3))
                assert not waits.seen, f"{name} in {precision} waits: {dict(waits.seen)}"
    how = "by torch's own alarm" if ctx.device.type == "cuda" else "by the operators that would wait on a GPU"
    return Found(f"a warm step of {', '.join(names)}, {how}{without(names)}")


@contextmanager
def alarm_of_torch() -> Iterator[None]:
    """Within it, waiting for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waits(TorchDispatchMode):
    """Counts the operators that ask the device for a value, for which a host waits."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self, on_host: Sequence[Tensor]) -> None:
        """`on_host` are tensors on the CPU on any machine, for whose values nothing waits."""
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._on_host = {tensor.data_ptr() for tensor in on_host}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self.ASKING and args[0].data_ptr() not in self._on_host:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def exact_resume() -> Found:
    told = []
    with open_dist_context() as ctx, deterministic_kernels():
        batches = [noise(ctx, seed) for seed in range(10)]
        for name in available():
            with TemporaryDirectory() as folder:
                optim = OptimConfig(name=name, ema_decay=0.9)
                going_on, resumed = make_engine(ctx, optim), make_engine(ctx, optim)
                for batch in batches[:5]:
                    going_on.step([batch], 1e-2)
                going_on.capture_state({})(Path(folder))
                resumed.load(Path(folder))
            for batch in batches[5:]:
                going_on.step([batch], 1e-2)
                resumed.step([batch], 1e-2)
            different = differing(going_on, states(resumed))
            assert not different, f"{name}: {len(different)} tensors differ, {different[0]} first"
            told.append(name)
    return Found(f"{', '.join(told)}: {len(states(going_on))} tensors equal to the bit after five steps")


def capture() -> Found:
    """Write in another thread, as the saver does, while steps go on."""
    with open_dist_context() as ctx, TemporaryDirectory() as folder:
        engine = make_engine(ctx)
        for _ in range(WARM):  # under way on a GPU when the state is taken
            engine.step([noise(ctx)], 1e-2)
        write = engine.capture_state({})
        expected = {
            name: value.clone() for name, value in states(engine).items()
        }  # the device does so before further steps
        with ThreadPoolExecutor() as pool:
            writing, steps = pool.submit(write, Path(folder)), 0
            while not writing.done() or steps < 3:
                engine.step([noise(ctx, steps)], 1e-1)
                steps += 1
        writing.result()
        restored = make_engine(ctx)
        restored.load(Path(folder))
        different = differing(restored, expected)
    assert not different, f"{different[0]} is not what it was when it was captured"
    return Found(f"{len(expected)} tensors, written beside {steps} steps")


def accumulation() -> Found:
    """Compare steps with gradients computed by plain torch: of several micro-batches, and on a GPU of one as a graph."""
    exact = replace(EAGER, precision="fp32")
    graphed = replace(exact, compile="on", compile_mode="reduce-overhead")
    with open_dist_context() as ctx:
        try:
            check_graphs(graphed, replace(ctx, device=torch.device("cuda")), accumulate=3)
        except UserError:
            pass
        else:
            raise AssertionError("graphs of several micro-batches are not refused, which torch adds up wrongly")
        if ctx.device.type == "cuda":
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        batches = [noise(ctx, seed)._replace(total=3 * common.SCALE.batch) for seed in range(3)]
        apart = from_plain_step(make_engine(ctx, PLAIN, exact), batches)
        assert apart < 1e-4, f"three micro-batches end {apart:.1e} from the plain gradient's weights"
        told = f"three micro-batches end {apart:.0e} from the plain gradient's weights"
        if ctx.device.type != "cuda":
            return Found(f"{told}; graphs need a GPU")
        engine = make_engine(ctx, PLAIN, graphed)
        for _ in range(3):  # from then on the graph is replayed
            engine.step([noise(ctx)], 0.0)
        apart = from_plain_step(engine, [noise(ctx)])
        assert apart < 1e-3, f"a graph ends {apart:.1e} from the plain gradient's weights"
    return Found(f"{told}, a graph {apart:.0e}; graphs of several are refused")


PLAIN = OptimConfig(momentum=0.0, nesterov=False, weight_decay=0.0, label_smoothing=0.0)
"""Weights change by the learning rate times the gradient."""


def from_plain_step(engine: DdpEngine, batches: list[Batch]) -> float:
    """Make a step, and return how far the weights end from those of plain torch."""
    plain, lr = copy.deepcopy(engine.module), 0.1
    for batch in batches:
        logits = plain(engine.normalise(batch.images))
        (functional.cross_entropy(logits, batch.labels, reduction="sum") / batch.total).backward()
    engine.step(batches, lr)
    with torch.no_grad():
        for weights in plain.parameters():
            assert weights.grad is not None
            weights.sub_(lr * weights.grad)
    return distance(engine, dict(plain.named_parameters()))


def fit_memory() -> Found:
    """Give torch little of the GPU's memory, and a batch that takes more; then train on it."""
    rows, limit_gib = 1024, 6.0
    with open_dist_context() as ctx:
        if ctx.device.type != "cuda":
            raise Skip("there is no GPU whose memory could run out")
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(limit_gib * 2**30, 0.8 * free) / total)
        engine = make_engine(ctx)
        pieces = engine.fit_memory(rows, common.SCALE.size_px)
        assert pieces > 1, f"{rows} images fit at once, so nothing was tried"
        sums = engine.step([noise(ctx, rows=rows)], 1e-3)
        assert torch.isfinite(sums[:4]).all(), sums.tolist()
        peak_gib = torch.cuda.max_memory_reserved() / 2**30
    return Found(f"{rows} images of {common.SCALE.size_px} px in {pieces} pieces; at most {peak_gib:.1f} GiB")


def deepspeed() -> Found:
    import deepspeed as _  # noqa: F401

    from trainer.engine.deepspeed import DeepSpeedEngine
    from trainer.model.normalize import Normalise
    from trainer.model.resnet import ModelConfig, build_resnet

    optim, fp32 = OptimConfig(name="adamw"), replace(EAGER, precision="fp32")

    Stage = Literal[0, 1, 2] | None

    def make(stage: Stage) -> Engine:
        """Make an engine of a stage; None stands for DDP."""
        if stage is None:
            return make_engine(ctx, optim, fp32)
        torch.manual_seed(0)
        network, normalise = (
            build_resnet(ModelConfig(width=common.SCALE.width), CLASSES),
            Normalise(common.MEAN, common.STD, ctx.device),
        )
        return DeepSpeedEngine(network, normalise, replace(fp32, name="deepspeed", zero_stage=stage), optim, ctx)

    told = []
    with open_dist_context() as ctx, TemporaryDirectory() as folder:
        *batches, last = [noise(ctx, seed) for seed in range(6)]
        stages: tuple[Stage, ...] = (None, 0, 1, 2)
        saved = {stage: Path(folder, str(stage)) for stage in stages}
        for stage, place in saved.items():
            engine = make(stage)
            for batch in batches:
                sums = engine.step([batch], 1e-3)
                assert torch.isfinite(sums).all(), f"stage {stage}: {sums.tolist()}"
            place.mkdir()
            engine.capture_state({})(place)
            if stage is None:
                ddp = copy.deepcopy({name: value for name, value in states(engine).items() if "num_" not in name})
                engine.step([last], 1e-3)
                next_ddp = {name: value for name, value in states(engine).items() if "num_" not in name}
                continue
            apart = distance(engine, ddp)
            assert apart < 1e-2, f"stage {stage} ends {apart:.1e} from DDP's weights"
            told.append(f"{stage}: {apart:.0e}")
        # What one has saved, weights and the optimizer's state, another goes on from.
        others: tuple[tuple[Stage, Stage], ...] = ((None, 1), (2, None))
        for before, after in others:
            engine = make(after)
            engine.load(saved[before])
            engine.step([last], 1e-3)
            apart = distance(engine, next_ddp)
            assert apart < 1e-2, f"stage {after} goes on from stage {before} {apart:.1e} from DDP's weights"
    return Found(f"five steps from DDP's weights, by stage {', '.join(told)}; each goes on from another's checkpoint")


def states(engine: Engine) -> dict[str, Tensor]:
    return engine.module.state_dict()


def differing(engine: Engine, others: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that are not the same to the bit."""
    return [name for name, value in states(engine).items() if not torch.equal(value, others[name])]


def distance(engine: Engine, others: Mapping[str, Tensor]) -> float:
    """Find the largest distance of a tensor from its counterpart, relative to that."""
    ours = states(engine)
    return max(
        float((ours[name].float() - value.detach().float()).norm() / value.detach().float().norm().clamp(min=1e-6))
        for name, value in others.items()
    )
