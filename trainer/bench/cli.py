"""Measure a recipe on this machine, beside the machine's limits, and say what holds it back.

    torchrun --nproc_per_node=2 -m trainer.bench [--config RECIPE] [--OPTION VALUE ...] [--peers] [--out DIR]
    python -m trainer.bench --worlds 1,2 [...]

Measured in turn are the loader alone, the computation alone (synthetic images) without and with communication, all of it
end to end, the machine's ceilings and other trainers: round after round, in the same processes, so that a machine that
slows down slows them all. The first steps of a turn do not count, as they use what was fetched before. Several
numbers of processes take turns too: each is started a few times. It all takes no longer than --minutes: turns become
shorter and rounds fewer, down to one round of one step. A benchmark that is broken off reports and keeps its results.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch.profiler import record_function

from data_pipeline.bench.budget import MINUTES, reported, rounds_within
from data_pipeline.bench.peers import copy_sample
from data_pipeline.common.errors import UserError, require
from data_pipeline.common.worker_pool import progress
from data_pipeline.loader import Batch, Cursor, Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from trainer.bench import results, roofline
from trainer.bench.options import ROUNDS, worlds_of
from trainer.bench.peers import Peer, Race, open_peers
from trainer.bench.results import BOTH, COMPUTE, DECODE, JOINED, LOADER, MATMUL, REDUCE, report
from trainer.config import Config
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.base import Engine
from trainer.engine.gradient_compression import POWERSGD_START
from trainer.engine.precision import resolve_precision
from trainer.model.config import is_timm
from trainer.model.flops import flops_per_image
from trainer.plan.allreduce_model import all_reduce_seconds
from trainer.setup.parts import build_engine, training_loader
from trainer.tracking.profiler import Trace

STEPS, SKIPPED = 8, 4  # optimizer steps of a turn that count; optimizer steps before those
FEW = 3  # rounds for which turns are shortened where time is short; after that there are fewer rounds
BRIEF = 8  # times as many calls in a turn of a part that takes little time
REPEATS = 3  # times that each number of processes is started
SAMPLE = 1024  # images that bare decoding and other trainers read
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

    def of(self, steps: int) -> Timed:
        return self.run(self.per_step * steps, self.skipped)


@dataclass
class Measured:
    """Results so far, which are kept even if the benchmark is broken off."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """One row for each turn: world, repeat, round, part, rate per second."""
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Number of processes -> circumstances of the rates, as JSON can hold them."""


def measure(
    cfg: Config,
    ctx: DistContext,
    into: Measured,
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    minutes: float = MINUTES,
    peers: bool = False,
    profile: Path | None = None,
) -> None:
    """Measure at the recipe's last resolution. Collective. Raises `UserError`.

    `profile` is a folder for a trace of three optimizer steps after the measurement.
    """
    # Make everything before the first turn, so that no start-up is measured: data, other trainers, ours, the limits.
    deadline_s = time.monotonic() + 60 * minutes
    with ExitStack() as stack:
        stack.enter_context(progress("preparing"))
        catalog = ctx.raise_together(lambda: open_catalog(cfg.data, "train"))
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="sluice-bench-")))
        left_out = _sample(cfg, folder, ctx)
        others: dict[str, Peer] = {}
        if peers and not left_out:  # before DALI starts any thread, because they fork
            others, left_out = open_peers(Race(folder, cfg, len(catalog.classes), ctx))
        for peer in others.values():
            stack.callback(peer.close)
        ours = Ours(cfg, catalog, ctx)
        facts = _facts(cfg, ours, len(catalog.classes), ctx) | {"left_out": left_out}
        turns: dict[str, Turn] = {
            **ours.turns(),
            **{name: _peer_turn(ctx, peer) for name, peer in others.items()},
            MATMUL: Turn(partial(timed, ctx, roofline.matmul(facts["precision"], ctx))),
        }
        if any((folder / "train").glob("*/*.jpg")):
            decode = roofline.decode(folder, facts["size_px"], ctx)
            turns[DECODE] = Turn(partial(timed, ctx, decode), BRIEF)
        if ctx.world > 1:
            turns[REDUCE] = Turn(partial(_reduce, ctx, facts["gradient_bytes"]))

        # A first round of one step, which does not count, shows how long the others may be.
        call_s = {name: turn.of(1).call_s for name, turn in turns.items()}
        fitting = fit_into(deadline_s - time.monotonic(), turns, call_s, rounds, steps)
        few_rounds, few_steps = ctx.broadcast_from_rank0(lambda: fitting)
        into.facts[ctx.world] = facts | {"steps": few_steps, "asked": [rounds, steps, minutes]}
        with progress("measuring", few_rounds * len(turns), unit="turns") as advance:
            for number in rounds_within(few_rounds, deadline_s, ctx.broadcast_from_rank0):
                for name, turn in turns.items():
                    row = {"world": ctx.world, "repeat": 0, "round": number, "part": name}
                    into.rows.append(row | {"rate": turn.of(few_steps).rate})
                    advance(1)
        # A profile slows down what it traces, so it comes after the turns.
        if profile:
            with Trace(range(1, 4), profile, ctx) as trace:
                for number in (1, 2, 3):
                    ours.update()
                    trace.step(number)


def fit_into(
    left_s: float, turns: dict[str, Turn], call_s: dict[str, float], rounds: int, steps: int
) -> tuple[int, int]:
    """Choose rounds and steps of a turn that fit into `left_s` seconds: turns are shortened where three rounds would not fit."""
    before_s = sum(turn.skipped * call_s[name] for name, turn in turns.items())
    step_s = sum(turn.per_step * call_s[name] for name, turn in turns.items())
    few_steps = int((left_s / min(rounds, FEW) - before_s) / step_s)
    few_steps = min(max(few_steps, 1), steps)
    few_rounds = int(left_s / (before_s + few_steps * step_s))
    return min(max(few_rounds, 1), rounds), few_steps


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


def _peer_turn(ctx: DistContext, peer: Peer) -> Turn:
    def run(calls: int, skipped: int) -> Timed:
        with peer.turn() as update:
            return timed(ctx, update, calls, skipped)

    return Turn(run, skipped=max(SKIPPED, peer.ahead))


def _reduce(ctx: DistContext, size_bytes: int, calls: int, _: int) -> Timed:
    call_s = median(all_reduce_seconds(ctx, size_bytes, calls))
    return Timed(size_bytes / call_s, call_s)


def _sample(cfg: Config, folder: Path, ctx: DistContext) -> list[str]:
    """Copy some images into `folder`, the same on all ranks; returns the reason where there are no JPEGs. Collective."""
    try:
        ctx.raise_together(lambda: copy_sample(cfg.data, folder, SAMPLE))
    except UserError as error:
        return [f"{DECODE}, peers: {error}"]
    return []


def _endless(loader: Loader, epoch: int) -> Iterator[Batch]:
    while True:
        loader.seek(Cursor(epoch))
        yield from loader


def _facts(cfg: Config, ours: Ours, classes: int, ctx: DistContext) -> dict[str, Any]:
    """Describe the circumstances of the rates, as JSON can hold them."""
    last, device = cfg.run.epochs - 1, ctx.device
    size_px = cfg.data.size_at(last, cfg.run.epochs)
    return {
        "world": ctx.world,
        "cores": ctx.cores,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "size_px": size_px,
        "batch": cfg.data.batch_at(last, cfg.run.epochs),
        "precision": resolve_precision(cfg.engine.precision, device),
        "best_precision": resolve_precision("auto", device),
        "flops_per_image": flops_per_image(cfg.model, classes, cfg.data.augment.seen_px(size_px)),
        "gradient_bytes": 4 * sum(p.numel() for p in ours.lone_engine.module.parameters()),
    }


def measure_worlds(worlds: list[int], options: list[str], minutes: float, into: Measured) -> None:
    """Measure with each number of processes in turn, REPEATS times or less, by this command under torchrun.

    Raises `UserError`, that of a process where one raised it.
    """
    deadline_s = time.monotonic() + 60 * minutes
    starts = REPEATS * len(worlds)
    with progress("measuring", starts, unit="starts") as advance:
        for repeat in rounds_within(REPEATS, deadline_s):
            for world in worlds:
                left_s = max(deadline_s - time.monotonic(), 1.0)
                _measure_world(world, repeat, [*options, "--minutes", f"{left_s / starts / 60:.2f}"], into)
                starts -= 1
                advance(1)
    if starts:
        short = f"each was started {repeat + 1} of {REPEATS} times, as more did not fit into {minutes:g} minutes"
        print(f"{short}: give more --minutes", file=sys.stderr)


def _measure_world(world: int, repeat: int, options: list[str], into: Measured) -> None:
    with TemporaryDirectory(prefix="sluice-bench-") as folder:
        try:
            _torchrun(world, [*options, "--out", folder])
        finally:  # its results until it was broken off count as well
            file = Path(folder) / "bench.json"
            if file.exists():
                measured = json.loads(file.read_text())
                into.rows += [row | {"repeat": repeat} for row in measured["rounds"]]
                into.facts[world] = measured["facts"][0]


def _torchrun(world: int, options: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "-m", "trainer.bench", *options], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            _, said = process.communicate()
        except BaseException:
            process.terminate()  # it ends its own processes, which a kill would not
            process.communicate()
            raise
    if process.returncode:
        for line in said.splitlines():
            if line.startswith("error: "):
                raise UserError(line.removeprefix("error: "))
        print(said, file=sys.stderr)
        processes = f"{world} process" + "es" * (world > 1)
        raise UserError(f"--worlds: {processes} ended with exit code {process.returncode}, as said above")


def bench(args: argparse.Namespace, options: list[str], cfg: Config) -> None:
    """Measure and report as the command's options say; `options` are those of the recipe. Raises `UserError`."""
    require(
        not (args.peers and is_timm(cfg.model.name)),
        f"--peers: they train torchvision's networks, and {cfg.model.name} is timm's; leave it out",
    )
    measured = Measured()
    kept = reported(lambda why: _report(measured, cfg, args, why))
    if args.worlds:
        rounds = -(-args.rounds // REPEATS)
        own = [*options, "--rounds", str(rounds), *["--peers"] * args.peers]
        with kept:
            measure_worlds(worlds_of(args.worlds), own, args.minutes, measured)
        return
    joined = open_dist_context(device=cfg.engine.device, bind_cores=cfg.engine.bind_cores)
    with joined as ctx, kept if ctx.primary else nullcontext():
        measure(
            cfg,
            ctx,
            measured,
            rounds=args.rounds,
            minutes=args.minutes,
            peers=args.peers,
            profile=args.profile,
        )


def _report(measured: Measured, cfg: Config, args: argparse.Namespace, why: str) -> None:
    """Write and print the results; `why` says why the benchmark was broken off."""
    if not measured.rows:
        return
    turns = pd.DataFrame(measured.rows)
    if args.out:  # written first: perhaps nobody reads what is printed
        results.write(turns, measured.facts, cfg, args.out)
    print(report(turns, measured.facts, cfg))
    print(why, end="\n" * bool(why), flush=True)
    if args.wandb and not why:
        results.log_to_wandb(turns, cfg, args.out)
