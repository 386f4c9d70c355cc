"""Score a run: python -m trainer.evaluate RUN [--flip] [--data.path FOLDER]; the work is in `scoring`."""

import sys

from data_pipeline.common.cli import parse_known, plain_parser
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.worker_pool import progress
from trainer.config import load_run, run_folder


def main() -> None:
    parser = plain_parser(
        prog="python -m trainer.evaluate",
        description="Score a run's best weights on its validation images, or on those of another folder.",
        epilog="Besides, --data.path FOLDER and the other options of python -m trainer.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="The run folder; it comes first.")
    parser.add_argument("--flip", action="store_true", help="Average over each image and its mirror image.")
    args, options = parse_known(parser, sys.argv[1:])
    folder, _ = run_folder(sys.argv[1:], parser.prog)
    cfg = load_run(folder, options)
    with progress("starting"):  # only now what takes seconds to import
        from trainer.scoring import score_run
    score_run(folder, cfg, flip=args.flip)


if __name__ == "__main__":
    run_command(main)
