"""Checkpoints of a run that are either complete or absent.

DIR/checkpoints/step-00000120/{model.safetensors, training.pt, progress.json, manifest.json}
DIR/checkpoints/last -> step-00000120
DIR/checkpoints/best -> step-00000080
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path

from data_pipeline.common.atomic_io import sync
from data_pipeline.common.errors import UserError
from trainer.checkpoint.manifest import MANIFEST, Stamp, StateWriter, fault, write_stamped
from trainer.checkpoint.progress import PROGRESS, Progress, read_progress

LINKS = ("last", "best")
PARTIAL = ".partial"
"""Prefix of a name that is being written, in its folder; after a crash such a file is worthless."""
NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
"""Form of the names of checkpoints."""


class Store:
    """Checkpoints of one run. Rank 0 completes and removes them; all ranks add files to them and may read.

    Kept are the best, the last `keep`, and those at the end of every `keep_every`-th epoch.
    """

    def __init__(self, run: Path, keep: int = 2, keep_every: int | None = None) -> None:
        self.folder, self.keep, self.keep_every = run / "checkpoints", keep, keep_every
        self.passed_over: dict[Path, str] = {}
        """Checkpoints that `newest` found damaged -> reason."""

    def newest(self) -> Path | None:
        """Return the folder of the last whole checkpoint, after reading all its bytes; None where none was ever completed.

        Raises `UserError` where there are checkpoints but none is whole.
        """
        self.passed_over = {path: "it is no folder" for path in self._named() if not path.is_dir()}
        for checkpoint in self._checkpoints():
            why = fault(checkpoint)
            if why is None:
                return checkpoint
            self.passed_over[checkpoint] = why
        if self.passed_over or (self.folder / "last").is_symlink():
            faults = "; ".join(f"{checkpoint.name}: {why}" for checkpoint, why in self.passed_over.items())
            raise UserError(
                f"run.dir: no checkpoint in {self.folder} is whole ({faults or 'last points to nothing'}); "
                "restore one, or give another --run.dir to start anew"
            )
        return None

    def chosen(self) -> Path | None:
        """Return the folder of the best checkpoint, or else of the last. Raises `UserError` where it is damaged."""
        best = self.folder / (self._target("best") or "best")
        if not best.is_dir():
            return self.newest()
        why = fault(best)
        if why:
            raise UserError(f"{best} is damaged ({why}); restore it, or remove it to have the last one instead")
        return best

    def progress(self) -> Progress:
        """Read the progress of the last checkpoint that looks whole, or a fresh one. Takes no time."""
        looking_whole = (folder for folder in self._checkpoints() if fault(folder, thorough=False) is None)
        newest = next(looking_whole, None)
        return read_progress(newest) if newest else Progress()

    def prepare(self) -> None:
        """Check that checkpoints can be written here, and remove leftovers of a crash. Raises `UserError`."""
        self.begin(0)
        self.abandon()

    def begin(self, step: int) -> None:
        """Make room for a checkpoint beside the others. For one rank; `put` and `complete` follow. Raises `UserError`."""
        with self._writing(step):
            self.abandon()
            self.partial(step).mkdir(parents=True)

    def put(self, step: int, write: StateWriter) -> dict[str, Stamp]:
        """Let `write` add files to the checkpoint begun; returns their stamps. For any rank. Raises `UserError`."""
        with self._writing(step):
            self.partial(step).mkdir(exist_ok=True)  # NFS may show the folder late to another machine
            return write(self.partial(step))

    def complete(self, progress: Progress, manifest: Mapping[str, Stamp], *, best: bool) -> None:
        """Point `last` (and `best`) to the files of all ranks, once all of them are on disk. For one rank.

        Raises `UserError` where the disk does not take them; the earlier checkpoints stay.
        """
        with self._writing(progress.step):
            partial = self.partial(progress.step)
            state = json.dumps(asdict(progress), indent=1) + "\n"
            stamps = {**manifest, PROGRESS: write_stamped(partial / PROGRESS, state.encode())}
            table = {name: stamp._asdict() for name, stamp in sorted(stamps.items())}
            write_stamped(partial / MANIFEST, (json.dumps(table, indent=1) + "\n").encode())
            sync(partial)
            complete = partial.rename(self._fresh_name(progress.step))
            for link in LINKS if best else LINKS[:1]:
                self._point(link, complete.name)
            sync(self.folder)
        self._prune()

    def abandon(self) -> None:
        """Remove a checkpoint that was begun and not completed, as far as possible. For one rank."""
        for partial in self.folder.glob(f"{PARTIAL}*"):
            _remove(partial)

    def most(self, epochs: int) -> int:
        """Count the most checkpoints that a run of so many epochs has on disk, including the one being written."""
        return self.keep + 2 + (epochs // self.keep_every if self.keep_every else 0)

    def taken(self) -> int:
        """Count the bytes of the existing checkpoints."""
        total = 0
        for folder in self.folders():
            with suppress(OSError):
                total += sum(file.lstat().st_size for file in folder.iterdir())
        return total

    def linked(self) -> dict[str, str]:
        """Names of the checkpoints that `last` and `best` point to, as far as they do."""
        return {link: name for link in LINKS if (name := self._target(link))}

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"run.dir: cannot write step {step} to {self.folder} ({error.strerror}); "
                "make room, and the same command goes on from the checkpoint before"
            ) from None

    def _checkpoints(self) -> list[Path]:
        """List the folders of checkpoints, the newest first. None is newer than the one that `last` names."""
        last = self._target("last")
        folders = [folder for folder in self.folders() if last is None or age(folder.name) <= age(last)]
        copies = [self.folder / link for link in LINKS if self._is_copy(link) and self._target(link) is None]
        return sorted(folders, key=lambda folder: age(folder.name), reverse=True) + copies

    def folders(self) -> list[Path]:
        """List the folders that have the name of a checkpoint. Raises `UserError` where they cannot be read."""
        return [path for path in self._named() if path.is_dir()]

    def _named(self) -> list[Path]:
        """List everything that has the name of a checkpoint. Raises `UserError` where the folder cannot be read."""
        try:
            return [self.folder / name for name in sorted(os.listdir(self.folder)) if NAME.fullmatch(name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(
                f"run.dir: cannot list {self.folder} ({error.strerror}); mend it, or give another --run.dir"
            ) from None

    def _target(self, link: str) -> str | None:
        """Read the checkpoint's name from a link; a copy of the run may have a folder or a text file in its place."""
        path = self.folder / link
        try:
            if path.is_symlink():
                name = Path(os.readlink(path)).name
            elif self._is_copy(link):
                manifest = (path / MANIFEST).read_bytes()
                name = next(folder.name for folder in self.folders() if _holds(folder / MANIFEST, manifest))
            else:
                name = path.read_text()[:100].strip()
        except (OSError, ValueError, StopIteration):
            return None
        return name if NAME.fullmatch(name) else None

    def _is_copy(self, link: str) -> bool:
        """Return True for a folder in place of a link, as `cp -rL`, scp and object stores leave it."""
        path = self.folder / link
        return path.is_dir() and not path.is_symlink()

    def partial(self, step: int) -> Path:
        """Folder of a checkpoint that is being written."""
        # Named after the step, because on NFS another machine may confuse the folder with one that was renamed before.
        return self.folder / f"{PARTIAL}-{step:08d}"

    def _fresh_name(self, step: int) -> Path:
        name = f"step-{step:08d}"
        names = chain([name], (f"{name}.{again}" for again in count(1)))
        return next(self.folder / name for name in names if not os.path.lexists(self.folder / name))

    def _point(self, link: str, name: str) -> None:
        beside, place = self.folder / f".{link}", self.folder / link
        _remove(beside)
        beside.symlink_to(name)
        if self._is_copy(link):
            only = self._target(link) is None and fault(place, thorough=False) is None
            place.rename(self._fresh_name(read_progress(place).step) if only else self.folder / f"{PARTIAL}-{link}")
        os.replace(beside, place)
        _remove(self.folder / f"{PARTIAL}-{link}")

    def _prune(self) -> None:
        good = [folder for folder in self._checkpoints() if folder not in self.passed_over]
        kept = {*good[: self.keep], *filter(self._is_milestone, good), self.folder / (self._target("best") or "last")}
        for folder in self.folders():
            if folder not in kept and not folder.is_symlink():
                doomed = self.folder / f"{PARTIAL}-{folder.name}"
                with suppress(OSError):  # a half removed folder must not look like a checkpoint
                    shutil.rmtree(folder.rename(doomed))

    def _is_milestone(self, folder: Path) -> bool:
        if self.keep_every is None or fault(folder, thorough=False):
            return False
        cursor = read_progress(folder).cursor
        return cursor.seen == 0 and cursor.epoch % self.keep_every == 0


def _holds(file: Path, content: bytes) -> bool:
    try:
        return file.read_bytes() == content
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def age(name: str) -> tuple[int, int]:
    """Sort key for the names of checkpoints in the order of writing: step-00000120, then step-00000120.1."""
    match = NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)
