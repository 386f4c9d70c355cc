"""python -m trainer [--config RECIPE] [--OPTION VALUE ...]; under torchrun, one process a GPU.

Exit codes: 0 at the end, 2 for a mistake that a user can correct, 75 for a hang (see `watchdog`), and 128 + N on signal N.
"""

import sys
from contextlib import ExitStack

from data_pipeline.common.entry_point import keep_printing, run_command
from data_pipeline.common.worker_pool import progress
from trainer.config import load


def main() -> None:
    cfg = load(sys.argv[1:])
    with ExitStack() as starting:
        starting.enter_context(progress("starting"))
        # Import now what takes seconds: a mistake in the options is reported before.
        from trainer.loop import fit
        from trainer.resilience.signals import StopFlag
        from trainer.setup.start import join_run

        with keep_printing(), StopFlag() as stop, join_run(cfg) as ctx:
            fit(cfg, ctx, stop, started=starting.close)


if __name__ == "__main__":
    run_command(main)
