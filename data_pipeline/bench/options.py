"""Options of `python -m data_pipeline.bench`, and their mistakes."""

from pathlib import Path
from typing import Any

from data_pipeline.bench.budget import MINUTES
from data_pipeline.common import cli
from data_pipeline.common.errors import require
from data_pipeline.options import CHOOSING, command_line

SIZES_PX = "224,128,64"


def parse(arguments: list[str]) -> Any:
    """Parse and check the options; `sizes` is a list and `out` a path or None. Raises `UserError`."""
    parser = command_line("python -m data_pipeline.bench", "Compare data loaders on this machine.", ("path", *CHOOSING))
    parser.add_argument("--sizes", default=SIZES_PX, help="Sides of the images in pixels, with commas between.")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="Longest time: rounds become fewer to end in it."
    )
    parser.add_argument(
        "--sources",
        action="store_true",
        help="Compare our own loader on the same images in class folders, a pack, tars, zip files, Parquet and object stores, "
        "beside others' that are installed.",
    )
    parser.add_argument("--out", help="A folder for bench.csv and bench.png; nothing is written if not given.")
    args = cli.parse(parser, arguments)
    args.sizes = sizes_of(args.sizes)
    args.out = out = Path(args.out) if args.out else None
    if out:
        require(out.is_dir() or not out.exists(), f"--out: {out} is a file; give a folder")
        for name in ("bench.csv", "bench.png"):
            require(not (out / name).exists(), f"--out: {out / name} exists; give another folder")
    require(args.minutes > 0, f"--minutes: {args.minutes:g} is not positive; give a time such as {MINUTES:g}")
    return args


def sizes_of(text: str) -> list[int]:
    """Parse sides in pixels, such as "224,128,64". Raises `UserError`."""
    parts = text.split(",")
    require(
        all(part.isdecimal() and 8 <= int(part) <= 4096 for part in parts) and len(set(parts)) == len(parts),
        f"--sizes: {text} does not fit; give different sides of 8 to 4096 pixels, as {SIZES_PX}",
    )
    return [int(part) for part in parts]
