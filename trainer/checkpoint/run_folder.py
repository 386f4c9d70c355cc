"""The run folder as a whole: who may train in it, with which options, and for which job.

DIR/config.yaml
DIR/metrics.jsonl
DIR/checkpoints/        see `store`
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from data_pipeline.common.atomic_io import replace_file, sync
from data_pipeline.common.errors import UserError
from trainer.checkpoint.store import PARTIAL

LOCK = ".lock"
JOB = "slurm_job.txt"
WANDB_ID = "wandb_id.txt"


@contextmanager
def claim_run(run: Path) -> Iterator[None]:
    """Keep every other process from training in `run`, which is made if it does not exist.

    A start claims the folder, then checks it, then records its configuration in it, so that it never replaces what another
    start has written. A refused start leaves no file and no folder behind. Raises `UserError`.
    """
    made = [folder for folder in (run, *run.absolute().parents) if not folder.exists()]
    lock = None
    try:
        lock = _locked(run)
        yield
    finally:
        if lock:
            with suppress(OSError), lock:
                (run / LOCK).unlink()  # while it is still locked: see `_locked`
        with suppress(OSError):
            for folder in made:
                folder.rmdir()  # only if nothing is in it


def _locked(run: Path) -> IO[str]:
    """Lock a run's lock file for as long as it is open. Raises `UserError` where another process has it."""
    try:
        while True:
            run.mkdir(parents=True, exist_ok=True)
            try:
                lock = (run / LOCK).open("a")
            except FileNotFoundError:  # the process that had the folder has just removed it
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network file systems have no locks
                    lock.close()
                    raise
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), (run / LOCK).stat()):
                    return lock
            lock.close()  # the file is gone, so this lock keeps nobody out
    except BlockingIOError:
        raise UserError(
            f"run.dir: another process trains in {run} right now; wait for it, or give another --run.dir"
        ) from None
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {run} ({error.strerror}); give another --run.dir") from None


def check_run(run: Path, differences: Callable[[str], tuple[str, str] | None]) -> None:
    """Check that `run` is new, or holds a run that was started with the same options. Writes nothing.

    `differences(saved)` names an option in which the saved configuration differs, and the remedy. Raises `UserError`.
    """
    saved = run / "config.yaml"
    try:
        if saved.is_file():
            difference = differences(saved.read_text())
            if difference:
                what, remedy = difference
                raise UserError(f"run.dir: {run} was started with other options ({what}); {remedy}")
        elif run.exists() and (not run.is_dir() or any(entry.name not in (PARTIAL, LOCK) for entry in run.iterdir())):
            raise UserError(f"run.dir: {run} is in use and holds no run; give another --run.dir")
    except OSError as error:
        raise UserError(f"run.dir: cannot read {run} ({error.strerror}); give another --run.dir") from None


def record_job(run: Path) -> None:
    """Record the number of this process's SLURM job, if it has one, for `python -m launch status`."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")
    with suppress(OSError):
        if job:
            (run / JOB).write_text(job + "\n")


def read_job(run: Path) -> str:
    """Read the number of the last SLURM job that trained in `run`; "" where there was none."""
    try:
        return (run / JOB).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def read_wandb_id(run: Path) -> str:
    """Read the id under which W&B knows `run`; "" where it does not."""
    path = run / WANDB_ID
    return path.read_text().strip() if path.exists() else ""


def record_wandb_id(run: Path, used: str) -> None:
    """Record the id under which W&B knows `run`."""
    if read_wandb_id(run) != used:
        replace_file(run / WANDB_ID, f"{used}\n".encode())


def record_run(run: Path, config: str) -> None:
    """Make the run folder, if it does not exist, and record its configuration. Raises `UserError`."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        partial = run / PARTIAL
        partial.write_text(config)
        sync(partial)
        partial.replace(run / "config.yaml")
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {run} ({error.strerror}); give another --run.dir") from None


def forget_run(run: Path) -> None:
    """Remove what the start of a new run has recorded in `run`, if nothing was trained in it and nothing else lies there."""
    with suppress(OSError):
        recorded = {"config.yaml", JOB}
        if {entry.name for entry in run.iterdir()} <= {*recorded, LOCK, "checkpoints"}:
            (run / "checkpoints").rmdir()  # it fails where anything is in it
            for name in recorded:
                (run / name).unlink(missing_ok=True)
