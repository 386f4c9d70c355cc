"""Processes of a job: each one joins the others and trains, and rank 0 records how the training ended."""

import os
import platform
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.common.entry_point import keep_printing, run_command
from data_pipeline.common.errors import UserError
from launch.slurm.commands import first_host, own_job
from launch.slurm.submission import Submission, restart_count, short_name
from trainer.resilience.signals import AFTER_SIGNAL, StopFlag


def train(folder: str) -> None:
    """Run one rank, in a job that has a task for each rank: submitit calls this in every task of the submission `folder`."""
    submission = Submission(Path(folder))
    enter(submission, submission.rank_log(int(os.environ["SLURM_PROCID"])))
    os.environ.update(rank_variables(os.environ, first_host(os.environ["SLURM_JOB_NODELIST"])))
    run_command(lambda: train_rank(submission))


def train_node(folder: str) -> None:
    """Run one node, in a job where torchrun starts the ranks: submitit calls this in every task of the submission `folder`."""
    from launch.workers import join_nodes, run_workers

    submission = Submission(Path(folder))
    variables = rank_variables(os.environ, first_host(os.environ["SLURM_JOB_NODELIST"]))
    enter(submission, submission.node_log(int(variables["RANK"])))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # torchrun would die of it and leave its workers behind
    nodes = join_nodes(variables, submission.job.ranks_per_node)
    run_command(lambda: sys.exit(run_workers(nodes, "launch.slurm.job", [folder])))


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
    tasks, nodes, job = (int(slurm[name]) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"))
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(20000 + job % 10000),  # below the ports that systems assign; jobs may share a node
    }


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
        from trainer.setup import join_run

        try:
            cfg = load_run(Path(submission.job.run), [])
            with join_run(cfg) as ctx:
                progress = fit(cfg, ctx, stop)
                signalled = ctx.sum(torch.tensor(float(stop.raised), device=ctx.device)).item() > 0
        except UserError as error:
            _tell(submission, f"error: {error}")
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
