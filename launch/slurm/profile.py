"""Request to a SLURM cluster: one YAML file for each cluster; every field is also an option."""

import re
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

from data_pipeline.common.cli import remedy
from data_pipeline.common.errors import UserError, require

PROFILES = Path(__file__).parents[2] / "slurm" / "profiles"

set_parsing_settings(docstring_parse_attribute_docstrings=True)

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d)(?::(?P<seconds>[0-5]\d))?")


@dataclass(frozen=True)
class Profile:
    """Resources and settings of a job. A field that is null is left to the cluster's own default."""

    partition: str | None = None
    """Partition, or several with commas between."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    nodes: int = 1
    """Number of nodes."""
    spares: int = 0
    """Further nodes of the allocation, which take the place of those that are lost or whose processes fail."""
    gpus_per_node: int = 0
    """GPUs of each node; one process is started for each."""
    tasks_per_node: int | None = None
    """Processes on each node where there are no GPUs; null means one."""
    cpus_per_task: int | None = None
    """Processor cores of each process; null means its share of a node: the node's cores by its GPUs, or by its processes."""
    mem: str | None = None
    """Memory of each node, such as 64G."""
    time: str = "24:00:00"
    """Time limit, [DAYS-]HOURS:MINUTES[:SECONDS], in quotes. A run that needs longer saves before it and is queued again."""
    constraint: str | None = None
    """Features that the nodes must have."""
    exclude: str | None = None
    """Nodes to leave out."""
    reservation: str | None = None
    """Reservation to run in."""
    comment: str | None = None
    """Free text for people who look at the queue."""
    dependency: str | None = None
    """Condition that must be met first, such as afterok:1234."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell to run on the first node before the training, such as `module load cuda`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables to set. They stand in the job's script, so none may be a secret."""
    export: list[str] = field(default_factory=list)
    """Further variables that the job gets from the environment of the submitting user; their values are written nowhere."""
    container: str | None = None
    """Image that the processes run in, on a cluster with pyxis (`srun --container-image`)."""
    python: str | None = None
    """Interpreter of the processes; null means the one that submits. In a container, the container's."""
    srun_args: list[str] = field(default_factory=list)
    """Further arguments of srun."""
    warn_s: int = 120
    """Seconds before the time limit at which the run is told to save and to queue again."""
    restarts: int = 3
    """Restarts of the processes without the queue, in each start of the job, after one was killed, failed or hung, or a node was
    lost that a spare one replaces."""
    max_crashes: int = 3
    """Crashes after which a run is queued again. Preemptions, time limits and lost nodes do not count."""
    exclude_slow: bool = False
    """Leave out the nodes of ranks that were named as slow (run.slow_pct) when the run itself is queued again, where enough
    others are there."""

    def __post_init__(self) -> None:
        # Numbers that SLURM would refuse, or take for something else, in words that name the option.
        require(self.nodes > 0, f"nodes: {self.nodes} is not positive; give the number of nodes")
        require(self.spares >= 0, f"spares: {self.spares} is negative; give a number of nodes")
        require(self.restarts >= 0, f"restarts: {self.restarts} is negative; give 0 to go through the queue each time")
        require(
            self.gpus_per_node >= 0, f"gpus_per_node: {self.gpus_per_node} is negative; give 0 where there are none"
        )
        require(
            self.tasks_per_node is None or self.tasks_per_node > 0,
            f"tasks_per_node: {self.tasks_per_node} is not positive; give the number of processes on a node",
        )
        require(
            not self.gpus_per_node or self.tasks_per_node in (None, self.gpus_per_node),
            f"tasks_per_node: {self.tasks_per_node} beside gpus_per_node {self.gpus_per_node}; leave it out, "
            "as each GPU has one process",
        )
        require(
            self.cpus_per_task is None or self.cpus_per_task > 0,
            f"cpus_per_task: {self.cpus_per_task} is not positive; give a number of cores",
        )
        require(
            TIME.fullmatch(self.time) is not None,
            f'time: {self.time!r} is no time; give one such as "24:00:00", in quotes',
        )
        # The script lies in the run folder, so it must hold no secret; exported names go into one of its lines.
        require(self.warn_s > 0, f"warn_s: {self.warn_s} is not positive; give the seconds that a checkpoint may take")
        require(self.max_crashes >= 0, f"max_crashes: {self.max_crashes} is negative; give 0 to end at the first crash")
        for name in self.env:
            require(
                re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None,
                f"env: {name!r} is no name of a variable; give letters, digits and underscores",
            )
            require(
                not re.search(r"KEY|TOKEN|SECRET|PASSW", name.upper()),
                f"env: {name} would be written into the job's script; set it in your shell, and name it in export",
            )
        for name in self.export:
            require(
                re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None,
                f"export: {name!r} is no name of a variable; its value comes from your shell",
                # A line break would end the #SBATCH line and begin another.
            )
        for key, value in self.options().items():
            require(
                str(value).isprintable(), f"{key}: {value!r} has a line break or control character; write it without"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def minutes(self) -> int:
        """Time limit in minutes, rounded up."""
        parts = TIME.fullmatch(self.time)
        assert parts
        days, hours, minutes, seconds = (int(parts[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
        return (days * 24 + hours) * 60 + minutes + (seconds > 0)

    def options(self) -> dict[str, str]:
        """Fields that are set and that sbatch takes unchanged."""
        names = ("partition", "account", "qos", "mem", "constraint", "exclude", "reservation", "comment", "dependency")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Request:
    """Request of a command line: the profile, and if the script is only printed."""

    profile: Profile
    dry_run: bool


def parse_request(prog: str, arguments: list[str], earlier: dict[str, Any] | None = None) -> Request:
    """Read a request: the values of an `earlier` job, a profile's file over them, single options over that.

    Raises `UserError`.
    """
    parser = request_parser(prog)
    parser.set_defaults(earlier or {})
    return request_of(parse(parser, arguments))


def request_parser(prog: str) -> ArgumentParser:
    """Make a parser that knows the options of a request."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--profile", action=ActionConfigFile, help="A YAML file, or a name in slurm/profiles; comes first."
    )
    parser.add_class_arguments(Profile)
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the job's script; submit and write nothing."
    )
    return parser


def parse(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """Parse all options of a request parser. Raises `UserError`."""
    try:
        return vars(parser.parse_args(_with_file(arguments)))
    except ArgumentError as error:
        raise UserError(remedy(str(error), str(parser.prog), unknown=partial(_not_ours, str(parser.prog)))) from None


def request_of(values: dict[str, Any]) -> Request:
    """Pick the request from the values of a parser's options. Raises `UserError`."""
    profile = Profile(**{part.name: values[part.name] for part in fields(Profile)})
    return Request(profile, values["dry_run"])


def _with_file(arguments: list[str]) -> list[str]:
    """Replace `--profile NAME` by its file. It must come first, as it sets every field that it names."""
    arguments = [part for one in arguments for part in (one.split("=", 1) if one.startswith("--profile=") else [one])]
    if "--profile" in arguments[1:]:
        raise UserError("--profile: it comes after other options and would undo them; put it first")
    if arguments[:1] != ["--profile"]:
        return arguments
    name = "".join(arguments[1:2])
    path = Path(name) if Path(name).is_file() else PROFILES / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise UserError(f"--profile: {name!r} is neither a file nor a profile; the profiles are {there}")
    return ["--profile", str(path), *arguments[2:]]


def _not_ours(prog: str, name: str) -> str:
    return f"{name}: no such option of a job; see {prog} --help, and put the trainer's options after --"
