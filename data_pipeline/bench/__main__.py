"""The command `python -m data_pipeline.bench`: options and their mistakes first, then what takes seconds to import."""

import sys

from data_pipeline.bench.options import parse
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig


def main() -> None:
    args = parse(sys.argv[1:])
    cfg = DataConfig(**args.data)
    with progress("starting"):
        from data_pipeline.bench.cli import bench
    bench(cfg, args.sizes, args.out, args.minutes, sources=args.sources)


if __name__ == "__main__":
    run_command(main)
