"""The commands of `python -m launch`, and `sluice`, which has these and every other `python -m` command of the project."""

import sys
from importlib import import_module

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError, require

COMMANDS = {
    "local": ("launch.local", "main", "train on this machine, one process for each GPU"),
    "submit": ("launch.slurm.submit", "main", "hand a run to SLURM"),
    "check-nodes": ("launch.slurm.check_nodes", "main", "accept a cluster: each node, and the network between them"),
    "sweep": ("launch.sweep.cli", "main", "a run for each of many settings, as a job array or here"),
    "summary": ("launch.sweep.summary", "main", "what a sweep has found: a table and a plot"),
    "status": ("launch.runs", "status", "a table of the runs that were submitted"),
    "logs": ("launch.runs", "logs", "what a run prints; -f follows it"),
    "cancel": ("launch.runs", "cancel", "end a run's job; it saves first"),
    "resubmit": ("launch.slurm.submit", "resubmit", "hand a run that has ended to SLURM again"),
    "overview": ("launch.pages.overview", "main", "one page of HTML about runs"),
    "dashboard": ("launch.pages.dashboards", "main", "a workspace of Weights & Biases about runs"),
}
"""Module and function behind each command, imported when the command is called; and a line for the index."""

MODULES = {
    "train": ("trainer.__main__", "train a ResNet, in one process; under torchrun, in many"),
    "evaluate": ("trainer.evaluate", "scores of a run on validation images"),
    "predict": ("trainer.predict.__main__", "classes of images, for people or for Kaggle"),
    "report": ("trainer.report.__main__", "a page about one run: confusion, worst images"),
    "compare": ("trainer.compare.__main__", "a page that compares runs"),
    "export": ("trainer.export.__main__", "a run's network for other programs"),
    "bench": ("trainer.bench.__main__", "how fast this machine trains, and what holds it up"),
    "plan": ("trainer.plan.__main__", "what more GPUs would bring"),
    "check": ("trainer.check.__main__", "accept a machine, item by item"),
    "pack": ("data_pipeline.pack.__main__", "images at the size that training needs, in few files"),
    "verify": ("data_pipeline.verify.__main__", "find the images that cannot be read"),
    "show": ("data_pipeline.show.__main__", "a sheet of images as the model sees them"),
    "data-bench": ("data_pipeline.bench.__main__", "how fast images are loaded"),
}
"""Module of each further command of `sluice`, which has a function `main`; and a line for the index."""


def main() -> None:
    """Run `python -m launch COMMAND ...`. Raises `UserError`."""
    name, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    if name in ("", "-h", "--help"):
        print(_index("python -m launch", {command: what for command, (_, _, what) in COMMANDS.items()}))
    elif name in COMMANDS:
        module, function, _ = COMMANDS[name]
        getattr(import_module(module), function)(arguments)
    else:
        raise UserError(f"{name}: no such command; give one of {', '.join(COMMANDS)}")


def sluice() -> None:
    """Run `sluice COMMAND ...`, as installed: every command of the project. Exits."""
    run_command(_any_command)


def _any_command() -> None:
    name = "".join(sys.argv[1:2])
    if name in MODULES:
        module, _ = MODULES[name]
        sys.argv = [f"sluice {name}", *sys.argv[2:]]
        import_module(module).main()
    elif name in COMMANDS:
        main()
    elif name in ("", "-h", "--help"):
        print(_index("sluice", _every_command()))
    elif name == "completion":
        print(_completion("".join(sys.argv[2:3])))
    else:
        raise UserError(f"{name}: no such command; give one of {', '.join((*MODULES, *COMMANDS))}")


def _every_command() -> dict[str, str]:
    what = {command: what for command, (_, what) in MODULES.items()}
    what |= {command: what for command, (_, _, what) in COMMANDS.items()}
    return what | {"completion": "a script for bash, zsh, fish or tcsh that completes commands and options"}


def _completion(shell: str) -> str:
    """The script for a shell. Raises `UserError`."""
    from shtab import SUPPORTED_SHELLS

    from launch.completion import completion_script

    require(shell in SUPPORTED_SHELLS, f"completion: give a shell, one of {', '.join(SUPPORTED_SHELLS)}")
    return completion_script(shell, _every_command())


def _index(prog: str, commands: dict[str, str]) -> str:
    lines = [f"  {command:11} {what}" for command, what in commands.items()]
    return "\n".join([f"usage: {prog} COMMAND ...", "", *lines, "", f"{prog} COMMAND --help says more."])
