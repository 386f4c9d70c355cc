"""SLURM's commands, run without a shell, and their answers as Python values."""

import os
import subprocess
from typing import NamedTuple

from data_pipeline.common.errors import UserError

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
    """A job as the controller knows it, also for some minutes after its end."""

    state: str
    nodes: str
    restarts: int
    reason: str

    @property
    def active(self) -> bool:
        return self.state not in ENDING


_ALONE = "`python -m launch local` trains on this machine alone"


def run_slurm(*command: str, stdin: str | None = None) -> str:
    """Return the output of one of SLURM's commands. Raises `UserError` with SLURM's own error message."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"no {command[0]} here: this machine has no SLURM; {_ALONE}") from None
    if done.returncode:
        if "Could not establish a configuration source" in done.stderr:
            raise UserError(
                f"{command[0]} belongs to no cluster: SLURM is installed here, but has no slurm.conf; "
                f"set SLURM_CONF, or work where the cluster's jobs are submitted; {_ALONE}"
            )
        said = [line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise UserError(f"{command[0]}: {'; '.join(said) or f'exit code {done.returncode}'}")
    return done.stdout


def queue() -> dict[str, Queued]:
    """List all jobs of this user that the controller knows, by number: 123, or 123_4 in an array. Raises `UserError`."""
    fields = "JobArrayID,State,NodeList,RestartCnt,Reason"
    layout = fields.replace(",", ":|,") + ":|"
    table = run_slurm("squeue", "--me", "--array", "--noheader", "--states=all", "--Format", layout)
    jobs = {}
    for line in table.splitlines():
        number, state, nodes, restarts, reason = line.split("|")[:5]
        jobs[number.strip()] = Queued(state.strip(), nodes.strip(), int(restarts), reason.strip())
    return jobs


def own_job() -> str:
    """Number of the job that this process is part of.

    A task of an array gives the form 123_4: SLURM takes the plain number of a task for the whole array.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def state_of(job: str) -> str:
    """Ask for the state of one job, such as RUNNING. Raises `UserError`."""
    return run_slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()


def requeue(job: str) -> None:
    """Put a running job back into the queue; its processes are ended. Raises `UserError`."""
    run_slurm("scontrol", "requeue", job)


def first_host(nodes: str) -> str:
    """Return the first name of a list such as `gpu[03-06,11]`. Raises `UserError`."""
    return run_slurm("scontrol", "show", "hostnames", nodes).split()[0]
