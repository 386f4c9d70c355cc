"""Write checkpoints beside the training, and check their room on disk."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from data_pipeline.common.errors import UserError
from trainer.checkpoint.manifest import StateWriter
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.snapshots import Snapshots
from trainer.checkpoint.store import Store
from trainer.distributed import DistContext

T = TypeVar("T")

LAST_S = 30.0
"""Longest wait of a failing run for the checkpoint being written: about as long as launchers wait before they kill."""


class _Outcome(NamedTuple):
    failure: UserError | None
    scalars: dict[str, float]


class Saver:
    """Writes checkpoints in a thread of each rank, one at a time. To be opened on every rank: collective.

    The threads agree among themselves, over connections of their own, that all files are on disk before the checkpoint is
    completed, and on the outcome, which is the same on all ranks. As a context manager it ends with the training; if the
    training fails it waits a while for the save being written.
    """

    def __init__(self, store: Store, ctx: DistContext, saved: Progress, tell: Callable[[str], None]) -> None:
        self.store, self.ctx, self.tell = store, ctx, tell
        self.saved = saved
        """Progress of the last checkpoint that is complete, after `wait`."""
        self.failed = 0
        """Number of saves that were given up."""
        self.on_saved: Callable[[], None] = lambda: None
        """Called on rank 0, in the writing thread, when a checkpoint is complete."""
        self._group = ctx.new_group()
        self._saves: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._save: Future[_Outcome] | None = None
        self._told: Future[_Outcome] | None = None
        self._untold: dict[str, float] = {}
        self._told_of_snapshots = False

    @property
    def busy(self) -> bool:
        """True while this rank is saving; others may have ended a moment before."""
        return self._save is not None and not self._save.done()

    def start(self, progress: Progress, write: StateWriter, *, best: bool, snapshots: Snapshots | None = None) -> None:
        """Begin to save this rank's files by `write`, to disk or to `snapshots`. Call `wait` before the next save. Collective."""
        assert not self.busy
        self._untold = self.take_scalars()  # no row may have been written since it ended
        save: Future[_Outcome] = Future()
        self._save = save

        def run() -> None:
            try:
                outcome = self._keep(progress, write, snapshots) if snapshots else self._write(progress, write, best)
                save.set_result(outcome)
            except BaseException as error:
                save.set_exception(error)

        if self._thread is None:
            # A daemon thread: a second Ctrl-C must not wait for a disk that hangs. One thread for all saves, as each thread may
            # get a pool of memory of its own: 16 pools of 42 MiB on two processors (ResNet-18).
            self._thread = Thread(target=self._work, name="saver", daemon=True)
            self._thread.start()
        self._saves.put(run)

    def wait(self) -> UserError | None:
        """Wait until the current save has ended. Returns the reason where the last one failed. Collective.

        A failure is returned, not raised, as training goes on without it. Anything but a disk error is raised.
        """
        return self._save.result().failure if self._save else None

    def take_scalars(self) -> dict[str, float]:
        """Take the figures of the last save, if one has ended since the last call."""
        if self._save and self._save is not self._told and self._save.done():
            self._told = self._save
            self._untold = self._save.result().scalars
        scalars, self._untold = self._untold, {}
        return scalars

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._save and kind and issubclass(kind, Exception):
            wait_for([self._save], LAST_S)
        self._saves.put(None)

    def _work(self) -> None:
        self.ctx.enter_thread()  # it waits for copies from the GPU
        while save := self._saves.get():
            save()

    def _write(self, progress: Progress, write: StateWriter, best: bool) -> _Outcome:
        start_s = time.perf_counter()
        step = progress.step
        try:
            self.ctx.run_on_rank0(lambda: self.store.begin(step), self._group)
            mine = self.ctx.raise_together(lambda: self.store.put(step, write), self._group)
            parts = self.ctx.gather_objects(mine, self._group)
            manifest = {name: stamp for part in parts for name, stamp in part.items()}
            self.ctx.run_on_rank0(lambda: self.store.complete(progress, manifest, best=best), self._group)
        except UserError as error:
            self.failed += 1
            if self.ctx.primary:
                self.store.abandon()
                self.tell(f"not saved: {error}")
            return _Outcome(error, self._scalars(start_s))
        self.saved = progress
        if self.ctx.primary:
            self.on_saved()
        if best and self.ctx.primary:
            self.tell(f"saved best: step {step}, {progress.best}")
        return _Outcome(None, self._scalars(start_s))

    def _scalars(self, start_s: float) -> dict[str, float]:
        return {"perf/ckpt_write_s": time.perf_counter() - start_s, "perf/ckpt_failed": float(self.failed)}

    def _keep(self, progress: Progress, write: StateWriter, snapshots: Snapshots) -> _Outcome:
        """Keep a snapshot. A failure is told once, and concerns nobody else."""
        start_s = time.perf_counter()
        try:
            snapshots.write(progress, write, self._group)
        except UserError as error:
            if self.ctx.primary and not self._told_of_snapshots:
                self.tell(f"no snapshot is kept: {error}")
            self._told_of_snapshots = True
            return _Outcome(None, {})
        self._told_of_snapshots = False
        return _Outcome(None, {"perf/snapshot_write_s": time.perf_counter() - start_s})


def check_room(store: Store, each: int, epochs: int) -> None:
    """Raise `UserError` where the disk has no room for the most checkpoints, of `each` bytes, that a run has at a time."""
    there = next(folder for folder in (store.folder, *store.folder.absolute().parents) if folder.exists())
    disk = shutil.disk_usage(there)
    needed = store.most(epochs) * each - store.taken()
    if disk.total and needed > disk.free:  # some file systems do not report it
        raise UserError(
            f"run.dir: {store.most(epochs)} checkpoints of {_gb(each)} GB need {_gb(needed)} GB beside what is there, and "
            f"{_gb(disk.free)} GB are free in {there}; make room, lower run.keep, or give another --run.dir"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
