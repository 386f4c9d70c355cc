"""python -m launch submit [--profile NAME|FILE] [--nodes N ...] -- [trainer options]: hand a run to SLURM.
python -m launch resubmit NAME [--nodes N ...]: the same run once more, from where it was saved last.

The trainer's options are read once, here; the job reads the run folder. Names and paths are quoted in the job's script,
and it contains no variable's value but those of the profile's `env`.
"""

import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError

from data_pipeline.common.errors import UserError, printable
from launch.slurm.commands import Queued, queue, run_slurm
from launch.slurm.cores import cores_per_task
from launch.slurm.job import SCRIPT, train_node
from launch.slurm.profile import Profile, Request, parse_request
from launch.slurm.submission import SCRIPT_LOG, Job, Submission, find, fresh_folder, newest, short_name
from trainer.checkpoint.run_folder import check_run, claim_run, record_run
from trainer.checkpoint.store import Store
from trainer.config import Config, load, load_run, to_yaml
from trainer.resilience.wandb_agent import trial_of
from trainer.resume_rules import first_difference

ROOT = Path(__file__).parents[2]

HANDED_ON = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "NETRC",
    "HTTPS_PROXY",
    "https_proxy",
)
PREFIXES_HANDED_ON = (
    *("SLUICE_", "WANDB_", "OMP_", "DS_", "DALI_"),
    *("TORCH_", "PYTORCH_", "TRITON_", "CUDA_"),
    *("NCCL_", "GLOO_", "FI_", "UCX_"),
)
"""Variables that a job gets from the environment of the submitting user, beside SLURM's own and the profile's `export`."""
OF_THIS_MACHINE = ("CUDA_VISIBLE_DEVICES",)
"""Variables that mean something on the submitting machine alone, unless `export` names them."""


def main(arguments: list[str]) -> None:
    """Submit a run and print the job's number. Raises `UserError`."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    request = parse_request("python -m launch submit", arguments[:split])
    cfg = load(arguments[split + 1 :])
    cfg = replace(cfg, run=replace(cfg.run, dir=str(cfg.folder.absolute())))
    submit(cfg, request, os.getcwd())
    submission = newest(cfg.folder)
    if trial_of(os.environ) and submission and not request.dry_run:
        from launch.slurm.trial import stay_with

        sys.exit(stay_with(submission))


def resubmit(arguments: list[str]) -> None:
    """Submit a run as it was submitted last, except for the options given. Raises `UserError`."""
    prog = "python -m launch resubmit"
    if arguments[:1] in (["-h"], ["--help"]):
        parse_request(f"{prog} RUN", arguments)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"RUN: no run given; call {prog} RUN [--nodes N ...]")
    run, last = find(arguments[0])
    job = last.job
    cfg = load_run(run, [])
    cfg = replace(cfg, run=replace(cfg.run, dir=str(run.absolute())))
    submit(cfg, parse_request(f"{prog} RUN", arguments[1:], job.profile), job.cwd)


def submit(cfg: Config, request: Request, cwd: str) -> None:
    """Submit the run, whose folder is absolute, or print the script. Raises `UserError`; no job was submitted then."""
    run_slurm("sbatch", "--version")
    check_free(cfg, queue())
    for job in submit_runs([cfg], request, cwd, cfg.folder):
        name = shlex.quote(short_name(cfg.folder))
        print(f"job {job} trains {printable(str(cfg.folder))}; to watch it: python -m launch logs -f {name}")


def submit_runs(
    runs: list[Config], request: Request, cwd: str, place: Path, parallel: int | None = None
) -> Iterator[str]:
    """Submit free runs, whose folders are absolute: several as one array, of which `parallel` run at once.

    Files that belong to all of them are kept in the folder `place`. Returns SLURM's numbers, or prints the script and
    returns none. Raises `UserError`; no job was submitted then.
    """
    # The script first: a dry run prints it and writes nothing.
    home = fresh_folder(place)
    submissions = [Submission(cfg.folder / "slurm" / home.name) for cfg in runs]
    executor = executor_for(home, submissions, request, place.name, parallel)
    script = script_of(executor)
    if request.dry_run:
        print(script)
        return iter(())
    # SLURM itself tests the script before anything is written, so that a refused profile leaves no trace.
    if path := os.environ.get("PYTHONPATH"):  # the job starts in another folder
        os.environ["PYTHONPATH"] = ":".join(str(Path(part).absolute()) for part in path.split(":") if part)
    run_slurm("sbatch", "--test-only", stdin=script)
    # The folders. They are checked again under their lock.
    for cfg in runs:
        with claim_run(cfg.folder):
            check_run(cfg.folder, partial(first_difference, cfg=cfg))  # another process may have begun there meanwhile
            record_run(cfg.folder, to_yaml(cfg))
    home.mkdir(parents=True)
    jobs = [new_job(cfg, request, cwd) for cfg in runs]
    for submission, job in zip(submissions, jobs, strict=True):
        submission.folder.mkdir(parents=True, exist_ok=True)
        submission.write_job(job)
    # SLURM tests limits on submitted jobs only here; a refusal takes back the folders of this submission.
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints the message that it then raises
            handles = executor.map_array(train_node, [str(submission.folder) for submission in submissions])
    except FailedJobError as refused:
        for folder in {home, *(submission.folder for submission in submissions)}:
            shutil.rmtree(folder)
        raise UserError(str(refused)) from None
    # The numbers, which `status` and `cancel` need, are known only now.
    for submission, job, handle in zip(submissions, jobs, handles, strict=True):
        submission.write_job(replace(job, id=handle.job_id))
    return (handle.job_id for handle in handles)


def new_job(cfg: Config, request: Request, cwd: str) -> Job:
    """Describe a job before SLURM has it."""
    return Job(
        run=str(cfg.folder),
        cwd=cwd,
        profile=asdict(request.profile),
        version=code_version(),
        submitted=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def check_free(cfg: Config, jobs: Mapping[str, Queued]) -> None:
    """Check that the run may begin or go on, and that none of the queued `jobs` trains it. Raises `UserError`."""
    run = cfg.folder
    for tag in ("%j", "%t", "%a", "%A"):
        if tag in str(run):
            raise UserError(f"run.dir: {run} has {tag} in it, which submitit would replace; give another --run.dir")
    check_run(run, partial(first_difference, cfg=cfg))
    if Store(run).progress().over(cfg.run.epochs, cfg.run.patience):
        raise UserError(
            f"run.dir: {run} is finished; to train it on give --run.extend_to EPOCHS, to train anew another --run.name"
        )
    before = active_job(run, jobs)
    if before:
        raise UserError(f"run.dir: job {before} of {run} is {jobs[before].state}; cancel it first")


def active_job(run: Path, jobs: Mapping[str, Queued]) -> str | None:
    """Return the number of the job among `jobs` that trains the run, or waits to."""
    before = newest(run)
    number = (before and before.job.id) or ""
    return number if number in jobs and jobs[number].active else None


def executor_for(
    home: Path, submissions: list[Submission], request: Request, name: str, parallel: int | None = None
) -> SlurmExecutor:
    """Make submitit's executor from the profile; its own files lie in `home`."""
    # The supervisor is the one task of a node, and needs the cores of all its ranks.
    profile = request.profile
    cpus = profile.cpus_per_task or cores_per_task(profile)
    cpus = cpus and cpus * profile.ranks_per_node
    executor = SlurmExecutor(home, python=shlex.quote(profile.python or sys.executable))
    executor.update_parameters(
        job_name=_for_sbatch(name if name.isprintable() else ascii(name)),
        time=profile.minutes,
        nodes=profile.nodes + profile.spares,
        ntasks_per_node=1,
        gpus_per_node=profile.gpus_per_node or None,
        cpus_per_task=cpus,
        signal_delay_s=profile.warn_s,
        stderr_to_stdout=True,
        setup=_before(submissions, profile),
        teardown=[f'{shlex.quote(sys.executable)} -m launch.slurm.after "$SLUICE_SUBMISSION" $?'],
        srun_args=_srun_arguments(profile, cpus),
        additional_parameters={
            **{key: _for_sbatch(value) for key, value in profile.options().items()},
            **_array(len(submissions), parallel),
            "chdir": "/",  # jobs change folder themselves: SLURM would replace % and \ in the name
            "output": "/dev/null",
            "requeue": True,
            **({"no-kill": True} if profile.spares else {}),
            "export": ",".join(_handed_on(profile)),
        },
    )
    return executor


def _array(runs: int, parallel: int | None) -> dict[str, str]:
    """Range of array tasks, given directly because submitit's own way has a limit."""
    return {"array": f"0-{runs - 1}" + (f"%{parallel}" if parallel else "")} if runs > 1 else {}


def script_of(executor: SlurmExecutor) -> str:
    """Return the script that submitit will give to sbatch; the library has no public name for it."""
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _before(submissions: list[Submission], profile: Profile) -> list[str]:
    """Lines of the script before srun."""
    return [
        "submissions=(",
        *(f"  {shlex.quote(str(submission.folder))}" for submission in submissions),
        ")",
        "SLUICE_SUBMISSION=${submissions[${SLURM_ARRAY_TASK_ID:-0}]}",
        f'exec >>"$SLUICE_SUBMISSION"/{SCRIPT_LOG} 2>&1',
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export {SCRIPT}=$$",
        "export SUBMITIT_LOG_LEVEL=ERROR",  # otherwise submitit reports each signal that it ignores
        *(f"export {key}={shlex.quote(value)}" for key, value in profile.env.items()),
        *profile.setup,
    ]


def _srun_arguments(profile: Profile, cpus: int | None) -> list[str]:
    """Arguments of srun: a task sees all cores of its node, and all end when one has failed, unless there are spare nodes."""
    failing = ["--no-kill", "--kill-on-bad-exit=0"] if profile.spares else ["--kill-on-bad-exit=1"]
    arguments = ["--output=all", "--export=ALL", "--cpu-bind=none", *failing]
    if cpus:
        arguments.append(f"--cpus-per-task={cpus}")  # since 22.05 srun does not take this from sbatch
    if profile.container:
        arguments.append(f"--container-image={profile.container}")
    return [*arguments, *profile.srun_args]


def _handed_on(profile: Profile) -> list[str]:
    """Names of the variables that the job gets."""
    names = {name for name in os.environ if name in HANDED_ON or name.startswith(PREFIXES_HANDED_ON)}
    return sorted({*names.difference(OF_THIS_MACHINE), *profile.export})


def _for_sbatch(value: str) -> str:
    """Escape text for a quoted #SBATCH line."""
    return value.replace("\\", "\\\\")


def code_version() -> str:
    """Commit of the source tree, marked where files were changed; else the installed version; unknown for an unpacked archive."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        with suppress(PackageNotFoundError):
            return version("sluice")
        return "unknown"
