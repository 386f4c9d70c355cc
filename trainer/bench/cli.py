"""What a recipe reaches on this machine, beside what the machine can do, and what holds it back.

    torchrun --nproc_per_node=2 -m trainer.bench [--config RECIPE] [--OPTION VALUE ...] [--peers] [--out DIR]
    python -m trainer.bench --worlds 1,2 [...]

The loader alone, the computation alone (synthetic images) without and with communication, all of it end to end, the
machine's ceilings and other trainers are measured in turn, round after round, in the same processes: a machine that
slows down slows them all. The first steps of a turn do not count, as they live on what was fetched before. Several
numbers of processes take turns too: each is started a few times.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch.profiler import record_function

from data_pipeline.bench.peers import copy_sample
from data_pipeline.common.errors import UserError
from data_pipeline.config import require
from data_pipeline.loader import Batch, Cursor, Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from trainer.bench import results, roofline
from trainer.bench.peers import Peer, Race, open_peers
from trainer.bench.results import BOTH, COMPUTE, DECODE, JOINED, LOADER, MATMUL, REDUCE, report, summary
from trainer.config import Config, load
from trainer.distributed import DistContext, open_dist_context, resolve_precision
from trainer.engine.base import Engine
from trainer.engine.gradient_compression import POWERSGD_START
from trainer.loop import build_engine, training_loader
from trainer.plan.allreduce_model import all_reduce_seconds
from trainer.tracking.profiler import Trace

ROUNDS, STEPS, SKIPPED = 9, 8, 4  # turns of each part; updates a turn that count; updates before those
BRIEF = 8  # times as many calls a turn of what takes little time
REPEATS = 3  # times that each number of processes is started
SAMPLE = 1024  # images that bare decoding and other trainers read
LR = 1e-3


Turn = Callable[[], float]
"""A turn of one part: what all ranks together did per second."""


def measure(
    cfg: Config,
    ctx: DistContext,
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    peers: bool = False,
    profile: Path | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a turn (world, round, part, rate per second), and the facts behind them. Collective. Raises `UserError`.

    At the recipe's last resolution. `profile` is a folder for a trace of three updates after the measurement.
    """
    with ExitStack() as stack:
        catalog = ctx.raise_together(lambda: open_catalog(cfg.data, "train"))
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="sluice-bench-")))
        left_out = _sample(cfg, folder, ctx)
        others: dict[str, Peer] = {}
        if peers and not left_out:  # before any thread of DALI's is there, because they fork
            others, left_out = open_peers(Race(folder, cfg, len(catalog.classes), ctx))
        for peer in others.values():
            stack.callback(peer.close)
        ours = Ours(cfg, catalog, ctx)
        facts = _facts(cfg, ours, len(catalog.classes), ctx) | {"left_out": left_out}
        turns: dict[str, Turn] = {
            **ours.turns(steps),
            **{name: partial(_peer_turn, ctx, peer, steps) for name, peer in others.items()},
            MATMUL: partial(timed, ctx, roofline.matmul(facts["precision"], ctx), steps),
        }
        if any((folder / "train").glob("*/*.jpg")):
            decode = roofline.decode(folder, facts["size_px"], ctx)
            turns[DECODE] = partial(timed, ctx, decode, BRIEF * steps)
        if ctx.world > 1:
            size = facts["gradient_bytes"]
            turns[REDUCE] = lambda: size / median(all_reduce_seconds(ctx, size, steps))
        rows = [
            {"world": ctx.world, "round": number, "part": name, "rate": turn()}
            for number in range(rounds)
            for name, turn in turns.items()
        ]
        if profile:
            with Trace(range(1, 4), profile, ctx) as trace:
                for number in (1, 2, 3):
                    ours.update()
                    trace.step(number)
        return rows, facts


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
            for _ in range(POWERSGD_START):  # as it sends whole gradients up to there
                self._compute(self.engine)

    def turns(self, steps: int) -> dict[str, Turn]:
        turns: dict[str, Turn] = {
            LOADER: partial(timed, self.ctx, self._load, BRIEF * steps, SKIPPED),
            COMPUTE: partial(timed, self.ctx, partial(self._compute, self.lone_engine), steps),
        }
        if self.ctx.world > 1:
            turns[JOINED] = partial(timed, self.ctx, partial(self._compute, self.engine), steps)
        return turns | {BOTH: partial(timed, self.ctx, self.update, steps, SKIPPED)}

    def update(self) -> float:
        """One whole update; returns the number of this rank's images in it."""
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


def timed(ctx: DistContext, act: Callable[[], float], steps: int, skipped: int = 1) -> float:
    """What all ranks together do per second, where `act` returns what it did; after `skipped` calls. Collective."""
    for _ in range(skipped):
        act()
    ctx.barrier()
    start = time.perf_counter()
    done = sum(act() for _ in range(steps))
    ctx.barrier()
    elapsed_s = time.perf_counter() - start
    return ctx.sum(torch.tensor(done, dtype=torch.float64, device=ctx.device)).item() / elapsed_s


def _peer_turn(ctx: DistContext, peer: Peer, steps: int) -> float:
    with peer.turn() as update:
        return timed(ctx, update, steps, max(SKIPPED, peer.ahead))


def _sample(cfg: Config, folder: Path, ctx: DistContext) -> list[str]:
    """Copy some images into `folder`, the same on all ranks; why not, where there are no JPEGs. Collective."""
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
    """What the rates belong to, as JSON can hold it."""
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
        "flops_per_image": roofline.flops_per_image(cfg.model, classes, size_px),
        "gradient_bytes": 4 * sum(p.numel() for p in ours.lone_engine.module.parameters()),
    }


def measure_worlds(worlds: list[int], options: list[str]) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """`measure` by each number of processes in turn, REPEATS times, by this command under torchrun.

    Raises `UserError`, a process's own where it met one.
    """
    rows: list[dict[str, Any]] = []
    facts: dict[int, dict[str, Any]] = {}
    with TemporaryDirectory(prefix="sluice-bench-") as folder:
        for repeat in range(REPEATS):
            for world in worlds:
                print(f"{world} processes, {repeat + 1} of {REPEATS}", file=sys.stderr)
                out = Path(folder) / f"{repeat}-{world}"
                _torchrun(world, [*options, "--out", str(out)])
                measured = json.loads((out / "bench.json").read_text())
                rows += [row | {"repeat": repeat} for row in measured["rounds"]]
                facts[world] = measured["facts"][0]
    return rows, facts


def _torchrun(world: int, options: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "-m", "trainer.bench", *options], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            _, said = process.communicate()
        except BaseException:
            process.terminate()  # and it ends its own, which a kill would not
            raise
    if process.returncode:
        for line in said.splitlines():
            if line.startswith("error: "):
                raise UserError(line.removeprefix("error: "))
        print(said, file=sys.stderr)
        raise UserError(f"--worlds: {world} processes ended with exit code {process.returncode}, as said above")


def worlds_of(text: str) -> list[int]:
    """Numbers of processes from "1,2". Raises `UserError`."""
    parts = text.split(",")
    require(
        all(part.isdecimal() and int(part) > 0 for part in parts) and len(set(parts)) == len(parts),
        f"--worlds: {text} does not fit; give different numbers of processes, such as 1,2",
    )
    return sorted(int(part) for part in parts)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and those of the recipe. Raises `UserError`."""
    parser = argparse.ArgumentParser(
        prog="trainer.bench",
        description="Say what a recipe reaches on this machine and what holds it back.",
        epilog="Besides, every option of python -m trainer; see python -m trainer --help.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for bench.csv, bench.json and scaling.png")
    parser.add_argument("--peers", action="store_true", help="let other trainers compete, where they are installed")
    parser.add_argument("--worlds", metavar="1,2", help="numbers of processes to start in turn, without torchrun")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each part (default: %(default)s)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="folder for a trace of three updates")
    parser.add_argument("--wandb", action="store_true", help="log the medians to Weights & Biases; needs --out")
    quiet = int(os.environ.get("RANK", 0)) > 0
    try:
        with redirect_stdout(io.StringIO()) if quiet else nullcontext():
            return parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(" ".join(str(error).removeprefix("argument ").split())) from None


def _check(args: argparse.Namespace, cfg: Config) -> None:
    """Find mistakes before the measuring begins. Raises `UserError`."""
    require(not args.out or args.out.is_dir() or not args.out.exists(), f"--out: {args.out} is a file; give a folder")
    require(args.rounds > 0, f"--rounds: {args.rounds} is not positive; give a number of turns such as {ROUNDS}")
    for name in ("bench.csv", "bench.json", "scaling.png") if args.out else ():
        require(not (args.out / name).exists(), f"--out: {args.out / name} exists; give another folder")
    if args.wandb:
        require(args.out is not None, "--wandb: W&B keeps files in a folder; give --out DIR")
        results.wandb_mode(cfg)
    if args.worlds:
        require("WORLD_SIZE" not in os.environ, "--worlds: it starts the processes itself; call it without torchrun")
        require(not args.profile, "--worlds: no trace is made of several numbers of processes; leave out --profile")


def main() -> None:
    args, options = _parse(sys.argv[1:])
    cfg = load(options)
    if args.worlds:
        _check(args, cfg)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or it would leave behind those that it started
        rounds = -(-args.rounds // REPEATS)
        own = [*options, "--rounds", str(rounds), *["--peers"] * args.peers]
        rows, facts = measure_worlds(worlds_of(args.worlds), own)
        primary = True
    else:
        with open_dist_context() as ctx:
            ctx.run_on_rank0(lambda: _check(args, cfg))
            own_rows, fact = measure(cfg, ctx, rounds=args.rounds, peers=args.peers, profile=args.profile)
            primary, rows, facts = ctx.primary, [row | {"repeat": 0} for row in own_rows], {ctx.world: fact}
    if primary:
        turns = pd.DataFrame(rows)
        print(report(turns, facts, cfg))
        print(f"medians and ranges of {len(turns) // len(summary(turns))} interleaved rounds of {STEPS} steps")
        if args.out:
            results.write(turns, facts, cfg, args.out)
        if args.wandb:
            results.log_to_wandb(turns, cfg, args.out)
