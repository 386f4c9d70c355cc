"""A run that was submitted to SLURM, as its folder records it.

RUN/config.yaml                   the training, resolved; a job reads nothing else
RUN/slurm/20260131-120000-1f2e/   one folder for each submission, never used again
        job.json                      the request, its folder and code version; the job's number
        outcome.json                  how the last start of the job ended, written by rank 0
        restarts.json                 crashes so far, and how the job ended, written by its script
        batch.log, rank-0.log, ...    output of the script and of each process; a restarted job appends to them
        JOB_submission.sh, JOB_submitted.pkl    submitit's; those of a sweep lie in SWEEP/slurm/, under the same name
"""

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError
from launch.slurm.profile import Profile

SCRIPT_LOG = "batch.log"
LOST = "lost nodes"
"""Outcome of a job that has lost more nodes than it has spare ones."""


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    run: str
    """The run folder, absolute."""
    cwd: str
    """Folder of the submitting command: relative paths among the options start there."""
    profile: dict[str, Any]
    version: str
    """Commit of the code, or the version of the installed package."""
    submitted: str
    """Local date and time."""
    id: str | None = None
    """SLURM's number, 123_4 in an array; null while it is being submitted."""

    @property
    def ranks_per_node(self) -> int:
        return Profile(**self.profile).ranks_per_node


class Submission:
    """One submission's folder and its small files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def job(self) -> Job:
        known = {one.name for one in fields(Job)}  # an earlier version had more
        return Job(**{name: value for name, value in self._read("job.json").items() if name in known})

    def write_job(self, job: Job) -> None:
        self._write("job.json", asdict(job))

    def rank_log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def node_log(self, node: int) -> Path:
        """Log of the supervisor on one node."""
        return self.folder / f"node-{node}.log"

    @property
    def script_log(self) -> Path:
        return self.folder / SCRIPT_LOG

    def outcome(self, restart: int) -> str | None:
        """Outcome of the start number `restart` of the job: `finished`, `stopped`, `handed over`, LOST or a mistake in words.

        None if nothing was recorded: the job crashed.
        """
        told = self._read("outcome.json")
        return str(told["outcome"]) if told.get("restart") == restart else None

    def write_outcome(self, restart: int, outcome: str) -> None:
        self._write("outcome.json", {"restart": restart, "outcome": outcome})

    @property
    def crashes(self) -> int:
        return int(self._read("restarts.json").get("crashes", 0))

    @property
    def restarts(self) -> int:
        """Number of times that SLURM has started the job anew, for any reason, as far as its script has seen."""
        return int(self._read("restarts.json").get("restarts", 0))

    @property
    def end(self) -> str | None:
        """Recorded end of the job; None while it goes on."""
        return self._read("restarts.json").get("end")

    def write_restarts(self, *, crashes: int, restarts: int, end: str | None) -> None:
        self._write("restarts.json", {"crashes": crashes, "restarts": restarts, "end": end})

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return {}
        return content

    def _write(self, name: str, content: dict[str, Any]) -> None:
        replace_file(self.folder / name, (json.dumps(content, indent=1) + "\n").encode())


def restart_count() -> int:
    """Number of times that SLURM has restarted the job of this process."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def fresh_folder(run: Path) -> Path:
    """Choose a name for the folder of a new submission of `run`; nothing is made."""
    return run / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def newest(run: Path) -> Submission | None:
    """Return the last submission of a run."""
    folders = sorted(file.parent for file in (run / "slurm").glob("*/job.json"))
    return Submission(folders[-1]) if folders else None


def find(name: str) -> tuple[Path, Submission]:
    """Find the run called `name`, in runs/ or a path, and its last submission. Raises `UserError`."""
    run = next((path for path in (Path("runs") / name, Path(name)) if (path / "config.yaml").is_file()), Path(name))
    submission = newest(run)
    if submission is None:
        raise UserError(f"{name}: no run of that name was submitted from here; `python -m launch status` lists them")
    return run, submission


def short_name(run: Path) -> str:
    """Name by which `find` finds a run from the current folder."""
    runs = Path.cwd() / "runs"
    return str(run.relative_to(runs) if run.is_relative_to(runs) else run)
