"""Measurements of one process of a run, from which `plan` extrapolates; measured here or read from a file."""

import json
import platform
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError
from data_pipeline.common.worker_pool import progress
from data_pipeline.loader import Batch, Cursor, Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from trainer.config import Config
from trainer.distributed import DistContext
from trainer.engine.config import Compression
from trainer.engine.gradient_compression import POWERSGD_RANK
from trainer.engine.precision import resolve_precision
from trainer.plan.allreduce_model import Link, host_seconds_per_byte, measure_link
from trainer.setup.parts import build_engine

FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20  # of DDP
ROUNDS, STEPS = 7, 4  # turns, and optimizer steps or batches in each


class Step(NamedTuple):
    """One optimizer step of one process that waits for nobody."""

    images: int
    forward_s: float
    """From its start to the start of its last backward pass; with micro-batches, all before that is included."""
    backward_s: float
    update_s: float
    """From the end of the last backward pass to the end of the step."""

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s


class Bucket(NamedTuple):
    """Gradients that are reduced together."""

    size_bytes: int
    sent_bytes: float
    """Bytes that are reduced in their place where they are compressed."""
    ready: float
    """Share of the last backward pass after which all of them are there."""


@dataclass(frozen=True)
class Parts:
    """Measurements of one process."""

    measured_on: str
    """Host, processor and precision."""
    recipe: str
    """Recipe as `recipe_of` describes it."""
    epoch_images: int
    """Training images."""
    steps: tuple[Step, ...]
    """Steps of different sizes, by size."""
    buckets: tuple[Bucket, ...]
    """Buckets in the order in which they are ready."""
    loader_s: float
    """Seconds that an image takes in the loader, running alone."""
    shared_cores: bool
    """True where loader, computation and sending of the gradients run on the same cores."""
    host_s_per_byte: float = 0.0
    """Seconds of these cores for reducing a byte; 0 where it was not measured."""
    inside: Link | None = None
    """The link within a node, where it was measured."""
    between: Link | None = None
    """The link between nodes, where it was measured."""


def measure(cfg: Config, ctx: DistContext, gpu_images: list[int], gpus_per_node: int) -> Parts:
    """Measure at each of `gpu_images` and the recipe's last resolution: the slowest rank counts. Collective.

    The ranks measure at once, so that they compete for what they share, but wait for nobody in between. Several ranks
    also measure the link that joins them.
    """
    # The link first, while no loader or computation is busy.
    catalog = ctx.raise_together(lambda: open_catalog(cfg.data, "train"))
    hosts = len(ctx.gather(torch.tensor(zlib.crc32(socket.gethostname().encode()))).unique())
    link = measure_link(ctx) if ctx.world > 1 else None
    host_s_per_byte = host_seconds_per_byte(ctx) if ctx.world > 1 else 0.0
    # Each process then measures as if it were alone; a cluster's time is modelled from that.
    alone = replace(ctx, rank=0, world=1)
    sizes, on_cpu = sorted(set(gpu_images)), ctx.device.type == "cpu"
    with progress("measuring", (len(sizes) + 1) * (ROUNDS + 1), unit="rounds") as advance:
        taken = [measure_step(cfg, len(catalog.classes), alone, images, advance) for images in sizes]
        if not on_cpu:  # the loaders of a whole node share its cores
            cores = ctx.cores * ctx.world // hosts
            alone = replace(alone, cores=max(1, cores // gpus_per_node))
        loader_s = _measure_loader(cfg, catalog, alone, sizes[-1], advance)
    # The slowest rank decides: in training the others wait for it.
    precision = resolve_precision(cfg.engine.precision, ctx.device)
    return Parts(
        measured_on=f"{socket.gethostname()}, {_processor(ctx)}, {precision}",
        recipe=recipe_of(cfg),
        epoch_images=len(catalog),
        steps=tuple(Step(step.images, *_slowest(ctx, list(step[1:]))) for step, _ in taken),
        buckets=taken[-1][1],
        loader_s=_slowest(ctx, [loader_s])[0],
        shared_cores=on_cpu,
        host_s_per_byte=_slowest(ctx, [host_s_per_byte])[0],
        inside=link if hosts == 1 else None,
        between=link if hosts > 1 else None,
    )


def recipe_of(cfg: Config) -> str:
    """Describe the parts of a configuration that decide its speed, beside the data: model, last resolution and compression."""
    compressed = "" if cfg.engine.compression == "none" else f", gradients sent as {cfg.engine.compression}"
    return f"{cfg.model.name} at {_size_px(cfg)} px{compressed}"


def measure_step(
    cfg: Config, classes: int, alone: DistContext, images: int, advance: Callable[[int], None] = lambda rounds: None
) -> tuple[Step, tuple[Bucket, ...]]:
    """Measure a step of `images` synthetic images by a single process, and the buckets that DDP would make of its gradients.

    The phases, and the times when gradients are ready, are measured in steps that are not compiled, as DDP cuts a compiled
    backward pass at its buckets; the duration, in steps as the recipe wants them.
    """
    torch.compiler.reset()  # otherwise it would compile for any size after two sizes
    # Two networks: one as the recipe wants it, for the duration, and one whose phases can be seen.
    wanted = build_engine(cfg, classes, alone)
    plain = build_engine(replace(cfg, engine=replace(cfg.engine, compile="off")), classes, alone)
    clock, batches = _Clock(alone.device), synthetic(cfg, classes, alone, images)
    watch = _Watch(plain.module, clock)
    taken_s, splits, ready = [], [], []
    for number in range(ROUNDS + 1):
        start = clock.now()
        for _ in range(STEPS):
            wanted.step(batches, 1e-3)
        step_s = clock.seconds(start, clock.now()) / STEPS
        start = clock.now()
        plain.step(batches, 1e-3)
        marks = [clock.seconds(start, mark) for mark in (watch.begin, watch.end, clock.now())]
        if number:  # the first round warms up
            taken_s.append(step_s)
            splits.append([marks[0] / marks[2], (marks[1] - marks[0]) / marks[2], (marks[2] - marks[1]) / marks[2]])
            ready.append(watch.gradients())
        advance(1)
    # The phases' shares of the plain step divide the duration of the wanted one.
    shares = np.median(splits, axis=0)
    step = Step(images, *(median(taken_s) * shares / shares.sum()).tolist())
    return step, bucket_up(watch.parameters, np.median(ready, axis=0).tolist(), cfg.engine.compression)


def bucket_up(parameters: list[nn.Parameter], ready: list[float], compression: Compression) -> tuple[Bucket, ...]:
    """DDP's buckets of the gradients of `parameters`, in the order of the backward pass and there after shares `ready`.

    A bucket is closed by the gradient with which it reaches its size.
    """
    buckets: list[Bucket] = []
    size_bytes, sent_bytes = 0, 0.0
    for parameter, share in zip(parameters, ready, strict=True):
        size_bytes += parameter.nbytes
        sent_bytes += _sent_bytes(parameter, compression)
        if size_bytes >= (BUCKET_BYTES if buckets else FIRST_BUCKET_BYTES) or parameter is parameters[-1]:
            buckets.append(Bucket(size_bytes, sent_bytes, share))
            size_bytes, sent_bytes = 0, 0.0
    return tuple(buckets)


def _sent_bytes(parameter: nn.Parameter, compression: Compression) -> float:
    if compression in ("bf16", "fp16"):
        return parameter.nbytes / 2
    if compression == "powersgd" and parameter.ndim > 1:  # once it has begun
        rows = parameter.shape[0]
        factors = POWERSGD_RANK * (rows + parameter[0].numel()) * parameter.element_size()
        return min(factors, parameter.nbytes)
    return parameter.nbytes


class _Clock:
    """Clock of the device: on a GPU, of the work handed to it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two values of `now`; waits until the second is reached."""
        if not self.on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class _Watch:
    """Records when the last backward pass of a step begins, and when each gradient is ready."""

    def __init__(self, module: nn.Module, clock: _Clock) -> None:
        self.clock, self.begin = clock, clock.now()
        self._ready: dict[nn.Parameter, Any] = {}  # in the order of the backward pass
        module.register_forward_hook(self._forward_ended)
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def _forward_ended(self, *_: object) -> None:
        self.begin = self.clock.now()
        self._ready = {}

    def _has_gradient(self, parameter: nn.Parameter) -> None:
        self._ready[parameter] = self.clock.now()

    @property
    def end(self) -> Any:
        return list(self._ready.values())[-1]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._ready)

    def gradients(self) -> list[float]:
        """Shares of the last backward pass after which the gradients are ready, in that order."""
        whole_s = self.clock.seconds(self.begin, self.end)
        return [self.clock.seconds(self.begin, mark) / whole_s for mark in self._ready.values()]


def synthetic(cfg: Config, classes: int, alone: DistContext, images: int) -> list[Batch]:
    rows, size_px = images // cfg.optim.accumulate, _size_px(cfg)
    pixels = torch.randint(256, (rows, size_px, size_px, 3), dtype=torch.uint8, device=alone.device)
    labels = torch.randint(classes, (rows,), device=alone.device)
    batch = Batch(pixels.permute(0, 3, 1, 2), labels, torch.arange(rows), num_real=rows, total=images)
    return [batch] * cfg.optim.accumulate


def _measure_loader(
    cfg: Config, catalog: Catalog, alone: DistContext, images: int, advance: Callable[[int], None]
) -> float:
    """Measure the seconds that an image takes where one process reads for itself."""
    loader = Loader(
        replace(cfg.data, batch=images),
        catalog,
        alone,
        training=True,
        seed=cfg.run.seed,
        epochs=cfg.run.epochs,
        accumulate=cfg.optim.accumulate,
    )
    batches = _endless(loader, cfg.run.epochs - 1)
    taken_s = []
    for number in range(ROUNDS + 1):
        start, seen = time.perf_counter(), 0
        while seen < STEPS * images:
            seen += len(next(batches).labels)
        if number:  # the first round empties what was read ahead
            taken_s.append((time.perf_counter() - start) / seen)
        advance(1)
    return median(taken_s)


def _endless(loader: Loader, epoch: int) -> Iterator[Batch]:
    while True:
        loader.seek(Cursor(epoch))
        yield from loader


def _slowest(ctx: DistContext, seconds: list[float]) -> list[float]:
    """Take the largest of each of `seconds` over the ranks. Collective."""
    largest: list[float] = ctx.gather(torch.tensor(seconds)).amax(dim=0).tolist()
    return largest


def _size_px(cfg: Config) -> int:
    return cfg.data.size_at(cfg.run.epochs - 1, cfg.run.epochs)


def _processor(ctx: DistContext) -> str:
    if ctx.device.type == "cuda":
        return torch.cuda.get_device_name(ctx.device)
    return f"{ctx.cores} cores of {platform.machine()}"


# ---- the file -------------------------------------------------------------------------------------------------------


def save(parts: Parts, file: Path) -> None:
    """Write `parts` as JSON. Raises `UserError` where that cannot be."""
    try:
        replace_file(file, (json.dumps(asdict(parts), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--save_parts: {file} cannot be written: {error.strerror}; give another file") from None


def read(file: Path) -> Parts:
    """Read what `save` wrote. Raises `UserError`."""
    try:
        tree: dict[str, Any] = json.loads(file.read_text())
        rows = {"steps": Step, "buckets": Bucket}
        for name, kind in rows.items():
            tree[name] = tuple(kind(*row) for row in tree[name])
        for name in ("inside", "between"):
            tree[name] = Link(*tree[name]) if tree[name] else None
        return Parts(**tree)
    except OSError as error:
        raise UserError(f"--parts: {file} cannot be read: {error.strerror}; give a file of --save_parts") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--parts: {file} holds no parts; give a file that --save_parts has written") from None
