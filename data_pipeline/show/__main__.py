"""The command `python -m data_pipeline.show`: options and their mistakes first, then what takes seconds to import."""

import sys

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.show.options import parse


def main() -> None:
    args = parse(sys.argv[1:])
    cfg = DataConfig(**{**args.data, "augment": AugmentConfig(**vars(args.data["augment"]))})
    with progress("starting"):
        from data_pipeline.show.cli import draw
    draw(cfg, args.out, epoch=args.epoch, seed=args.seed, epochs=args.epochs)


if __name__ == "__main__":
    run_command(main)
