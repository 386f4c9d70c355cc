"""python -m launch local [-n RANKS] [--restarts N] [trainer options]: train on this machine, one process for each GPU."""

import os
import signal
import sys

from data_pipeline.common.errors import UserError
from trainer.config import load
from trainer.resilience.wandb_agent import Agent, trial_of

USAGE = """usage: python -m launch local [-n RANKS] [--restarts N] [--config RECIPE] [--OPTION VALUE ...]

Train on this machine, as torchrun does, but without its report: a mistake in the options is one line and exit code 2.

  -n RANKS      processes; one for each GPU if not given, or one where there is none.
  --restarts N  start them again, from the last checkpoint, up to N times after one of them was killed, failed or hung.

These come first.

All other options are those of python -m trainer; see python -m trainer --help."""


def main(arguments: list[str]) -> None:
    """Exit with the code of the process that failed first, or with 0. Raises `UserError`."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    numbers, options = split_numbers(arguments)
    cfg = load(options)  # so a mistake is reported before torch is imported and before any process is started
    from launch.workers import run_workers
    from trainer.distributed import gpu_count

    ranks = numbers.get("-n") or gpu_count(cfg.engine.device) or 1
    agent = Agent.above() if trial_of(os.environ) else None
    code = run_workers(ranks, "trainer", options, cfg.folder, numbers.get("--restarts", 0))
    # A trial that its sweep has stopped is no failure: after three of them its agent would leave.
    stopped = agent and code == 128 + signal.SIGTERM and not agent.took_away(signal.SIGTERM)
    sys.exit(0 if stopped else code)


NUMBERS = {
    "-n": "processes; give one such as 2, or leave it out for one a GPU",
    "--restarts": "restarts; give one such as 3",
}
"""The options that come first, and what the number behind each is."""


def split_numbers(arguments: list[str]) -> tuple[dict[str, int], list[str]]:
    """Split the numbers behind leading options of NUMBERS from the options that follow. Raises `UserError`."""
    numbers: dict[str, int] = {}
    while arguments and arguments[0].partition("=")[0] in NUMBERS:
        option, equals, number = arguments[0].partition("=")
        if not equals:
            number = "".join(arguments[1:2])
        if not number.isdecimal() or int(number) == 0:
            raise UserError(f"{option}: {number!r} is no number of {NUMBERS[option]}")
        numbers[option] = int(number)
        arguments = arguments[1 if equals else 2 :]
    return numbers, arguments
