"""python -m launch sweep FILE [--profile NAME] [--parallel N] [--nodes N ...]: a run for each setting, as one job array.
python -m launch sweep FILE --local [--ranks N]: the same runs on this machine, one after another.
python -m launch sweep FILE --wandb [--ranks N]: the same runs as a file for `wandb sweep`, whose agents train them.

FILE is explained in `launch.sweep.settings`. The sweep has the file's name; its runs lie in runs/SWEEP/RUN:

runs/SWEEP/sweep.json     common options of the runs, the setting of each, and exit codes of those that failed here
runs/SWEEP/slurm/         submitit's files of each submission
"""

import json
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from jsonargparse.typing import PositiveInt

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, printable, require
from launch.slurm.commands import queue, run_slurm
from launch.slurm.profile import Request, parse, request_of, request_parser
from launch.slurm.submit import active_job, check_free, submit_runs
from launch.sweep.settings import Member, Setting, Sweep, read_sweep
from launch.sweep.wandb_file import metric_of, write_wandb_file
from trainer.checkpoint.run_folder import check_run
from trainer.checkpoint.store import Store
from trainer.config import Config
from trainer.resilience.signals import SIGNALS
from trainer.resume_rules import first_difference, may_change

PROG = "python -m launch sweep"
RECORD = "sweep.json"
ASKED_TO_STOP = {128 + number for number in SIGNALS}


@dataclass(frozen=True)
class Record:
    """Record of a sweep, kept in its folder."""

    fixed: Setting
    """`config` and the options that all runs share."""
    settings: dict[str, Setting]
    """Run -> its own options."""
    failed: dict[str, int] = field(default_factory=dict)
    """Run -> the exit code, if training it on this machine failed last."""

    def write(self, folder: Path) -> None:
        """Write the record into the sweep's folder. Raises `UserError`."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / RECORD, (json.dumps(asdict(self), indent=1, default=str) + "\n").encode())
        except OSError as error:
            raise UserError(f"runs: cannot write to {folder} ({error.strerror}); make room, or go elsewhere") from None


def read_record(folder: Path) -> Record | None:
    """Read the record of the sweep in a folder; None if there is none."""
    file = folder / RECORD
    return Record(**json.loads(file.read_text())) if file.is_file() else None


def main(arguments: list[str]) -> None:
    """Submit or train a sweep; exits with 1 if a run failed here. Raises `UserError`; nothing was submitted or written then."""
    require(
        bool(arguments) and (not arguments[0].startswith("-") or arguments[0] in ("-h", "--help")),
        f"FILE: no file given; call {PROG} FILE [--profile NAME] [--parallel N] [--local]",
    )
    parser = request_parser(f"{PROG} FILE")
    parser.add_argument("--parallel", type=PositiveInt, help="Runs that SLURM trains at once; all if not given.")
    parser.add_argument("--local", action="store_true", help="Train here, one after another.")
    parser.add_argument("--wandb", action="store_true", help="Write a file for `wandb sweep`, and nothing else.")
    parser.add_argument(
        "--ranks", type=PositiveInt, help="With --local or --wandb, processes of a run; one a GPU if not given."
    )
    values = parse(parser, arguments if arguments[0].startswith("-") else arguments[1:])
    request = request_of(values)
    # All runs are checked before the first one begins.
    sweep = read_sweep(Path(arguments[0]))
    folder = Path.cwd() / "runs" / sweep.file.stem
    members = sweep.members(folder)
    if values["wandb"]:
        file = shlex.quote(str(write_wandb_file(sweep, members, values["ranks"])))
        print(
            f"{len(members)} runs; next: wandb sweep {file}, and where they shall train the `wandb agent` that it names"
        )
        cfg = members[0].cfg
        if cfg.run.best_by is None:
            print(
                f"its metric is {metric_of(cfg)['name']}, as the options give no run.best_by: for images of several classes "
                "give map, for classes of uneven numbers macro_recall"
            )
        return
    record = joined(read_record(folder), sweep, members, folder)
    for member in members:
        check_run(member.cfg.folder, partial(first_difference, cfg=member.cfg))
    if values["local"]:
        sys.exit(train_here(folder, members, record, values["ranks"], dry_run=request.dry_run))
    submit(folder, members, record, request, values["parallel"])


def joined(before: Record | None, sweep: Sweep, members: list[Member], folder: Path) -> Record:
    """Add these runs to the sweep's record. Raises `UserError` if the folder holds another sweep."""
    settings = {member.name: member.setting for member in members}
    if before is None:
        foreign = folder.exists() and {path.name for path in folder.iterdir()} - {*settings, "slurm"}
        require(not foreign, f"{sweep.file}: {folder} is in use and holds no sweep; give the file another name")
        return Record(sweep.fixed, settings)
    for key in {**before.fixed, **sweep.fixed}:
        was, now = (fixed.get(key, "not given") for fixed in (before.fixed, sweep.fixed))
        require(
            was == now or may_change(key),
            f"{sweep.file}: {folder} holds another sweep ({key} was {was}, now {now}); give the file another name",
        )
    return Record(sweep.fixed, {**before.settings, **settings}, before.failed)


def is_done(cfg: Config) -> bool:
    progress = Store(cfg.folder).progress()
    return progress.over(cfg.run.epochs, cfg.run.patience) or progress.step >= (cfg.run.max_steps or math.inf)


def submit(folder: Path, members: list[Member], record: Record, request: Request, parallel: int | None) -> None:
    """Submit the runs that are neither done nor in SLURM already. Raises `UserError`; no job was submitted then."""
    run_slurm("sbatch", "--version")
    jobs = queue()
    waiting = [member for member in members if not is_done(member.cfg) and not active_job(member.cfg.folder, jobs)]
    for member in waiting:
        check_free(member.cfg, jobs)
    if waiting:
        runs = [member.cfg for member in waiting]
        numbers = list(submit_runs(runs, request, os.getcwd(), folder, parallel))
        if not numbers:
            return
        forget = {member.name for member in waiting}
        replace(record, failed={name: code for name, code in record.failed.items() if name not in forget}).write(folder)
        print(f"job {numbers[0].partition('_')[0]} trains {len(waiting)} runs in {printable(str(folder))}")
    if len(waiting) < len(members):
        print(f"{len(members) - len(waiting)} of its {len(members)} runs are done, or in SLURM's hands, and left alone")
    print(f"to watch them: python -m launch status {shlex.quote(os.path.relpath(folder))}")


def train_here(folder: Path, members: list[Member], record: Record, ranks: int | None, *, dry_run: bool) -> int:
    """Train the runs that are not done, one after another. Returns 1 if one has failed, 128 + N on signal N."""
    from launch.workers import run_workers
    from trainer.distributed import gpu_count

    for number, member in enumerate(members, start=1):
        processes = ranks or gpu_count(member.cfg.engine.device) or 1
        if dry_run:
            print(shlex.join(["python", "-m", "launch", "local", "-n", str(processes), *member.arguments]))
            continue
        if is_done(member.cfg):
            print(f"[{number}/{len(members)}] {printable(member.name)} is done already", flush=True)
            continue
        print(f"[{number}/{len(members)}] {printable(member.name)}", flush=True)
        # Recorded before and after each run, so that an interruption loses nothing.
        record.write(folder)
        code = run_workers(processes, "trainer", member.arguments, member.cfg.folder)
        # A signal means the whole sweep: without this check the next run would start.
        if code in ASKED_TO_STOP:
            print("asked to stop; the same command goes on from here")
            return code
        failed = {name: other for name, other in record.failed.items() if name != member.name}
        record = replace(record, failed={**failed, member.name: code} if code else failed)
        record.write(folder)
    # Again at the end, where a person looks who comes back after hours.
    failed_now = [member.name for member in members if member.name in record.failed]
    for name in failed_now:
        print(f"error: {printable(str(folder / name))} failed with exit code {record.failed[name]}", file=sys.stderr)
    return 1 if failed_now else 0
