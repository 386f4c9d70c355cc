"""Processes of a job: a supervisor on each node starts its ranks, which train, and rank 0 records how the training ended."""

import os
import platform
import shlex
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from data_pipeline.common.entry_point import keep_printing, run_command
from data_pipeline.common.errors import UserError, printable
from data_pipeline.common.processes import children
from launch.slurm.commands import first_host, own_job
from launch.slurm.profile import Profile
from launch.slurm.submission import LOST, Submission, restart_count, short_name
from launch.supervisor.link import listen
from launch.supervisor.ranks import NodeRanks, python
from launch.supervisor.record import record_restart
from launch.supervisor.supervisor import Supervisor, follow
from trainer.checkpoint.snapshot_home import forget
from trainer.resilience.signals import AFTER_SIGNAL, RESTARTED, StopFlag

SCRIPT = "SLUICE_SCRIPT"
"""Variable with the process of the job's script, which is on the first node."""


def train_node(folder: str) -> None:
    """Run the ranks of one node, again after a failure: submitit calls this on every node for the submission `folder`.

    The first node's supervisor decides for all, and records how the training ended.
    """
    submission = Submission(Path(folder))
    node, name = int(os.environ["SLURM_PROCID"]), os.environ["SLURMD_NODENAME"]
    enter(submission, submission.node_log(node))
    job = submission.job

    def supervise() -> None:
        address = first_host(os.environ["SLURM_JOB_NODELIST"])
        try:
            with NodeRanks(node, name, job.ranks_per_node, python("launch.slurm.job", folder)) as own:
                sys.exit(follow(own, address, meeting_port(os.environ)) if node else lead(submission, own))
        finally:
            forget(Path(job.run))

    run_command(supervise)


def lead(submission: Submission, own: NodeRanks) -> int:
    """Decide for all nodes until the training has ended. Returns the exit code, and does not return where a node was lost."""
    job = submission.job
    profile, run = Profile(**job.profile), Path(job.run)
    with listen(meeting_port(os.environ)) as listener:
        told = partial(record_restart, run)
        supervisor = Supervisor(own, profile.nodes, profile.restarts, told, listener, profile.spares)
        end = supervisor.run()
    if end.cause:
        print(printable(end.cause), flush=True)
    if end.lost:
        submission.write_outcome(restart_count(), LOST)
    if supervisor.missing:
        forget(run)
        end_srun()
    return end.code


def end_srun() -> None:
    """End the srun of the job's script, and so this process, that the script goes on.

    It would wait for ever for the task of a lost node that was back before SLURM had noticed (SlurmdTimeout).
    """
    for child in children(os.environ.get(SCRIPT, "")):
        with suppress(OSError):  # it has just ended
            if Path(f"/proc/{child}/comm").read_text() == "srun\n":
                os.kill(child, signal.SIGKILL)


def enter(submission: Submission, log: Path) -> None:
    """Print into this process's own file, work where the job was submitted, and leave signals to `StopFlag`.

    The file is opened here, because SLURM would replace % and \\ in its name. submitit's handlers are removed: they act on
    rank 0 alone, and in the middle of a step.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    # Both streams, from the descriptor up, so that libraries' own output lands in the file too.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
    os.chdir(submission.job.cwd)
    name = shlex.quote(short_name(Path(submission.job.run)))
    # Relative paths among the options, and the remedy printed after a signal, start at the submitting folder.
    os.environ[AFTER_SIGNAL] = (
        f"the job goes on from there when SLURM starts it again; if it was cancelled: python -m launch resubmit {name}"
    )
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


def rank_variables(slurm: Mapping[str, str], address: str) -> dict[str, str]:
    """Variables as torchrun would set them, from those of a SLURM step whose tasks are spread evenly over its nodes."""
    tasks, nodes = (int(slurm[name]) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"))
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(meeting_port(slurm)),
    }


def meeting_port(slurm: Mapping[str, str]) -> int:
    """Port at which the processes of a job meet: below those that systems assign, and another for each job, as they may share
    a node."""
    return 20000 + int(slurm["SLURM_JOB_ID"]) % 10000


def whereabouts(variables: Mapping[str, str]) -> str:
    """Say for the log which rank this is, of how many, and on which node."""
    rank, world, local, locals_ = (variables[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    node = variables.get("SLURMD_NODENAME") or platform.node()
    return f"job {own_job()}: rank {rank} of {world}, number {local} of {locals_} on {node}"


def train_rank(submission: Submission) -> None:
    """Train as the run folder says, until the end or a signal; rank 0 records the outcome. Collective. Raises `UserError`."""
    with keep_printing(), StopFlag() as stop:
        print(f"{whereabouts(os.environ)}, start {restart_count() + 1}", flush=True)
        import torch  # imported late: it takes seconds, in which a signal may come

        from trainer.config import load_run
        from trainer.loop import fit
        from trainer.setup.start import join_run

        try:
            cfg = load_run(Path(submission.job.run), [])
            with join_run(cfg) as ctx:
                progress = fit(cfg, ctx, stop)
                signalled = ctx.sum(torch.tensor(float(stop.raised), device=ctx.device)).item() > 0
        except UserError as error:
            # A mistake is there at once; what fails only in a later start is no mistake of the user's.
            _tell(submission, f"failed: {error}" if os.environ.get(RESTARTED) else f"error: {error}")
            raise
        _tell(submission, "finished" if progress.finished else "handed over" if signalled else "stopped")
        sys.exit(0)  # not by the signal: srun would then end the other ranks


def _tell(submission: Submission, outcome: str) -> None:
    if os.environ["RANK"] == "0":
        submission.write_outcome(restart_count(), outcome)


if __name__ == "__main__":
    here = Submission(Path(sys.argv[1]))
    enter(here, here.rank_log(int(os.environ["RANK"])))
    run_command(lambda: train_rank(here))
