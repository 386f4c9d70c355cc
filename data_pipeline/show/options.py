"""Options of `python -m data_pipeline.show`, and their mistakes."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from data_pipeline.common import cli
from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.options import command_line


def parse(arguments: list[str]) -> Any:
    """Parse and check the options; `out` is a path. Raises `UserError`."""
    every = tuple(field.name for field in fields(DataConfig))
    parser = command_line("python -m data_pipeline.show", "Draw what the model will see in training.", every)
    parser.add_argument("--out", default="sheet.png", help="The PNG to write.")
    parser.add_argument("--force", action="store_true", help="Replace it if it exists.")
    parser.add_argument("--epoch", type=int, default=0, help="The epoch to begin with, from 0.")
    parser.add_argument(
        "--epochs", type=int, default=8, help="run.epochs, over which sizes in data.size_px are shared."
    )
    parser.add_argument("--seed", type=int, default=0, help="run.seed, which decides order and augmentation.")
    args = cli.parse(parser, arguments)
    args.out = out = Path(args.out)
    require(out.suffix.lower() == ".png", f"--out: {out} is no PNG; give a name that ends in .png")
    require(args.force or not out.exists(), f"--out: {out} exists; give another file, or --force to replace it")
    require(out.parent.is_dir(), f"--out: {out.parent} is not a folder; make it, or give another file")
    require(args.epoch >= 0, f"--epoch: {args.epoch} is negative; give a number from 0")
    require(args.epochs > 0, f"--epochs: {args.epochs} is not positive; give the number of passes")
    require(0 <= args.seed < 2**63, f"--seed: {args.seed} is out of range; give a number from 0 to 2^63")
    return args
