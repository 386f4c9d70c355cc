"""The command `python -m trainer.export`: options and their mistakes first, then what takes seconds to import."""

import sys
from pathlib import Path

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.worker_pool import progress
from trainer.config import load_run
from trainer.export.options import parse


def main() -> None:
    args, overrides = parse(sys.argv[1:])
    folder = Path(args.run)
    cfg = load_run(folder, overrides)
    with progress(f"exporting to {args.format}"):
        from trainer.export.cli import export

        export(folder, cfg, args.format, args.out)


if __name__ == "__main__":
    run_command(main)
