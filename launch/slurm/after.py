"""Last line of a job's script: decide if the job goes back into the queue.

It does after a signal's checkpoint (preemption, time limit), and after a crash unless there were too many. It does not
when the training has ended, when the user made a mistake, or when SLURM itself decided to end or to requeue the job
(`scancel`, `scontrol requeue`, a lost node): only a job that is RUNNING for SLURM is touched. An error that appears
only in a later start, such as a lock that a lost node still holds, counts as a crash.
"""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError, printable
from launch.slurm.commands import own_job, requeue, state_of
from launch.slurm.slow_nodes import leave_out, nodes_to_leave, outlive_the_job
from launch.slurm.submission import LOST, Submission, restart_count

T = TypeVar("T")

PAUSE_S = 5.0
"""Seconds between two questions to SLURM."""


def decide(submission: Submission, status: int) -> int:
    """Requeue the job, or record how it ended; `status` is srun's. Returns the job's exit code. Raises `UserError`."""
    job, restart, crashes = own_job(), restart_count(), submission.crashes
    outcome = submission.outcome(restart)
    mistake = outcome is not None and outcome.startswith("error")
    # The training has ended, or the user's first start was a mistake: a further start would change nothing.
    if outcome in ("finished", "stopped") or (mistake and restart == 0):
        submission.write_restarts(crashes=crashes, restarts=restart, end=outcome)
        return 2 if mistake else 0

    # Somebody cancelled the job, or SLURM is requeueing it: that decision stands.
    state = patiently(lambda: state_of(job))
    if state != "RUNNING":
        print(f"SLURM is ending the job: {state}", flush=True)
        submission.write_restarts(crashes=crashes, restarts=restart, end=state.lower())
        return status
    # A saved run always comes back. A crashed one comes back until it has crashed too often.
    if outcome == "handed over" or status == 128 + signal.SIGUSR2:  # the signal came before training had begun
        print("saved on a signal: queued again", flush=True)
    elif outcome == LOST:
        print("more nodes are lost than there are spares: queued again", flush=True)
    else:
        crashes, limit = crashes + 1, submission.job.profile["max_crashes"]
        print(f"crash {crashes} (exit code {status}), {limit} are allowed", flush=True)
        if crashes > limit:
            submission.write_restarts(crashes=crashes, restarts=restart, end=outcome or f"crashed {crashes} times")
            return status or 1
    leaving = patiently(lambda: nodes_to_leave(submission, job))
    submission.write_restarts(crashes=crashes, restarts=restart + 1, end=None)
    if leaving:
        outlive_the_job()
    patiently(lambda: requeue(job))
    if leaving:
        leave_out(job, leaving)
    return status


def patiently(ask: Callable[[], T]) -> T:
    """Ask a controller that may be too busy to answer at first. Raises `UserError` after ten tries."""
    for _ in range(9):
        try:
            return ask()
        except UserError as error:
            print(f"{printable(str(error))}; trying again", flush=True)
            time.sleep(PAUSE_S)
    return ask()


if __name__ == "__main__":
    run_command(lambda: sys.exit(decide(Submission(Path(sys.argv[1])), int(sys.argv[2]))))
