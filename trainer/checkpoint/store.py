"""Checkpoints of a run that are either complete or absent.

DIR/checkpoints/step-00000120/{model.safetensors, training.pt, progress.json, manifest.json}
DIR/checkpoints/last -> step-00000120
DIR/checkpoints/best -> step-00000080
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipeline.common.atomic_io import sync
from data_pipeline.common.errors import UserError
from data_pipeline.cursor import Cursor

PROGRESS, MANIFEST = "progress.json", "manifest.json"
LINKS = ("last", "best")
PARTIAL = ".partial"
"""Prefix of a name that is being written, in its folder; after a crash such a file is worthless."""
NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
"""Form of the names of checkpoints."""
_MOST_BYTES = 16 << 20  # of a manifest or a progress.json: a run of 1,000 ranks has less than a hundredth of it


class Stamp(NamedTuple):
    """Length and hash of a whole file."""

    bytes: int
    sha256: str
    """Hash in hexadecimal."""


StateWriter = Callable[[Path], dict[str, Stamp]]
"""Function that adds files to a folder, each forced to disk, and returns their stamps by name. Raises OSError."""


def write_stamped(path: Path, content: bytes | memoryview) -> Stamp:
    """Write a file and force it to disk. Its stamp is that of `content`, even if the file is damaged later. Raises OSError.

    Where there is no room it writes nothing, as metrics and logs need the rest of the disk.
    """
    disk = os.statvfs(path.parent)
    if disk.f_blocks and disk.f_bavail * disk.f_frsize < len(content):  # some file systems do not report it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Stamp(len(content), hashlib.sha256(content).hexdigest())


def fault(checkpoint: Path, *, thorough: bool = True) -> str | None:
    """Find the first file of a checkpoint that is not whole, and the reason; None where all are whole.

    With `thorough` False it reads only progress.json, and compares the lengths of the others.
    """
    if not checkpoint.is_dir():
        return "it is no folder"
    file = checkpoint / MANIFEST
    # The manifest is written last, so a checkpoint with one was once complete; then its files must match it.
    try:
        manifest = read_manifest(checkpoint)
        for name, stamp in manifest.items():
            file = checkpoint / name
            length = file.stat().st_size
            if length != stamp.bytes:
                return f"{name} has {length} bytes instead of {stamp.bytes}"
            if (thorough or name == PROGRESS) and _sha256(file) != stamp.sha256:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if PROGRESS not in manifest:
        return f"{MANIFEST} is damaged"
    # Whole, but perhaps of another version.
    try:
        read_progress(checkpoint)
    except (OSError, ValueError, TypeError, KeyError):
        return f"{PROGRESS} says what this version of Sluice does not know"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Stamp]:
    """Read the names and stamps of a checkpoint's files. Raises OSError, and ValueError, TypeError or AttributeError."""
    return {name: Stamp(**stamp) for name, stamp in _read_json(checkpoint / MANIFEST).items()}


def _read_json(file: Path) -> Any:
    """Read a small file of a checkpoint. Raises OSError, and ValueError for anything but JSON that we may have written."""
    if file.exists() and (not file.is_file() or file.stat().st_size > _MOST_BYTES):
        raise ValueError(f"{file} is none of ours")
    try:
        return json.loads(file.read_text())
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Arithmetic:
    """Rounding of sums, besides a run's options: where it is the same, the same steps give the same bits."""

    precision: str
    """Precision of forward and backward pass: fp32, bf16 or fp16."""
    threads: list[int]
    """Threads that compute on each rank's CPU; 0 where a GPU computes, as they then decide nothing."""
    processor: str

    def differences(self, other: "Arithmetic") -> str:
        """List the differences, as "precision was fp32, now bf16"; empty where there are none."""
        if len(self.threads) != len(other.threads):
            return f"it had {len(self.threads)} processes, now {len(other.threads)}"
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in ("precision", "processor", "threads"))
        return ", ".join(f"{name} was {_short(was)}, now {_short(now)}" for name, was, now in pairs if was != now)


def _short(value: str | list[int]) -> str:
    return value if isinstance(value, str) else " and ".join(map(str, sorted(set(value))))


BestBy = Literal["top1", "macro_recall", "map", "macro_f1", "loss"]


@dataclass(frozen=True)
class Progress:
    """Position of a run, and all that it needs beside weights and optimiser to continue exactly."""

    step: int = 0
    """Optimizer steps so far."""
    cursor: Cursor = field(default_factory=Cursor)
    sums: list[float] = field(default_factory=list)
    """Sums of the epoch so far, over all ranks (see `engine.base.StepSums`)."""
    train_s: float = 0.0
    """Seconds of training so far, without evaluation, checkpoints and what an interruption lost."""
    best_top1_pct: float = -1.0
    """Validation top-1 of the best weights; below 0 before there are any."""
    best_map_pct: float | None = None
    """The same of mAP, for images of several classes, where there is no top-1."""
    best_by: BestBy = "top1"
    """Score that chooses the best weights (see `run.best_by`)."""
    best_score: float | None = None
    """That score of theirs; None before there are any, and in runs from before it was recorded, which chose by top-1."""
    since_best: int = 0
    """Validations since that of the best weights."""
    validated_step: int = 0
    """Step of the last validation that was due."""
    averaged: int = 0
    """Epochs in the average of `optim.swa`; 0 before there are any, and in checkpoints from before they were recorded."""
    finished: bool = False
    skipped: list[int] = field(default_factory=list)
    """Steps, counted from 1, whose images are passed over without changing the weights (see `run.on_nonfinite`)."""
    arithmetic: Arithmetic | None = None
    """Arithmetic of the last steps; None in runs from before it was recorded."""

    def over(self, epochs: int, patience: int | None) -> bool:
        """Return True where a run of so many epochs has trained them all, or has run out of `run.patience` before."""
        return self.cursor.epoch >= epochs or (patience is not None and self.since_best >= patience)

    @property
    def to_beat(self) -> float | None:
        """Score by `best_by` that weights must beat to be the best; None where there are none yet."""
        return self.best_top1_pct if self.best_score is None and self.best_top1_pct >= 0 else self.best_score

    @property
    def best(self) -> str:
        """The best weights' scores for people."""
        usual = "top-1" if self.best_map_pct is None else "mAP"
        score = self.best_top1_pct if self.best_map_pct is None else self.best_map_pct
        if self.best_score is None or self.best_by in ("top1", "map"):
            return f"val {usual} {score:.2f} %"
        names = {"macro_recall": "macro recall", "macro_f1": "macro F1"}
        named = (
            f"{names[self.best_by]} {self.best_score:.2f} %" if self.best_by in names else f"loss {self.best_score:.4f}"
        )
        return f"val {named}, val {usual} {score:.2f} %"


def read_progress(checkpoint: Path) -> Progress:
    """Read the progress of a whole checkpoint."""
    state = _read_json(checkpoint / PROGRESS)
    kept = state.get("arithmetic")
    return Progress(
        **{**state, "cursor": Cursor(**state["cursor"]), "arithmetic": Arithmetic(**kept) if kept else None}
    )


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
