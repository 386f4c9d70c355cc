"""The command `python -m trainer.plan`: options and their mistakes first, then what takes seconds to import."""

import sys

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.worker_pool import progress
from trainer.config import load
from trainer.plan.options import layout_of, parse


def main() -> None:
    args, rest = parse(sys.argv[1:])
    cfg = load(rest)
    layout = layout_of(args, cfg)
    with progress("starting"):
        from trainer.plan.cli import plan_nodes
    plan_nodes(args, cfg, layout)


if __name__ == "__main__":
    run_command(main)
