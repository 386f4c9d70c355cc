"""Options of `python -m trainer.bench`, and their mistakes."""

import argparse
import io
import os
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from data_pipeline.bench.budget import MINUTES
from data_pipeline.common.cli import parse_known, plain_parser
from data_pipeline.common.errors import require
from data_pipeline.common.launcher import launched_rank
from trainer.config import Config

ROUNDS = 9
"""Turns of each part."""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of this command; the recipe's are returned beside them. Raises `UserError`."""
    parser = plain_parser(
        prog="python -m trainer.bench",
        description="Say what a recipe reaches on this machine and what holds it back.",
        epilog="Besides, every option of python -m trainer; see python -m trainer --help.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for bench.csv, bench.json and scaling.png")
    parser.add_argument("--peers", action="store_true", help="let other trainers compete, where they are installed")
    parser.add_argument("--worlds", metavar="1,2", help="numbers of processes to start in turn, without torchrun")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each part (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="longest time: turns are shortened to it (default: %(default)s)"
    )
    parser.add_argument("--profile", type=Path, metavar="DIR", help="folder for a trace of three optimizer steps")
    parser.add_argument("--wandb", action="store_true", help="log the medians to Weights & Biases; needs --out")
    quiet = launched_rank() > 0
    with redirect_stdout(io.StringIO()) if quiet else nullcontext():  # so that --help is printed once
        return parse_known(parser, arguments)


def check(args: argparse.Namespace, cfg: Config) -> None:
    """Check the options before the measurement begins. Raises `UserError`."""
    require(not args.out or args.out.is_dir() or not args.out.exists(), f"--out: {args.out} is a file; give a folder")
    require(args.rounds > 0, f"--rounds: {args.rounds} is not positive; give a number of turns such as {ROUNDS}")
    require(args.minutes > 0, f"--minutes: {args.minutes:g} is not positive; give a time such as {MINUTES}")
    for name in ("bench.csv", "bench.json", "scaling.png") if args.out else ():
        require(not (args.out / name).exists(), f"--out: {args.out / name} exists; give another folder")
    if args.wandb:
        require(args.out is not None, "--wandb: W&B keeps files in a folder; give --out DIR")
        wandb_mode(cfg)
    if args.worlds:
        worlds_of(args.worlds)
        require("WORLD_SIZE" not in os.environ, "--worlds: it starts the processes itself; call it without torchrun")
        require(not args.profile, "--worlds: no trace is made of several numbers of processes; leave out --profile")


def worlds_of(text: str) -> list[int]:
    """Parse numbers of processes, such as "1,2". Raises `UserError`."""
    parts = text.split(",")
    require(
        all(part.isdecimal() and int(part) > 0 for part in parts) and len(set(parts)) == len(parts),
        f"--worlds: {text} does not fit; give different numbers of processes, such as 1,2",
    )
    return sorted(int(part) for part in parts)


def wandb_mode(cfg: Config) -> str:
    """Choose auto, online or offline. Raises `UserError` where W&B is off."""
    mode = os.environ.get("WANDB_MODE") or "auto" if cfg.tracking.wandb == "auto" else cfg.tracking.wandb
    require(
        mode not in ("off", "disabled"), f"--wandb: tracking.wandb is {mode}; give --tracking.wandb offline or online"
    )
    return mode
