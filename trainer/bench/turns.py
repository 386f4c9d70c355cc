"""Parts that a benchmark measures in turn: our loader and engine, a peer's step, communication."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from data_pipeline.loader import Batch, Cursor, Loader
from data_pipeline.sources.catalog import Catalog
from trainer.bench.peer_turns import Peer
from trainer.bench.results import BOTH, COMPUTE, JOINED, LOADER
from trainer.config import Config
from trainer.distributed import DistContext
from trainer.engine.base import Engine
from trainer.engine.gradient_compression import POWERSGD_START
from trainer.plan.allreduce_model import all_reduce_seconds
from trainer.setup.parts import build_engine, training_loader

SKIPPED = 4  # optimizer steps of a turn before those that count
BRIEF = 8  # times as many calls in a turn of a part that takes little time
LR = 1e-3


class Timed(NamedTuple):
    """Rate of one part in one turn."""

    rate: float
    """Units per second of all ranks together."""
    call_s: float


class Turn(NamedTuple):
    """Way to measure one part."""

    run: Callable[[int, int], Timed]
    """Function of the number of calls that count, and of calls before them that do not. Collective."""
    per_step: int = 1
    """Calls that count, for each step of a turn."""
    skipped: int = 1
    """Calls before them that do not count, since they use what was fetched before."""

    def of(self, steps: int) -> Timed:
        return self.run(self.per_step * steps, self.skipped)


@dataclass
class Measured:
    """Results so far, which are kept even if the benchmark is broken off."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """One row for each turn: world, repeat, round, part, rate per second."""
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Number of processes -> circumstances of the rates, as JSON can hold them."""


class Ours:
    """A recipe's loader and engine, and another engine that does not communicate. Made on all ranks at once."""

    def __init__(self, cfg: Config, catalog: Catalog, ctx: DistContext) -> None:
        self.ctx, self.micro_batches = ctx, cfg.optim.accumulate
        loader = ctx.raise_together(lambda: training_loader(cfg, catalog, ctx))
        self._batches = _endless(loader, cfg.run.epochs - 1)
        batch = self._fetch()[0]
        self._synthetic = [batch._replace(images=torch.randint_like(batch.images, 256))] * self.micro_batches
        self._rows = float(batch.images.shape[0] * self.micro_batches)
        classes = len(catalog.classes)
        self.engine = build_engine(cfg, classes, ctx)
        if ctx.world > 1:
            alone = replace(cfg, engine=replace(cfg.engine, name="ddp"))
            self.lone_engine = build_engine(alone, classes, replace(ctx, rank=0, world=1))
        else:
            self.lone_engine = self.engine
        if cfg.engine.compression == "powersgd" and ctx.world > 1:
            for _ in range(POWERSGD_START):  # it sends whole gradients until then
                self._compute(self.engine)

    def turns(self) -> dict[str, Turn]:
        turns = {
            LOADER: Turn(partial(timed, self.ctx, self._load), BRIEF, SKIPPED),
            COMPUTE: Turn(partial(timed, self.ctx, partial(self._compute, self.lone_engine))),
        }
        if self.ctx.world > 1:
            turns[JOINED] = Turn(partial(timed, self.ctx, partial(self._compute, self.engine)))
        return turns | {BOTH: Turn(partial(timed, self.ctx, self.update), skipped=SKIPPED)}

    def update(self) -> float:
        """Make one optimizer step; returns the number of this rank's images in it."""
        batches = self._fetch()
        self.engine.step(batches, LR)
        return float(sum(batch.num_real for batch in batches))

    def _load(self) -> float:
        return float(sum(batch.num_real for batch in self._fetch()))

    def _compute(self, engine: Engine) -> float:
        engine.step(self._synthetic, LR)
        return self._rows

    def _fetch(self) -> list[Batch]:
        with record_function("data"):
            return [next(self._batches) for _ in range(self.micro_batches)]


def timed(ctx: DistContext, act: Callable[[], float], calls: int, skipped: int) -> Timed:
    """Measure all ranks together in `calls` of `act`, which returns its amount; after `skipped` calls. Collective."""
    for _ in range(skipped):
        act()
    ctx.barrier()
    start = time.perf_counter()
    done = sum(act() for _ in range(calls))
    ctx.barrier()
    elapsed_s = time.perf_counter() - start
    total = ctx.sum(torch.tensor(done, dtype=torch.float64, device=ctx.device)).item()
    return Timed(total / elapsed_s, elapsed_s / calls)


def peer_turn(ctx: DistContext, peer: Peer) -> Turn:
    def run(calls: int, skipped: int) -> Timed:
        with peer.turn() as update:
            return timed(ctx, update, calls, skipped)

    return Turn(run, skipped=max(SKIPPED, peer.ahead))


def reduce_bytes(ctx: DistContext, size_bytes: int, calls: int, _: int) -> Timed:
    call_s = median(all_reduce_seconds(ctx, size_bytes, calls))
    return Timed(size_bytes / call_s, call_s)


def _endless(loader: Loader, epoch: int) -> Iterator[Batch]:
    while True:
        loader.seek(Cursor(epoch))
        yield from loader
