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
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch

from data_pipeline.bench.budget import MINUTES, reported, rounds_within
from data_pipeline.bench.peers import copy_sample
from data_pipeline.common.errors import UserError, require
from data_pipeline.common.worker_pool import progress
from data_pipeline.sources.catalog import open_catalog
from trainer.bench import results, roofline
from trainer.bench.options import ROUNDS, worlds_of
from trainer.bench.peer_turns import Peer, open_peers
from trainer.bench.peers import Race
from trainer.bench.results import DECODE, MATMUL, REDUCE, report
from trainer.bench.turns import BRIEF, Measured, Ours, Turn, peer_turn, reduce_bytes, timed
from trainer.bench.worlds import REPEATS, measure_worlds
from trainer.config import Config
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.precision import resolve_precision
from trainer.model.config import is_timm
from trainer.model.flops import flops_per_image
from trainer.tracking.profiler import Trace

STEPS = 8  # optimizer steps of a turn that count
FEW = 3  # rounds for which turns are shortened where time is short; after that there are fewer rounds
SAMPLE = 1024  # images that bare decoding and other trainers read


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
            **{name: peer_turn(ctx, peer) for name, peer in others.items()},
            MATMUL: Turn(partial(timed, ctx, roofline.matmul(facts["precision"], ctx))),
        }
        if any((folder / "train").glob("*/*.jpg")):
            decode = roofline.decode(folder, facts["size_px"], ctx)
            turns[DECODE] = Turn(partial(timed, ctx, decode), BRIEF)
        if ctx.world > 1:
            turns[REDUCE] = Turn(partial(reduce_bytes, ctx, facts["gradient_bytes"]))

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


def _sample(cfg: Config, folder: Path, ctx: DistContext) -> list[str]:
    """Copy some images into `folder`, the same on all ranks; returns the reason where there are no JPEGs. Collective."""
    try:
        ctx.raise_together(lambda: copy_sample(cfg.data, folder, SAMPLE))
    except UserError as error:
        return [f"{DECODE}, peers: {error}"]
    return []


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
