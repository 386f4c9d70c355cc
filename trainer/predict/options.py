"""Options of `python -m trainer.predict`, and their mistakes."""

import argparse
from itertools import takewhile
from pathlib import Path

from data_pipeline.common.cli import parse_known, plain_parser
from data_pipeline.common.errors import require
from data_pipeline.sources.tables.text_table import TABLES, is_table
from trainer.config import run_folder


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of this command; the run's are returned beside them. Raises `UserError`."""
    parser = plain_parser(
        prog="python -m trainer.predict",
        description="Predict the classes of images without labels.",
        epilog="Besides, --data.images FOLDER (of the images that a table names), --data.image_column NAME and the other "
        "options of python -m trainer.",
    )
    parser.add_argument(
        "paths",
        metavar="RUN … IMAGES",
        nargs="*",
        help="The run folder, or several, whose probabilities are averaged; then a folder of images, or a table that names "
        "them. They come first.",
    )
    parser.add_argument(
        "--oof", type=Path, metavar="FILE", help="A CSV for the images that the runs held out, with labels."
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="The CSV file to write.")
    parser.add_argument("--force", action="store_true", help="Replace it if it exists.")
    parser.add_argument("--sample", type=Path, metavar="FILE", help="A CSV whose columns, ids and order to follow.")
    parser.add_argument("--topk", type=int, default=1, metavar="K", help="The K likeliest classes of each image.")
    parser.add_argument("--probabilities", action="store_true", help="A column for each class, too.")
    parser.add_argument("--flip", action="store_true", help="Average over each image and its mirror image.")
    parser.add_argument(
        "--crops", type=int, default=1, choices=(1, 5), help="Average over so many crops of each image."
    )
    parser.add_argument("--fallback", metavar="CLASS", help="What images that cannot be read are; else they end it.")
    args, rest = parse_known(parser, arguments)
    run_folder(arguments, parser.prog)
    paths = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    args.runs, args.images = (paths, None) if args.oof and not args.out else (paths[:-1], paths[-1])
    require(
        len(args.runs) > 0,
        "IMAGES: they are missing behind the run folder; give a folder of images, or a table that names them",
    )
    if args.images is not None:
        _check_images(args)
    if args.oof is not None:
        _check_file("--oof", args.oof, args)
        require(
            args.out is None or args.out.resolve() != args.oof.resolve(),
            f"--oof: {args.oof} is the file of --out, too, and would be replaced by it; give another file",
        )
    return args, rest


def _check_images(args: argparse.Namespace) -> None:
    images = Path(args.images)
    require(
        images.is_dir() or (images.is_file() and is_table(images)),
        f"IMAGES: {images} is neither a folder nor a table ({', '.join(TABLES)}); give one",
    )
    require(args.out is not None, "--out: it is missing; give the file to write, such as submission.csv")
    _check_file("--out", args.out, args)
    require(args.topk >= 1, f"--topk: {args.topk} is below 1; give a number of classes")
    require(
        args.sample is None or not args.probabilities,
        "--probabilities: --sample decides which columns there are; leave one of them out",
    )


def _check_file(option: str, file: Path, args: argparse.Namespace) -> None:
    require(args.force or not file.exists(), f"{option}: {file} exists; give another file, or --force to replace it")
    require(file.parent.is_dir(), f"{option}: {file.parent} is not a folder; make it, or give another file")
