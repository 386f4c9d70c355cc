"""Start of a run that has a mirror: whose mirror it is, and the run folder restored from it.

MIRROR/NAME/mirror.json     the run that it belongs to, and the process that writes to it
MIRROR/NAME/config.yaml     … and the rest as in the run folder; `last` and `best` are texts in place of links
RUN/mirror_id.txt           the run, as the mirror names it
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.sources.storage import store as objects
from trainer.checkpoint.manifest import MANIFEST, Stamp
from trainer.checkpoint.mirror_target import PIECE, Target, open_target
from trainer.checkpoint.progress import PROGRESS, Progress, read_progress
from trainer.checkpoint.store import NAME, PARTIAL, Store, age

OWNER, ID = "mirror.json", "mirror_id.txt"
CONFIG = "config.yaml"
FILES = (CONFIG, "metrics.jsonl", "wandb_id.txt")
"""Files beside the checkpoints that a mirror has. What TensorBoard and W&B wrote can be had from the rows and from W&B."""

Differences = Callable[[str], tuple[str, str] | None]
"""Function of a saved configuration that names an option in which it differs, and the remedy."""

_START_S = 5.0  # time for a mirror to answer at the start of a run that can go on without
_MOST_BYTES = 16 << 20  # of a manifest


class Owner(NamedTuple):
    """Run that a mirror belongs to, and the process that writes to it."""

    run: str
    writer: str
    last: str = ""
    """Name of the checkpoint to go on from, "" before there is one; written after all its files."""
    best: str = ""
    """Name of the best one."""


class Foreign(UserError):
    """A mirror that belongs to another run, or that another process has taken over."""


def read_owner(target: Target) -> Owner | None:
    """Read whose mirror it is; None where nothing is there. Raises `Foreign` for any other files, OSError and `UserError`."""
    try:
        table = json.loads(target.read(OWNER))
        return Owner(*(str(table[name]) for name in Owner._fields))
    except FileNotFoundError:
        require_empty(target)
        return None
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise Foreign(f"{target}: {OWNER} is none of a mirror; give another place") from None


def require_empty(target: Target) -> None:
    """Raise `Foreign` where files are there that are no mirror's."""
    there = next((name for name in sorted(target.names()) if not name.endswith(PARTIAL)), None)
    if there is not None:
        raise Foreign(f"{target} holds {there} and is no mirror; give another place, or remove what is there")


def text_of(name: str) -> bytes:
    """Text in place of a link to the checkpoint `name`, for those who copy a mirror by hand."""
    return f"{name}\n".encode()


def write_owner(target: Target, owner: Owner) -> None:
    """Write whose mirror it is. Raises OSError and `UserError`."""
    target.write(OWNER, json.dumps(owner._asdict()).encode() + b"\n")


class Mirrored:
    """A run folder and its mirror, before the training begins. For rank 0. Raises `UserError`."""

    def __init__(self, mirror: str, name: str, store: Store) -> None:
        self.target, self.store, self.run = open_target(mirror, name), store, store.folder.parent
        self.writer = secrets.token_hex(8)
        """Token of this process."""
        self.id = ""
        """The run, as its mirror names it; "" before it has one."""
        with suppress(OSError):
            self.id = (self.run / ID).read_text().strip()
        require(
            not _same_folder(str(self.target), self.run),
            f"run.mirror: {mirror} is where the run itself lies; give a folder on another disk, or an object store",
        )

    def restore(self, differences: Differences) -> None:
        """Restore from the mirror what the run folder lacks: all of it, or what is newer there.

        A run without a checkpoint needs an answer of the mirror, so that none begins anew beside one that could be restored.
        Raises `UserError`, and has then changed nothing unless the mirror or the disk failed in the middle.
        """
        alone = bool(self.store.folders())
        try:
            with objects.patience(_START_S if alone else objects.PATIENCE_S):
                owner = read_owner(self.target)
                names = self.target.names() if owner else {}
        except Foreign as error:
            raise UserError(f"run.mirror: {error}") from None
        except (OSError, UserError) as error:
            if alone:
                return  # it goes on, and what copies in the background tells of it
            raise UserError(
                f"run.mirror: {clause(error)}; {self.run} has no checkpoint, and may have to be restored from there: mend that, "
                "or leave run.mirror out to begin anew"
            ) from None
        if owner is None:
            return
        if owner.run != self.id and (self.id or alone):
            raise UserError(
                f"run.mirror: {self.target} is that of another run than {self.run}; give another --run.mirror or --run.name"
            )
        with self._reading():
            self._restore(differences, owner, names)

    def _restore(self, differences: Differences, owner: Owner, names: dict[str, int]) -> None:
        # Nothing is written before it is clear that it is this run.
        config = self.target.read(CONFIG) if CONFIG in names else b""
        difference = differences(config.decode()) if config else None
        if difference:
            raise UserError(
                f"run.mirror: {self.target} was started with other options ({difference[0]}); give that option as it was, or "
                "another --run.name or --run.mirror"
            )
        self.id = owner.run
        newest = self._newest()
        wanted = sorted(self._checkpoints(names, owner.last, newer_than=newest), key=age)
        if not wanted:
            return
        missing = not (self.run / CONFIG).exists()
        require(
            not missing or bool(config),
            f"run.mirror: {self.target} has no {CONFIG}; restore it, or give another --run.mirror or --run.name",
        )
        how = "is gone" if missing else "is behind its mirror"
        print(printable(f"{self.run} {how}: restoring step {age(wanted[-1])[0]} from {self.target}"), flush=True)

        # The configuration makes it a run folder, in which a start after this one goes on; the rows before what they end at.
        for file in FILES:
            if file in names and (file != CONFIG or missing):
                self._write(file, self.target.read(file))
        self.record()
        faults = {}
        for name in wanted:
            try:
                self._fetch(name, names, best=name == owner.best)
            except _Damaged as error:
                self.store.abandon()
                faults[name] = str(error)
                print(printable(f"passed over {self.target}/checkpoints/{name}: {error}"), flush=True)
        if len(faults) == len(wanted) and newest is None:
            raise UserError(
                f"run.mirror: no checkpoint in {self.target} is whole; to begin anew give another --run.mirror or --run.name"
            )

    def _fetch(self, name: str, names: dict[str, int], *, best: bool) -> None:
        """Make a checkpoint of the mirror one of the run folder. Raises `_Damaged` unless every byte matches its checksum."""
        try:
            if names[f"checkpoints/{name}/{MANIFEST}"] > _MOST_BYTES:
                raise ValueError
            table = json.loads(self.target.read(f"checkpoints/{name}/{MANIFEST}"))
            manifest = {file: Stamp(**stamp) for file, stamp in table.items()}
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise _Damaged(f"{MANIFEST} is damaged") from None
        if PROGRESS not in manifest or not all(Path(file).name == file for file in manifest):
            raise _Damaged(f"{MANIFEST} is damaged")
        step, found = age(name)[0], list[Progress]()

        def write(folder: Path) -> dict[str, Stamp]:
            for file, stamp in manifest.items():
                self._download(f"checkpoints/{name}/{file}", folder / file, stamp)
            try:
                found.append(read_progress(folder))
            except (OSError, ValueError, TypeError, KeyError):
                raise _Damaged(f"{PROGRESS} says what this version of Sluice does not know") from None
            return {file: stamp for file, stamp in manifest.items() if file != PROGRESS}  # which `complete` adds

        self.store.begin(step)
        stamps = self.store.put(step, write)
        self.store.complete(found[0], stamps, best=best)

    def _download(self, name: str, file: Path, stamp: Stamp) -> None:
        """Download a file. Raises OSError where this disk does not take it, `UserError` for the mirror, and `_Damaged`."""
        found = hashlib.sha256()
        with file.open("wb") as stream:
            for start in range(0, stamp.bytes, PIECE):
                piece = self._piece(name, start, min(start + PIECE, stamp.bytes))
                found.update(piece)
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        if found.hexdigest() != stamp.sha256:
            raise _Damaged(f"{file.name} does not match its checksum")

    def _piece(self, name: str, start: int, end: int) -> bytes:
        try:
            return self.target.read(name, start, end)
        except FileNotFoundError:
            raise _Damaged(f"{Path(name).name} is missing") from None
        except OSError as error:  # not of this disk, as the store would take it
            raise UserError(f"run.mirror: {self.target}: {clause(error)}; mend that, and start again") from None

    def _newest(self) -> str | None:
        """Name of the newest whole checkpoint in the run folder."""
        with suppress(UserError):
            newest = self.store.newest()
            return newest.name if newest else None
        return None

    def _checkpoints(self, names: dict[str, int], last: str, newer_than: str | None) -> Iterator[str]:
        """Yield the checkpoints of the mirror that are complete, none newer than `last`, which is written after its files."""
        for name in names:
            parts = Path(name).parts
            if len(parts) == 3 and parts[0] == "checkpoints" and parts[2] == MANIFEST and NAME.fullmatch(parts[1]):
                after = newer_than is None or age(parts[1]) > age(newer_than)
                if after and age(parts[1]) <= age(last):
                    yield parts[1]

    def claim(self) -> None:
        """Make the mirror that of this run, if it has no checkpoint yet: a mistake in run.mirror shows before the first step.

        Raises `UserError`.
        """
        self.id = self.id or secrets.token_hex(8)
        if not self.store.folders():
            with self._reading():
                write_owner(self.target, Owner(self.id, self.writer))

    def record(self) -> None:
        """Write down in the run folder which mirror is its own. Raises `UserError`."""
        self.id = self.id or secrets.token_hex(8)
        if not (self.run / ID).exists():
            self._write(ID, f"{self.id}\n".encode())

    def _write(self, name: str, data: bytes) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            replace_file(self.run / name, data)
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {self.run} ({error.strerror}); give another --run.dir") from None

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run.mirror: {self.target}: {clause(error)}; mend that, and start again") from None


def open_mirror(mirror: str, name: str, store: Store, differences: Differences) -> Mirrored:
    """Open the mirror of the run `name`, and restore what the run folder lacks. For rank 0. Raises `UserError`."""
    mirrored = Mirrored(mirror, name, store)
    mirrored.restore(differences)
    return mirrored


class _Damaged(Exception):
    """A checkpoint in the mirror that is not whole, and why."""


def _same_folder(target: str, run: Path) -> bool:
    with suppress(OSError):
        return os.path.realpath(target) == os.path.realpath(run)
    return False


def clause(error: Exception) -> str:
    """First clause of an error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).partition("; ")[0].removeprefix("run.mirror: ")
