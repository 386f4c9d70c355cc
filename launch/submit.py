"""python -m launch submit [--profile NAME|FILE] [--nodes N ...] -- [trainer options]: hand a run to SLURM.
python -m launch resubmit NAME [--nodes N ...]: the same run once more, from where it was saved last.

The trainer's options are read once, here; the job reads the run folder. Nothing that comes from a name or a path reaches
the job's script unquoted, and no variable's value is written into it but those of the profile's `env`.
"""

import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError

from data_pipeline.errors import UserError
from launch.job import train, train_node
from launch.profile import Profile, Request, parse_request
from launch.slurm import queue, run_slurm
from launch.submission import Job, Submission, find, fresh_folder, newest, short_name
from trainer.checkpoint import Store, check_run, record_run
from trainer.config import Config, first_difference, load, load_run, to_yaml

ROOT = Path(__file__).parents[1]

HANDED_ON = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "NETRC",
    "HTTPS_PROXY",
    "https_proxy",
)
PREFIXES_HANDED_ON = ("SLUICE_", "WANDB_", "NCCL_", "TORCH_", "GLOO_", "OMP_", "DS_")
"""Variables that a job gets from whoever submits it, beside SLURM's own and the profile's `export`."""


def main(arguments: list[str]) -> None:
    """Submit, and say under which number. Raises `UserError`."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    request = parse_request("python -m launch submit", arguments[:split])
    cfg = load(arguments[split + 1 :])
    submit(replace(cfg, run=replace(cfg.run, dir=str(cfg.folder.absolute()))), request, os.getcwd())


def resubmit(arguments: list[str]) -> None:
    """Submit a run as it was submitted last, but for the options given. Raises `UserError`."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError("NAME: no run given; call python -m launch resubmit NAME [--nodes N ...]")
    run, last = find(arguments[0])
    job = last.job
    earlier = {**job.profile, "launcher": job.launcher}
    cfg = load_run(run, [])
    cfg = replace(cfg, run=replace(cfg.run, dir=str(run.absolute())))
    submit(cfg, parse_request("python -m launch resubmit", arguments[1:], earlier), job.cwd)


def submit(cfg: Config, request: Request, cwd: str) -> None:
    """Hand the run, whose folder is absolute, to SLURM, or print the script. Raises `UserError`; no job was submitted then."""
    run_slurm("sbatch", "--version")
    check_free(cfg)
    submission = Submission(fresh_folder(cfg.folder))
    executor = executor_for(submission, request, cfg.folder.name)
    script = script_of(executor)
    if request.dry_run:
        print(script)
        return
    run_slurm("sbatch", "--test-only", stdin=script)
    record_run(cfg.folder, to_yaml(cfg))
    submission.folder.mkdir(parents=True)
    job = Job(
        run=str(cfg.folder),
        cwd=cwd,
        launcher=request.launcher,
        profile=asdict(request.profile),
        version=code_version(),
        submitted=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    submission.write_job(job)
    task = train_node if request.launcher == "torchrun" else train
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it then raises
            job_id = executor.submit(task, str(submission.folder)).job_id
    except FailedJobError as refused:  # limits on how many jobs one may submit are looked at only now
        shutil.rmtree(submission.folder)
        raise UserError(str(refused)) from None
    submission.write_job(replace(job, id=job_id))
    print(
        f"job {job_id} trains {cfg.folder}; to watch it: python -m launch logs -f {shlex.quote(short_name(cfg.folder))}"
    )


def check_free(cfg: Config) -> None:
    """Make sure that the run may begin or go on, and that no job of it is queued. Raises `UserError`."""
    run = cfg.folder
    for tag in ("%j", "%t", "%a", "%A"):
        if tag in str(run):
            raise UserError(f"run.dir: {run} has {tag} in it, which submitit would replace; give another --run.dir")
    check_run(run, lambda saved: first_difference(saved, cfg))
    if Store(run).progress().finished:
        raise UserError(f"run.dir: {run} is finished; to train anew give another --run.name")
    before = newest(run)
    if before and before.job.id in (jobs := queue()) and jobs[before.job.id].active:
        raise UserError(f"run.dir: job {before.job.id} of {run} is {jobs[before.job.id].state}; cancel it first")


def executor_for(submission: Submission, request: Request, name: str) -> SlurmExecutor:
    """submitit's executor, told what the profile asks for."""
    profile = request.profile
    by_torchrun = request.launcher == "torchrun"
    cpus = profile.cpus_per_task and profile.cpus_per_task * (profile.ranks_per_node if by_torchrun else 1)
    executor = SlurmExecutor(submission.folder, python=shlex.quote(profile.python or sys.executable))
    executor.update_parameters(
        job_name=_for_sbatch(name if name.isprintable() else ascii(name)),
        time=profile.minutes,
        nodes=profile.nodes,
        ntasks_per_node=1 if by_torchrun else profile.ranks_per_node,
        gpus_per_node=profile.gpus_per_node or None,
        cpus_per_task=cpus,
        signal_delay_s=profile.warn_s,
        stderr_to_stdout=True,
        setup=_before(submission, profile),
        teardown=[shlex.join([sys.executable, "-m", "launch.after", str(submission.folder)]) + " $?"],
        srun_args=_srun_arguments(profile, cpus),
        additional_parameters={
            **{key: _for_sbatch(value) for key, value in profile.options().items()},
            "chdir": "/",  # jobs change to a folder themselves: SLURM would take % and \ in its name for its own
            "output": "/dev/null",
            "requeue": True,
            "export": ",".join(_handed_on(profile)),
        },
    )
    return executor


def script_of(executor: SlurmExecutor) -> str:
    """What submitit will give to sbatch; it has no public name for it."""
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _before(submission: Submission, profile: Profile) -> list[str]:
    """The script's lines before srun."""
    paths = [str(ROOT), *(str(Path(part).absolute()) for part in os.environ.get("PYTHONPATH", "").split(":") if part)]
    variables = {"PYTHONPATH": ":".join(dict.fromkeys(paths)), **profile.env}
    return [
        f"exec >>{shlex.quote(str(submission.script_log))} 2>&1",
        *(f"export {key}={shlex.quote(value)}" for key, value in variables.items()),
        *profile.setup,
    ]


def _srun_arguments(profile: Profile, cpus: int | None) -> list[str]:
    """Each task sees the cores and variables of the whole node; all end when one has failed."""
    arguments = ["--output=all", "--export=ALL", "--cpu-bind=none", "--kill-on-bad-exit=1"]
    if cpus:
        arguments.append(f"--cpus-per-task={cpus}")  # which srun does not take over from sbatch since 22.05
    if profile.container:
        arguments.append(f"--container-image={profile.container}")
    return [*arguments, *profile.srun_args]


def _handed_on(profile: Profile) -> list[str]:
    """Names of the variables that the job is given."""
    names = [name for name in os.environ if name in HANDED_ON or name.startswith(PREFIXES_HANDED_ON)]
    return sorted({*names, *profile.export})


def _for_sbatch(value: str) -> str:
    """Text as sbatch must find it in a quoted #SBATCH line, to read it as it is."""
    return value.replace("\\", "\\\\")


def code_version() -> str:
    """Commit of the source tree, with what is changed in it; else the version that is installed."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("sluice")
