"""python -m launch COMMAND ...: train here, hand runs to SLURM, and see what has become of them."""

import sys
from importlib import import_module

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError

COMMANDS = {
    "local": ("launch.local", "main", "train on this machine, one process for each GPU"),
    "submit": ("launch.slurm.submit", "main", "hand a run to SLURM"),
    "sweep": ("launch.sweep.cli", "main", "a run for each of many settings, as a job array or here"),
    "summary": ("launch.sweep.summary", "main", "what a sweep has found: a table and a plot"),
    "status": ("launch.runs", "status", "a table of the runs that were submitted"),
    "logs": ("launch.runs", "logs", "what a run prints; -f follows it"),
    "cancel": ("launch.runs", "cancel", "end a run's job; it saves first"),
    "resubmit": ("launch.slurm.submit", "resubmit", "hand a run that has ended to SLURM again"),
    "overview": ("launch.pages.overview", "main", "one page of HTML about runs"),
    "dashboard": ("launch.pages.dashboards", "main", "a workspace of Weights & Biases about runs"),
}
"""Module and function behind each command, imported when it is called for, and what it does."""


def main() -> None:
    name, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    if name in ("-h", "--help"):
        print("usage: python -m launch COMMAND ...\n")
        for command, (_, _, what) in COMMANDS.items():
            print(f"  {command:10} {what}")
    elif name in COMMANDS:
        module, function, _ = COMMANDS[name]
        getattr(import_module(module), function)(arguments)
    else:
        raise UserError(f"{name or 'COMMAND'}: no such command; give one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    run_command(main)
