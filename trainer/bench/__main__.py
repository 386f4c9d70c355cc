"""The command `python -m trainer.bench`: options and their mistakes first, then what takes seconds to import."""

import sys

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.worker_pool import progress
from trainer.bench.options import check, parse
from trainer.config import load


def main() -> None:
    args, options = parse(sys.argv[1:])
    cfg = load(options)
    check(args, cfg)
    with progress("starting"):
        from trainer.bench.cli import bench
    bench(args, options, cfg)


if __name__ == "__main__":
    run_command(main)
