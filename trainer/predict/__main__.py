"""The command `python -m trainer.predict`: options and their mistakes first, then what takes seconds to import."""

import sys
from pathlib import Path

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.worker_pool import progress
from trainer.config import load_run
from trainer.predict.options import parse


def main() -> None:
    args, overrides = parse(sys.argv[1:])
    # The images are others than the run's own, and so is where a table of them has their names.
    theirs = ["--data.path", args.images, "--data.images=null", "--data.image_column=null"] if args.images else []
    runs = [(Path(run), load_run(Path(run), [*theirs, *overrides])) for run in args.runs]
    own = [(folder, load_run(folder, [] if args.images else overrides)) for folder, _ in runs]
    with progress("starting"):
        from trainer.predict.cli import write_predictions
        from trainer.predict.out_of_fold import write_held_out
    if args.oof:
        write_held_out(args, own)
    if args.images:
        write_predictions(args, runs)


if __name__ == "__main__":
    run_command(main)
