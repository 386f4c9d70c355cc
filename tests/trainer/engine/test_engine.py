"""One update against the same arithmetic by hand, on one process and on two; and that saving and loading loses nothing."""

import copy
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision  # type: ignore[import-untyped]
from safetensors.torch import load_file
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.loader import IGNORE_LABEL, Batch
from tests.support import warm
from tests.support.runs import SOLO, environment, free_port
from trainer.checkpoint.files import STATE, WEIGHTS, load_weights, read_metadata
from trainer.distributed import DistContext, keep_group, open_dist_context
from trainer.engine import gradient_compression
from trainer.engine.compile_cache import keep_compiled
from trainer.engine.config import Compression, EngineConfig, Precision
from trainer.engine.ddp import DdpEngine
from trainer.engine.loss import count
from trainer.model.normalize import Normalise
from trainer.model.resnet import ModelConfig, build_resnet
from trainer.optim.optimizer import OptimConfig, ema_decay_at

CLASSES = 7
PLAIN = OptimConfig(lr=0.1, weight_decay=1e-2, label_smoothing=0.1)
SHARP = OptimConfig(lr=0.1, clip_norm=0.5, sam_radius=0.05, sam_steps=2)
MEAN, STD = DataConfig().mean, DataConfig().std
SCALED_MEAN, SCALED_STD = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)


pytestmark = pytest.mark.usefixtures("one_thread")


class SmallNet(nn.Module):
    """Without batch norm, so that every image counts for itself, however the images are divided."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.conv2(functional.relu(self.conv1(images))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return SmallNet()


def resnet(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return build_resnet(ModelConfig("resnet18"), CLASSES)


def build(
    module: nn.Module,
    optim: OptimConfig = PLAIN,
    precision: Precision = "fp32",
    ctx: DistContext = SOLO,
    **options: Any,
) -> DdpEngine:
    cfg = EngineConfig(precision=precision, **options)
    return DdpEngine(module, Normalise(MEAN, STD, ctx.device), cfg, optim, ctx)


def batch(rows: int, seed: int = 0, total: int | None = None) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (rows, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(CLASSES, (rows,), generator=draw)
    return Batch(images.to(memory_format=torch.channels_last), labels, torch.arange(rows), rows, total or rows)


def part(whole: Batch, rows: slice) -> Batch:
    return whole._replace(images=whole.images[rows], labels=whole.labels[rows], ids=whole.ids[rows])


def parameters(engine: DdpEngine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.named_parameters()}


def normalised(images: Tensor) -> Tensor:
    return (images.float() / 255 - SCALED_MEAN) / SCALED_STD


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Up to the order of sums in fp32."""
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7, msg=f"{name} differs")


def by_hand(module: nn.Module, batches: list[Batch], lrs: list[float], optim: OptimConfig) -> list[list[float]]:
    """SGD with Nesterov's momentum as it is written in the papers; loss and gradient norm of each update."""
    velocity = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    told = []
    for one, lr in zip(batches, lrs, strict=True):
        module.zero_grad()
        log_p = functional.log_softmax(module(normalised(one.images)), dim=1)
        hot = functional.one_hot(one.labels, CLASSES)
        target = (1 - optim.label_smoothing) * hot + optim.label_smoothing / CLASSES
        loss = -(target * log_p).sum(dim=1).mean()
        loss.backward()
        gradients = {name: value.grad for name, value in module.named_parameters() if value.grad is not None}
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        scale = min(1.0, optim.clip_norm / norm) if optim.clip_norm else 1.0
        with torch.no_grad():
            for name, value in module.named_parameters():
                decay = optim.weight_decay if value.ndim > 1 else 0.0
                gradient = scale * gradients[name] + decay * value
                velocity[name] = optim.momentum * velocity[name] + gradient
                value.sub_(lr * (gradient + optim.momentum * velocity[name]))
        told.append([loss.item(), norm])
    return told


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_updates_are_those_written_by_hand(clip_norm: float) -> None:
    optim = OptimConfig(lr=0.1, weight_decay=1e-2, label_smoothing=0.1, clip_norm=clip_norm)
    batches, lrs = [batch(8, seed) for seed in range(3)], [0.1, 0.05, 0.2]
    reference = small_net()
    told = by_hand(reference, batches, lrs, optim)
    engine = build(small_net(), optim)
    for one, lr, (loss, norm) in zip(batches, lrs, told, strict=True):
        sums = engine.step([one], lr)
        assert sums.dtype == torch.float64 and sums.shape == (5,)
        assert sums[0].item() / 8 == pytest.approx(loss, rel=1e-5)
        assert sums[3].item() == 8
        assert sums[4].item() == pytest.approx(norm, rel=1e-5)
        assert not clip_norm or norm > 2 * clip_norm, "clipping must have something to do"
    assert_close(parameters(engine), dict(reference.named_parameters()))


def test_micro_batches_are_one_batch() -> None:
    whole, parts = build(small_net()), build(small_net())
    for seed in range(3):
        one = batch(8, seed)
        together = whole.step([one], 0.1)
        divided = parts.step([part(one, slice(0, 4)), part(one, slice(4, 8))], 0.1)
        torch.testing.assert_close(divided, together, rtol=1e-5, atol=1e-7)
    assert_close(parameters(parts), parameters(whole))


def test_padding_does_not_count() -> None:
    """A last batch of five images, filled up to eight rows, is a batch of five."""
    five, filled = build(small_net()), build(small_net())
    one = batch(5)
    other = batch(8, seed=9)
    padded = Batch(
        images=torch.cat([one.images, other.images[:3]]).to(memory_format=torch.channels_last),
        labels=torch.cat([one.labels, torch.full((3,), IGNORE_LABEL)]),
        ids=torch.arange(8),
        num_real=5,
        total=5,
    )
    torch.testing.assert_close(filled.step([padded], 0.1), five.step([one], 0.1), rtol=1e-5, atol=1e-7)
    assert_close(parameters(filled), parameters(five))


def test_an_update_of_padding_alone_only_decays() -> None:
    """A rank whose share of the last micro-batch is empty: no gradient, no hits, no NaN."""
    engine = build(small_net(), OptimConfig(lr=0.1, weight_decay=0.0))
    before = parameters(engine)
    empty = batch(4, total=1)._replace(labels=torch.full((4,), IGNORE_LABEL), num_real=0)
    assert engine.step([empty], 0.1).tolist() == [0, 0, 0, 0, 0]
    assert_equal(parameters(engine), before)


def test_mixed_images_have_soft_targets() -> None:
    """Cross-entropy to the shares of each class, smoothed; rows that do not count have no part in it."""
    engine = build(small_net())
    one = batch(6, total=4)
    targets = torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(0))
    targets /= targets.sum(dim=1, keepdim=True)
    labels = targets.argmax(dim=1)
    labels[4:] = IGNORE_LABEL
    targets[5] = 0
    with torch.no_grad():
        log_p = functional.log_softmax(small_net()(normalised(one.images)), dim=1)
    smooth = (1 - PLAIN.label_smoothing) * targets + PLAIN.label_smoothing / CLASSES
    sums = engine.step([one._replace(labels=labels, targets=targets, num_real=4)], 0.1)
    assert sums[0].item() == pytest.approx(-(smooth * log_p).sum(dim=1)[:4].sum().item(), rel=1e-5)
    assert sums[1].item() == (log_p.argmax(dim=1) == labels).sum().item()
    assert sums[3].item() == 4


def test_binary_loss_is_timms() -> None:
    """Of labels, smoothed, and of mixed images, in which a fifth of an image is not there; ours is a sum over counted rows."""
    one = batch(6, total=4)
    labels = torch.cat([one.labels[:4], torch.full((2,), IGNORE_LABEL)])
    shares = torch.tensor([0.2, 0.3, 0.5] + [0.0] * (CLASSES - 3)).repeat(6, 1)
    with torch.no_grad():
        logits = small_net()(normalised(one.images))[:4]
    for smoothing, targets, threshold, summed in (
        (0.1, None, 0.2, False),
        (0.1, None, None, True),
        (0.0, shares, 0.2, False),
        (0.0, shares, 0.4, True),
        (0.0, shares, None, False),
        (0.0, shares, None, True),
    ):
        # Theirs would cut off smoothed labels too.
        theirs = BinaryCrossEntropy(
            smoothing=smoothing, target_threshold=None if targets is None else threshold, sum_classes=summed
        )
        expected = theirs(logits, (labels if targets is None else targets)[:4])
        optim = replace(PLAIN, loss="binary", label_smoothing=smoothing, binary_threshold=threshold, binary_sum=summed)
        engine = build(small_net(), optim)
        sums = engine.step([one._replace(labels=labels, targets=targets, num_real=4)], 0.1)
        assert sums[0].item() == pytest.approx(4 * expected.item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sam_by_hand(precision: Precision) -> None:
    """Every second step follows the gradient found a radius up the slope, from where it began; fp16 scales the loss."""
    engine = build(small_net(), replace(PLAIN, sam_radius=0.5, sam_steps=2), precision)
    network = small_net()
    decayed = [{"params": [p], "weight_decay": PLAIN.weight_decay if p.ndim > 1 else 0} for p in network.parameters()]
    optimizer = torch.optim.SGD(decayed, 0.1, PLAIN.momentum, nesterov=True)
    for number, micro_batches in enumerate([*updates()][:2]):
        images = normalised(torch.cat([one.images for one in micro_batches]))
        labels = torch.cat([one.labels for one in micro_batches])

        def gradient(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(images), labels, label_smoothing=PLAIN.label_smoothing)
            loss.backward()
            return loss

        loss = gradient()
        if number % 2 == 0:
            start = {name: value.clone() for name, value in network.state_dict().items()}
            length = torch.cat([p.grad.ravel() for p in network.parameters() if p.grad is not None]).norm()
            with torch.no_grad():
                for parameter in network.parameters():
                    assert parameter.grad is not None
                    parameter.add_(parameter.grad / length, alpha=0.5)
            gradient()
            network.load_state_dict(start)
        optimizer.step()
        sums = engine.step(micro_batches, 0.1)
        assert sums[0].item() / 16 == pytest.approx(loss.item(), rel=1e-5 if precision == "fp32" else 1e-3)
    plain = build(small_net(), PLAIN)
    for micro_batches in [*updates()][:2]:
        plain.step(micro_batches, 0.1)
    rtol, atol = (1e-5, 1e-7) if precision == "fp32" else (1e-2, 1e-3)
    torch.testing.assert_close(parameters(engine), dict(network.state_dict()), rtol=rtol, atol=atol)
    assert (parameters(plain)["fc.weight"] - parameters(engine)["fc.weight"]).abs().max() > 0.01


def test_the_scale_of_the_losses_is_told() -> None:
    assert build(small_net(), precision="fp16").loss_scale == 2**16 and build(small_net()).loss_scale is None


def join(rank: int, world: int, folder: Path) -> DistContext:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    keep_group()
    torch.set_num_threads(1)
    return DistContext(torch.device("cpu"), rank, world, 1)


def as_one_of_two(rank: int, folder: Path) -> None:
    """Three updates of two micro-batches, whose rows are dealt out to the ranks; the last one has padding."""
    ctx = join(rank, 2, folder)
    engine = build(small_net(), SHARP, ctx=ctx)
    sums = torch.zeros(5, dtype=torch.float64)
    for micro_batches in updates():
        sums += ctx.sum(engine.step([part(one, slice(rank, None, 2)) for one in micro_batches], 0.1))
    sums[4] /= 2
    torch.save({"sums": sums, "parameters": parameters(engine)}, folder / f"rank {rank}")
    # A network with batch norm: weights agree among the ranks, running statistics only after `agree`.
    engine = build(resnet(), ctx=ctx)
    engine.step([part(batch(8), slice(rank, None, 2))], 0.1)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.sync_buffers()
    torch.save({"before": before, "after": engine.module.state_dict()}, folder / f"resnet {rank}")
    dist.destroy_process_group()


def updates() -> Iterator[list[Batch]]:
    for seed in range(3):
        one = batch(16, seed)
        if seed == 2:
            labels = one.labels.clone()
            labels[11:] = IGNORE_LABEL
            one = one._replace(labels=labels, num_real=11, total=11)
        yield [part(one, slice(0, 8)), part(one, slice(8, 16))]


def test_two_ranks_are_one(tmp_path: Path) -> None:
    warm.start_ranks(as_one_of_two, (tmp_path,), 2)
    engine = build(small_net(), SHARP)
    sums = torch.zeros(5, dtype=torch.float64)
    for micro_batches in updates():
        sums += engine.step(micro_batches, 0.1)
    first, second = (torch.load(tmp_path / f"rank {rank}") for rank in range(2))
    assert_equal(first["parameters"], second["parameters"])
    assert_close(first["parameters"], parameters(engine))
    torch.testing.assert_close(first["sums"], sums, rtol=1e-5, atol=1e-7)
    assert sums[3] == 16 + 16 + 11

    first, second = (torch.load(tmp_path / f"resnet {rank}") for rank in range(2))
    statistics = {name for name in first["before"] if "running" in name}
    assert all(
        torch.equal(first["before"][name], second["before"][name]) for name in first["before"].keys() - statistics
    )
    assert not any(torch.equal(first["before"][name], second["before"][name]) for name in statistics)
    assert_equal(second["after"], first["before"])


def compressed(rank: int, folder: Path) -> None:
    """Four updates with each kind of compression; those with PowerSGD also interrupted after three."""
    ctx = join(rank, 2, folder)
    gradient_compression.POWERSGD_START = 2
    optim, batches = OptimConfig(lr=0.1), [part(batch(16, seed), slice(rank, None, 2)) for seed in range(4)]
    ends = {}
    for how in get_args(Compression):
        engine = build(small_net(), optim, ctx=ctx, compression=how)
        for number, one in enumerate(batches):
            if number == 3:
                ctx.run_on_rank0((folder / how).mkdir)
                engine.capture_state({})(folder / how)
                ctx.barrier()
            engine.step([one], 0.1)
        ends[how] = parameters(engine)
    resumed = build(small_net(), optim, ctx=ctx, compression="powersgd")
    resumed.load(folder / "powersgd")
    resumed.step([batches[3]], 0.1)
    ends["resumed"] = parameters(resumed)
    torch.save(ends, folder / f"rank {rank}")
    dist.destroy_process_group()


def test_compressed_gradients_are_near_whole_ones(tmp_path: Path) -> None:
    warm.start_ranks(compressed, (tmp_path,), 2)
    first, second = (torch.load(tmp_path / f"rank {rank}") for rank in range(2))
    for how, ends in first.items():
        assert_equal(ends, second[how])
    start = dict(small_net().named_parameters())
    for how, allowed in (("bf16", 0.02), ("fp16", 0.01), ("powersgd", 0.5)):
        for name, whole in first["none"].items():
            moved, off = (whole - start[name]).norm(), (first[how][name] - whole).norm()
            assert off < allowed * moved, (how, name)
        assert any((first[how][name] != whole).any() for name, whole in first["none"].items()), how
    assert_equal(first["resumed"], first["powersgd"])


def with_powersgd(rank: int, folder: Path) -> None:
    """Updates of a network whose gradients would fill two of DDP's own buckets."""
    ctx = join(rank, 2, folder)
    gradient_compression.POWERSGD_START = 2
    engine = build(resnet(), OptimConfig(lr=0.01), ctx=ctx, compression="powersgd")
    for seed in range(6):
        engine.step([part(batch(8, seed), slice(rank, None, 2))], 0.01)
    torch.save(parameters(engine), folder / f"rank {rank}")
    dist.destroy_process_group()


def test_powersgd_sums_in_one_order_on_all_ranks(tmp_path: Path) -> None:
    assert sum(parameter.nbytes for parameter in resnet().parameters()) > 40 << 20
    warm.start_ranks(with_powersgd, (tmp_path,), 2)
    assert_equal(*(torch.load(tmp_path / f"rank {rank}") for rank in range(2)))


class SlowToGo:
    """Holds the process group, and takes its time to let go of it."""

    def __init__(self) -> None:
        self.group = dist.group.WORLD

    def __del__(self) -> None:
        time.sleep(0.5)


def leave_before_a_callback(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    with open_dist_context():
        if rank == 1:
            time.sleep(0.3)  # so that one of gloo's threads ends the sum of rank 0, and calls back
        ended = dist.all_reduce(torch.ones(1), async_op=True).get_future()
        holding = SlowToGo()
        ended.then(lambda future, _=holding: future.value()).wait()  # type: ignore[misc]
        del holding, ended
    time.sleep(1)


def test_leaving_while_gloo_holds_the_group() -> None:
    torch.multiprocessing.start_processes(leave_before_a_callback, (free_port(),), nprocs=2, start_method="spawn")


ENDING = """
import atexit
import os
import time
from contextlib import suppress
from pathlib import Path

def of_gloo():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has just ended
            names.append(path.read_text())
    return [name for name in names if "gloo" in name]

@atexit.register  # before trainer's own, so it runs after them
def last():
    end_s = time.monotonic() + 60
    while of_gloo():  # the kernel lists a thread for a moment after it has been joined
        if time.monotonic() > end_s:
            os._exit(3)

from trainer.distributed import open_dist_context

with open_dist_context() as ctx:
    ctx.barrier()
    if not of_gloo():
        os._exit(4)
"""


def test_no_thread_of_gloo_outlives_the_interpreter() -> None:
    """Of three runs in ten, on a processor shared with a busy process, the end of one aborted otherwise."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", ENDING], env={**environment(), **meeting, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [rank.wait(100) for rank in ranks] == [0, 0]


def out_of_memory_above(rows: int, module: nn.Module) -> None:
    """Fail as a GPU does: allocations fail, here those of a forward pass over more images than `rows`."""

    def refuse(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > rows:
            raise torch.OutOfMemoryError(f"no memory for {len(inputs[0])} images")

    module.register_forward_pre_hook(refuse)


@pytest.mark.parametrize(("room", "pieces"), [(8, 1), (4, 2), (3, 4), (1, 8)])
def test_pieces_that_fit_are_one_batch(room: int, pieces: int) -> None:
    whole, cut = build(small_net()), build(small_net())
    out_of_memory_above(room, cut.module)
    assert cut.fit_memory(8, 32) == pieces
    for seed in range(2):
        torch.testing.assert_close(
            cut.step([batch(8, seed)], 0.1), whole.step([batch(8, seed)], 0.1), rtol=1e-5, atol=1e-7
        )
    assert_close(parameters(cut), parameters(whole))


def test_a_trial_of_memory_changes_nothing() -> None:
    engine = build(resnet())
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    out_of_memory_above(4, engine.module)
    assert engine.fit_memory(8, 32) == 2
    assert_equal(engine.module.state_dict(), before)
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_an_image_too_large_for_memory() -> None:
    engine = build(small_net())
    out_of_memory_above(0, engine.module)
    with pytest.raises(UserError, match=r"data.size_px: .* one image of 32 px"):
        engine.fit_memory(8, 32)


def test_synchronised_statistics_need_gpus() -> None:
    with pytest.raises(UserError, match=r"engine.sync_bn: .* GPUs only"):
        build(small_net(), sync_bn=True)


@pytest.mark.slow
def test_compiled_once_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolutions come and go, evaluation too; weights have their plain names, and what they are is as without."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    end = keep_compiled(EngineConfig(compile="on", compile_cache=str(tmp_path / "shared")), SOLO)
    eager, fast = build(small_net()), build(small_net(), compile="on")

    def rounds() -> None:
        for size_px in (32, 48):
            one = batch(8)
            one = one._replace(images=one.images.repeat(1, 1, 2, 2)[:, :, :size_px, :size_px].contiguous())
            torch.testing.assert_close(fast.step([one], 0.1), eager.step([one], 0.1), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(fast.predict(one.images), eager.predict(one.images), rtol=1e-4, atol=1e-5)

    rounds()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 4, "two sizes, in training and in evaluation"
    rounds()
    assert counters["stats"]["unique_graphs"] == graphs
    assert_close(parameters(fast), parameters(eager))
    assert fast.module.state_dict().keys() == small_net().state_dict().keys()
    end()
    assert any((tmp_path / "shared").rglob("*.so")), "kept for the next run"


def test_fp16_skips_an_update_that_overflows() -> None:
    engine = build(small_net(), precision="fp16")
    before, scale = parameters(engine), engine.scaler.get_scale()
    hook = engine.module.get_parameter("fc.weight").register_hook(lambda gradient: gradient * torch.inf)
    assert not torch.isfinite(engine.step([batch(8)], 0.1)[4])
    assert_equal(parameters(engine), before)
    assert engine.scaler.get_scale() == scale / 2
    hook.remove()
    never = build(small_net(), precision="fp16")
    never.scaler.load_state_dict(engine.scaler.state_dict())
    for seed in range(2):
        torch.testing.assert_close(
            engine.step([batch(8, seed)], 0.1), never.step([batch(8, seed)], 0.1), rtol=0, atol=0
        )
    assert_equal(parameters(engine), parameters(never))
    assert not torch.equal(parameters(engine)["fc.weight"], before["fc.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_near_fp32(precision: Precision) -> None:
    exact, rounded = build(small_net()), build(small_net(), precision=precision)
    assert exact.predict(batch(8).images).dtype == rounded.predict(batch(8).images).dtype == torch.float32
    assert not torch.equal(rounded.predict(batch(8).images), exact.predict(batch(8).images))
    torch.testing.assert_close(rounded.step([batch(8)], 0.1), exact.step([batch(8)], 0.1), rtol=0.02, atol=0)
    for name, value in parameters(rounded).items():
        assert value.dtype == torch.float32, "weights stay fp32"
        torch.testing.assert_close(value, parameters(exact)[name], rtol=0, atol=2e-3)


def test_channels_last_stays(tmp_path: Path) -> None:
    engine = build(resnet(), OptimConfig(lr=0.1, ema_decay=0.9))
    engine.step([batch(4)], 0.1)
    engine.capture_state({})(tmp_path)
    engine.load(tmp_path)
    engine.step([batch(4)], 0.1)
    moments = [state["momentum_buffer"] for state in engine.optimizer.state.values()]
    tensors = [*engine.module.parameters(), *engine.eval_model.parameters(), *moments]
    maps = [tensor for tensor in tensors if tensor.ndim == 4]
    assert len(maps) == 3 * 20
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in maps)


@pytest.mark.parametrize(
    ("optim", "precision"),
    [
        (OptimConfig(lr=0.05, ema_decay=0.99), "fp32"),
        (OptimConfig(lr=0.05), "fp32"),
        (OptimConfig(name="adamw", lr=1e-3, ema_decay=0.99), "fp32"),
        (OptimConfig(lr=0.05), "fp16"),
    ],
)
def test_loading_continues_bit_by_bit(optim: OptimConfig, precision: Precision, tmp_path: Path) -> None:
    lrs = (0.02, 0.05, 0.04, 0.03, 0.01)
    straight = build(resnet(), optim, precision)
    for seed, lr in enumerate(lrs):
        if seed == 3:
            (tmp_path / "middle").mkdir()
            straight.capture_state({})(tmp_path / "middle")
        straight.step([batch(4, seed)], lr)
    resumed = build(resnet(seed=8), optim, precision)
    resumed.load(tmp_path / "middle")
    for seed, lr in enumerate(lrs[3:], start=3):
        resumed.step([batch(4, seed)], lr)
    for name, engine in (("straight", straight), ("resumed", resumed)):
        (tmp_path / name).mkdir()
        engine.capture_state({"model": "resnet18", "classes": "[]", "data": "x"})(tmp_path / name)
    assert_equal(resumed.module.state_dict(), straight.module.state_dict())
    for file in (WEIGHTS, STATE):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes(), file


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_precision_may_change_on_resume(before: Precision, after: Precision, tmp_path: Path) -> None:
    engine = build(small_net(), precision=before)
    engine.step([batch(8)], 0.1)
    engine.capture_state({})(tmp_path)
    resumed = build(small_net(), precision=after)
    resumed.load(tmp_path)
    assert_equal(parameters(resumed), parameters(engine))
    assert torch.isfinite(resumed.step([batch(8)], 0.1)).all()


def test_saved_weights_are_torchvisions(tmp_path: Path) -> None:
    engine = build(resnet(), OptimConfig(lr=0.05, ema_decay=0.9))
    for seed in range(2):
        engine.step([batch(4, seed)], 0.05)
    engine.capture_state({"model": "resnet18", "classes": '["ü"]'})(tmp_path)
    assert read_metadata(tmp_path) == {"model": "resnet18", "classes": '["ü"]'}
    theirs = torchvision.models.resnet18(num_classes=CLASSES)
    theirs.load_state_dict(load_file(tmp_path / WEIGHTS), strict=True)
    images = batch(6, seed=5).images
    with torch.no_grad():
        logits = theirs.eval()(normalised(images))
    torch.testing.assert_close(engine.predict(images), logits, rtol=1e-4, atol=1e-5)
    ours = resnet(seed=8)
    load_weights(ours, tmp_path)
    assert_equal(ours.state_dict(), theirs.state_dict())


def test_prediction_is_by_the_average_and_leaves_training_as_it_was() -> None:
    module = resnet()
    engine = build(module, OptimConfig(lr=0.05, ema_decay=0.9))
    average = copy.deepcopy(module)
    for update in range(3):
        engine.step([batch(4, update)], 0.05)
        decay = ema_decay_at(update, engine.optim)
        with torch.no_grad():
            for mean, value in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
                mean.copy_(decay * mean + (1 - decay) * value if mean.is_floating_point() else value)
    images = batch(6, seed=5).images
    before = {name: value.clone() for name, value in module.state_dict().items()}
    logits = engine.predict(images)
    with torch.no_grad():
        torch.testing.assert_close(logits, average.eval()(normalised(images)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits, copy.deepcopy(module).eval()(normalised(images)), rtol=1e-2)
    assert_equal(module.state_dict(), before)
    assert engine.module is module and all(part.training for part in module.modules())

    plain = build(resnet())
    plain.predict(images)
    assert all(part.training for part in plain.module.modules()), "evaluation mode must not outlast a prediction"


@pytest.mark.parametrize("classes", [2, 3, 5, 40])
def test_count(classes: int) -> None:
    draw = np.random.default_rng(classes)
    logits = draw.normal(size=(64, classes)).astype(np.float32)
    labels = draw.integers(classes, size=64)
    labels[[0, 7, 63]] = IGNORE_LABEL
    ranks = np.argsort(np.argsort(-logits, axis=1), axis=1)
    top1 = sum(ranks[row, label] == 0 for row, label in enumerate(labels) if label >= 0)
    top5 = sum(ranks[row, label] < 5 for row, label in enumerate(labels) if label >= 0)
    counted = count(torch.from_numpy(logits), torch.from_numpy(labels), torch.tensor(1.5))
    assert counted.dtype == torch.float64
    assert counted.tolist() == [1.5, top1, top5, 61]
