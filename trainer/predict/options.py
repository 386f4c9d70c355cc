"""Options of `python -m trainer.predict`, and their mistakes."""

import argparse
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
    parser.add_argument("run", metavar="RUN", nargs="?", help="The run folder; it comes first.")
    parser.add_argument("images", metavar="IMAGES", nargs="?", help="A folder of images, or a table that names them.")
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
    require(
        len(arguments) > 1 and not arguments[1].startswith("-"),
        "IMAGES: they are missing behind the run folder; give a folder of images, or a table that names them",
    )
    _check(args)
    return args, rest


def _check(args: argparse.Namespace) -> None:
    images = Path(args.images)
    require(
        images.is_dir() or (images.is_file() and is_table(images)),
        f"IMAGES: {images} is neither a folder nor a table ({', '.join(TABLES)}); give one",
    )
    require(args.out is not None, "--out: it is missing; give the file to write, such as submission.csv")
    require(
        args.force or not args.out.exists(), f"--out: {args.out} exists; give another file, or --force to replace it"
    )
    require(args.out.parent.is_dir(), f"--out: {args.out.parent} is not a folder; make it, or give another file")
    require(args.topk >= 1, f"--topk: {args.topk} is below 1; give a number of classes")
    require(
        args.sample is None or not args.probabilities,
        "--probabilities: --sample decides which columns there are; leave one of them out",
    )
