"""python -m trainer [--config RECIPE] [--OPTION VALUE ...]; under torchrun, one process a GPU.

Exit codes: 0 at the end, 2 for what a user can mend, 75 where it hangs (see `watchdog`), and 128 + N on signal N.
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
        # Only now what takes seconds to import: a mistake in the options is told at once.
        from trainer.distributed import open_dist_context
        from trainer.loop import fit
        from trainer.resilience.signals import StopFlag

        with keep_printing(), StopFlag() as stop, open_dist_context() as ctx:
            fit(cfg, ctx, stop, started=starting.close)


if __name__ == "__main__":
    run_command(main)
