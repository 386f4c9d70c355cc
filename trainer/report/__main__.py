"""The command `python -m trainer.report`: options and their mistakes first, then what takes seconds to import."""

import sys

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.worker_pool import progress
from trainer.config import load_run
from trainer.report.options import parse


def main() -> None:
    folder, overrides, out = parse(sys.argv[1:])
    cfg = load_run(folder, overrides)
    with progress("starting"):
        from trainer.report.cli import report_run
    report_run(folder, cfg, out)


if __name__ == "__main__":
    run_command(main)
