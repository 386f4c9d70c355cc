"""python -m launch local [-n RANKS] [trainer options]: train on this machine, one process for each GPU."""

import sys

from data_pipeline.common.errors import UserError
from trainer.config import load

USAGE = """usage: python -m launch local [-n RANKS] [--config RECIPE] [--OPTION VALUE ...]

Train on this machine, as torchrun does, but without its report: a mistake in the options is one line and exit code 2.

  -n RANKS    processes; one for each GPU if not given, or one where there is none. It comes first.

All other options are those of python -m trainer; see python -m trainer --help."""


def main(arguments: list[str]) -> None:
    """Exit with the code of the process that failed first, or with 0. Raises `UserError`."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    ranks, options = split_ranks(arguments)
    cfg = load(options)  # so a mistake is reported before torch is imported and before any process is started
    from launch.workers import run_workers, this_machine
    from trainer.distributed import gpu_count

    sys.exit(run_workers(this_machine(ranks or gpu_count(cfg.engine.device) or 1), "trainer", options))


def split_ranks(arguments: list[str]) -> tuple[int | None, list[str]]:
    """Split the number behind a leading -n from the options that follow. Raises `UserError`."""
    if arguments[:1] != ["-n"]:
        return None, arguments
    number = "".join(arguments[1:2])
    if not number.isdecimal() or int(number) == 0:
        raise UserError(f"-n: {number!r} is no number of processes; give one such as 2, or leave it out for one a GPU")
    return int(number), arguments[2:]
