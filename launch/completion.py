"""Shell completion: `sluice completion bash` (or zsh, tcsh) prints a script of commands and options."""

import argparse
from collections.abc import Mapping

import shtab

from trainer.config import option_names

TRAINERS = ("train", "submit", "local", "bench", "plan", "evaluate", "predict", "report", "export")
"""Commands that take the trainer's dotted options."""


def completion_script(shell: str, commands: Mapping[str, str]) -> str:
    """The completion script of `sluice` for a shell of `shtab.SUPPORTED_SHELLS`; `commands`: what each does, by its name."""
    parser = argparse.ArgumentParser(prog="sluice")
    subparsers = parser.add_subparsers()
    for name, what in commands.items():
        command = subparsers.add_parser(name, help=what)
        if name in TRAINERS:
            for option in option_names():
                command.add_argument(f"--{option}")
        command.add_argument("files", nargs="*").complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)
