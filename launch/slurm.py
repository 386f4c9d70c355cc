"""What SLURM says: its commands, run without a shell."""

import subprocess
from typing import NamedTuple

from data_pipeline.errors import UserError

ENDING = {
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "REVOKED",
}
"""States from which a job does not come back by itself."""


class Queued(NamedTuple):
    """A job as the controller knows it, for some minutes after its end too."""

    state: str
    nodes: str
    restarts: int
    reason: str

    @property
    def active(self) -> bool:
        return self.state not in ENDING


def run_slurm(*command: str, stdin: str | None = None) -> str:
    """Output of one of SLURM's commands. Raises `UserError` with what it says against it."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"no {command[0]} here: this machine has no SLURM; `python -m launch local` trains on this machine alone"
        ) from None
    if done.returncode:
        said = [line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise UserError(f"{command[0]}: {'; '.join(said) or f'exit code {done.returncode}'}")
    return done.stdout


def queue() -> dict[str, Queued]:
    """All jobs of this user that the controller knows, by number. Raises `UserError`."""
    fields = "JobID,State,NodeList,RestartCnt,Reason"
    table = run_slurm("squeue", "--me", "--noheader", "--states=all", "--Format", fields.replace(",", ":|,") + ":|")
    jobs = {}
    for line in table.splitlines():
        number, state, nodes, restarts, reason = line.split("|")[:5]
        jobs[number.strip()] = Queued(state.strip(), nodes.strip(), int(restarts), reason.strip())
    return jobs


def state_of(job: str) -> str:
    """State of one job, such as RUNNING. Raises `UserError`."""
    return run_slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()


def requeue(job: str) -> None:
    """Put a running job back into the queue; its processes are ended. Raises `UserError`."""
    run_slurm("scontrol", "requeue", job)


def first_host(nodes: str) -> str:
    """The first name of a list such as `gpu[03-06,11]`. Raises `UserError`."""
    return run_slurm("scontrol", "show", "hostnames", nodes).split()[0]
