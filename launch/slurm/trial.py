"""Stay with the job of a W&B sweep's trial until it has ended: its agent gives out the next trial when the command ends."""

import time

from launch.slurm.after import patiently
from launch.slurm.commands import queue, run_slurm
from launch.slurm.submission import Submission
from trainer.resilience.signals import StopFlag
from trainer.resilience.wandb_agent import Agent

POLL_S = 5.0


def stay_with(submission: Submission) -> int:
    """Wait for the end of a job. Returns 0 where the training has ended, 1 where it failed.

    A trial that its agent stops is cancelled, and saves first. Where the machine of the agent is taken away, the job goes on.
    """
    agent, job = Agent.above(), submission.job.id or ""
    cancelled = False
    with StopFlag() as stop:
        while (known := patiently(queue).get(job)) and known.active:
            if stop.raised and agent.took_away(stop.signal):
                print(f"job {job} goes on by itself", flush=True)
                return 0
            if stop.raised and not cancelled:
                cancelled = True
                run_slurm("scancel", job)
                submission.write_restarts(crashes=submission.crashes, restarts=known.restarts, end="cancelled")
            _pause(stop, cancelled)
    return 0 if cancelled or submission.end in ("finished", "stopped") else 1


def _pause(stop: StopFlag, stopped: bool) -> None:
    """Wait for a while, or until the first signal comes."""
    end_s = time.monotonic() + POLL_S
    while time.monotonic() < end_s and stop.raised == stopped:
        time.sleep(0.1)
