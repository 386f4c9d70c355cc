"""The run folder: its configuration, and checkpoints that are either complete or not there.

DIR/config.yaml
DIR/metrics.jsonl
DIR/checkpoints/step-00000120/{model.safetensors, training.pt, progress.json}
DIR/checkpoints/last -> step-00000120
DIR/checkpoints/best -> step-00000080
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import IO

from data_pipeline.errors import UserError
from data_pipeline.files import sync
from data_pipeline.loader import Cursor

PROGRESS = "progress.json"
LOCK = ".lock"
PARTIAL = ".partial"
"""What is being written, in its folder; left behind by a crash, it is of no worth."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and all that it must know beside weights and optimiser to continue exactly."""

    step: int = 0
    """Weight updates so far."""
    cursor: Cursor = field(default_factory=Cursor)
    sums: list[float] = field(default_factory=list)
    """What the epoch has added up so far, over all ranks (see `engine.SUMS`)."""
    best_top1_pct: float = -1.0
    finished: bool = False


class Store:
    """The checkpoints of one run. Rank 0 writes; all ranks may read."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"

    def newest(self) -> Path | None:
        """Folder of the last complete checkpoint, if there is one."""
        return self._target("last")

    def chosen(self) -> Path | None:
        """Folder of the best checkpoint, or else of the last."""
        return self._target("best") or self._target("last")

    def progress(self) -> Progress:
        """Progress of the newest checkpoint, or that of a run which has not begun."""
        newest = self.newest()
        if newest is None:
            return Progress()
        state = json.loads((newest / PROGRESS).read_text())
        return Progress(**{**state, "cursor": Cursor(**state["cursor"])})

    def begin(self, step: int) -> None:
        """Make room for a checkpoint beside the others. For one rank; `put` and `complete` follow. Raises `UserError`."""
        with self._writing(step):
            shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
            (self.folder / PARTIAL).mkdir(parents=True)

    def put(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` add files to what was begun. For any rank. Raises `UserError`."""
        with self._writing(step):
            write(self.folder / PARTIAL)

    def complete(self, progress: Progress, *, best: bool) -> None:
        """Force what was put to disk, and only then let `last` (and `best`) point to it. For one rank.

        Raises `UserError` where the disk does not take it; the checkpoints before it stay.
        """
        with self._writing(progress.step):
            partial = self.folder / PARTIAL
            (partial / PROGRESS).write_text(json.dumps(asdict(progress), indent=1) + "\n")
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            complete = partial.rename(self._fresh_name(progress.step))
            for link in ("last", "best") if best else ("last",):
                self._point(link, complete.name)
            sync(self.folder)
            self._prune()

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"run.dir: cannot write step {step} to {self.folder} ({error.strerror}); "
                "make room, and the same command goes on from the checkpoint before"
            ) from None

    def _target(self, link: str) -> Path | None:
        target = (self.folder / link).resolve()
        return target if (target / PROGRESS).is_file() else None

    def _fresh_name(self, step: int) -> Path:
        name = f"step-{step:08d}"
        names = chain([name], (f"{name}.{again}" for again in count(1)))
        return next(self.folder / name for name in names if not (self.folder / name).exists())

    def _point(self, link: str, name: str) -> None:
        beside = self.folder / f".{link}"
        beside.unlink(missing_ok=True)
        beside.symlink_to(name)
        os.replace(beside, self.folder / link)

    def _prune(self) -> None:
        kept = {self._target("last"), self._target("best")}
        for folder in self.folder.glob("step-*"):
            if folder.resolve() not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def check_run(run: Path, differences: Callable[[str], str | None]) -> None:
    """Make sure that `run` is new, or holds a run that was started with the same options. Writes nothing.

    `differences(saved)` names the first option that makes the saved configuration another run. Raises `UserError`.
    """
    saved = run / "config.yaml"
    try:
        if saved.is_file():
            changed = differences(saved.read_text())
            if changed:
                raise UserError(
                    f"run.dir: {run} was started with other options ({changed}); "
                    "repeat them to resume, or give another --run.dir"
                )
        elif run.exists() and (not run.is_dir() or any(entry.name != PARTIAL for entry in run.iterdir())):
            raise UserError(f"run.dir: {run} is in use and holds no run; give another --run.dir")
    except OSError as error:
        raise UserError(f"run.dir: cannot read {run} ({error.strerror}); give another --run.dir") from None


def record_run(run: Path, config: str) -> None:
    """Make the run folder, if it is not there, and record its configuration. Raises `UserError`."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        partial = run / PARTIAL
        partial.write_text(config)
        sync(partial)
        partial.replace(run / "config.yaml")
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {run} ({error.strerror}); give another --run.dir") from None


def claim_run(run: Path) -> IO[str]:
    """Make sure that no other process trains in `run`, for as long as the file returned is open. Raises `UserError`."""
    try:
        lock = (run / LOCK).open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"run.dir: another process trains in {run} right now; wait for it, or give another --run.dir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network file systems have no locks
            raise UserError(f"run.dir: cannot write to {run} ({error.strerror}); give another --run.dir") from None
    return lock
