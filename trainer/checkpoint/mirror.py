"""Mirror a run while it trains: a thread of rank 0 copies checkpoints and rows to a second place, and checks what arrived.

It never holds up the training, and never ends it. A checkpoint is complete there when its manifest is, which is copied after its
other files; `last` and `best` follow the files that they name. Each file is read again there and compared with its checksum.
What the run folder no longer keeps is removed there too.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Self

from data_pipeline.common.errors import printable
from data_pipeline.sources.storage import store as objects
from trainer.checkpoint.manifest import MANIFEST, Stamp, read_manifest
from trainer.checkpoint.mirror_restore import FILES, Foreign, Mirrored, Owner, clause, read_owner, text_of, write_owner
from trainer.checkpoint.mirror_target import checksum
from trainer.checkpoint.store import LINKS, Store, age

END_S, FAILED_S = 60.0, 25.0
"""Longest wait for the last copy: at the end of a run, and of one that failed or was asked to stop."""
_FIRST_S, _LONGEST_S = 1.0, 60.0  # first and longest pause after a failure
_REPEAT_S = 600.0  # time between two lines about a mirror that does not take what it should


class Mirror:
    """Copies a run's checkpoints and rows in a thread. As a context manager it waits for the last of them, for a bounded time."""

    def __init__(
        self, mirrored: Mirrored, store: Store, tell: Callable[[str], None], alert: Callable[[str, str], None]
    ) -> None:
        self.patience_s = END_S
        """Longest wait for the last copy, at the end."""
        self._run, self._target, self._store = mirrored.run, mirrored.target, store
        self._tell, self._alert = tell, alert
        self._owner, self._claimed = Owner(mirrored.id, mirrored.writer), False
        self._there: dict[str, str] = {}  # checksum of each file that was compared there in this process
        self._damaged: set[str] = set()  # checkpoints of the run folder that were told
        self._last: str | None = None  # the newest checkpoint, at the beginning of this round
        # Numbers of requests: the newest, the newest when the round under way began, and that of the last round which copied all.
        # Whatever is asked meanwhile is thus left for one more round; `_over` ends the thread after this one.
        self._asked, self._begun, self._done, self._over = 1, 0, 0, False
        self._changed = threading.Condition()
        self._closing, self._foreign, self._why = False, False, ""
        self._failing_s: float | None = None  # moment of the first failure, and of the last line about it
        self._told_s = 0.0
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def saved(self) -> None:
        """Let what is new be copied. Returns at once."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the last copy, as far as there is time, and tell what is not there."""
        self._closing = True
        self.saved()
        if kind is None or issubclass(kind, Exception):
            limit_s = self.patience_s if kind is None else min(self.patience_s, FAILED_S)
            with self._changed:
                self._changed.wait_for(lambda: self._done == self._asked or self._over, limit_s)
                self._over = True
                self._changed.notify_all()
            missing = list(self._missing())
            if missing:
                why = f" ({self._why})" if self._why else ""
                remedy = "" if self._foreign else "; the same command copies it"
                self._tell(f"not in the mirror {self._target}: {', '.join(missing)}{why}{remedy}")
            else:
                self._tell(f"mirrored to {self._target}")

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause_s = _FIRST_S
        with objects.patience(0):  # the next attempt is made here, with what is newest by then
            while not self._over:
                self._begun = self._asked
                try:
                    self._copy_all()
                except Foreign as error:
                    self._why, self._foreign = str(error), True
                    self._alert("no longer mirrored", f"{self._why}; training goes on")
                    with self._changed:
                        self._over = True
                        self._changed.notify_all()
                except Exception as error:
                    self._fail(error)
                    with self._changed:
                        self._changed.wait_for(lambda: self._over or self._asked != self._begun, pause_s)
                    pause_s = _FIRST_S if self._closing else min(2 * pause_s, _LONGEST_S)
                else:
                    pause_s = _FIRST_S
                    self._recover()
                    with self._changed:
                        self._done = self._begun
                        self._changed.notify_all()
                        self._changed.wait_for(lambda: self._over or self._asked != self._begun)

    def _fail(self, error: Exception) -> None:
        """Tell of a failure, at most every `_REPEAT_S`."""
        now_s = time.monotonic()
        self._why = clause(error)
        if self._failing_s is None:
            self._failing_s = self._told_s = now_s
            self._tell(f"not mirrored: {self._why}; training goes on, and it is tried again")
        elif now_s - self._told_s >= _REPEAT_S:
            self._told_s = now_s
            minutes = (now_s - self._failing_s) / 60
            self._alert("not mirrored", f"{self._why}; for {minutes:.0f} minutes nothing could be copied")

    def _recover(self) -> None:
        if self._failing_s is not None:
            self._tell(f"mirrored again to {self._target}")
        self._failing_s, self._why = None, ""

    # ---- a round ----------------------------------------------------------------------------------------------------

    def _copy_all(self) -> None:
        """Bring the mirror up to date. Raises `Foreign`, OSError and `UserError`."""
        self._claim()
        links, names = self._store.linked(), self._target.names()
        kept = sorted((folder.name for folder in self._store.folders()), key=age, reverse=True)
        wanted = [*dict.fromkeys([*(links[link] for link in LINKS if link in links), *kept])]
        self._last = links.get("last")

        # What an earlier attempt left half copied takes room.
        half = {name for name in names if f"checkpoints/{_checkpoint(name)}/{MANIFEST}" not in names}
        self._target.remove(name for name in half if _checkpoint(name) not in ("", *wanted))

        # What a run goes on from comes first; it is shown at once, with the rows that it ends at and the best of its weights.
        if self._last and not self._copy_checkpoint(self._last, names):
            return
        best = links.get("best", "")
        if not (best and self._copy_checkpoint(best, names)):
            best = self._owner.best
        for file in FILES:
            self._copy_file(file)
        shown = self._owner._replace(last=self._last or "", best=best)
        if shown != self._owner:
            write_owner(self._target, shown)
            self._owner = shown
        for link, name in (("last", self._owner.last), ("best", self._owner.best)):
            if name:
                self._copy_bytes(f"checkpoints/{link}", text_of(name))

        # The others; then what the run folder keeps no longer. Manifests go first, so that nothing half removed looks whole.
        for name in wanted:
            if name not in (self._last, best):
                self._copy_checkpoint(name, names)
        gone = [name for name in self._target.names() if _checkpoint(name) not in ("", best, *wanted)]
        self._target.remove(sorted(gone, key=lambda name: not name.endswith(MANIFEST)))
        for name in gone:
            self._there.pop(name, None)

    def _claim(self) -> None:
        """Make sure that the mirror is this run's, and that no other process writes to it. Raises `Foreign`."""
        owner = read_owner(self._target)
        if owner is None:  # at the beginning, or somebody has removed it
            self._there.clear()
            mine = Owner(self._owner.run, self._owner.writer)
        elif owner.run != self._owner.run:
            raise Foreign(f"{self._target} is that of another run; give another --run.mirror or --run.name")
        elif self._claimed and owner.writer != self._owner.writer:
            raise Foreign(f"{self._target} was taken over by another process that trains the same run")
        else:
            mine = owner._replace(writer=self._owner.writer)
        if mine != owner:
            write_owner(self._target, mine)
        self._owner, self._claimed = mine, True

    def _copy_checkpoint(self, name: str, names: dict[str, int]) -> bool:
        """Copy a checkpoint, if it is not there. Returns False where it is damaged here, or had to make room for a newer one."""
        with ExitStack() as held:
            try:
                # Open all of them now: the run folder may remove the checkpoint while a slow mirror takes it.
                folder = self._store.folder / name
                manifest = read_manifest(folder)
                files = {file: held.enter_context((folder / file).open("rb")) for file in (*manifest, MANIFEST)}
            except FileNotFoundError as error:
                if folder.exists():
                    self._tell_damaged(name, f"{Path(error.filename).name} is missing")
                return False
            except (ValueError, TypeError, AttributeError):
                self._tell_damaged(name, f"{MANIFEST} is damaged")
                return False
            stamps = {**manifest, MANIFEST: _stamp(files[MANIFEST])}
            if self._is_there(name, stamps, names):
                return True
            for file, stamp in stamps.items():  # the manifest is the last
                if self._closing and self._store.linked().get("last") != self._last:
                    return False  # the last one needs the time that is left
                if _stamp(files[file]) != stamp:
                    self._tell_damaged(name, f"{file} does not match its checksum")
                    return False
                # By its descriptor, which a removed file has too.
                self._copy(f"checkpoints/{name}/{file}", Path(f"/proc/self/fd/{files[file].fileno()}"), stamp, names)
            return True

    def _is_there(self, name: str, stamps: dict[str, Stamp], names: dict[str, int]) -> bool:
        """Return True where the mirror has the checkpoint; a manifest of another one of that name is removed."""
        place = f"checkpoints/{name}/{MANIFEST}"
        if place not in names and place not in self._there:
            return False
        if place not in self._there:
            self._there[place] = checksum(self._target, place, names[place])
        there = self._target.names() if place not in names else names
        sizes = all(there.get(f"checkpoints/{name}/{file}") == stamp.bytes for file, stamp in stamps.items())
        if sizes and self._there[place] == stamps[MANIFEST].sha256:
            return True
        self._target.remove([place])
        del self._there[place]
        return False

    def _copy_file(self, name: str) -> None:
        """Copy a file beside the checkpoints, as it is now."""
        with suppress(FileNotFoundError):
            self._copy_bytes(name, (self._run / name).read_bytes())

    def _copy_bytes(self, name: str, data: bytes) -> None:
        stamp = Stamp(len(data), hashlib.sha256(data).hexdigest())
        if self._there.get(name) != stamp.sha256:
            self._copy(name, data, stamp, {})

    def _copy(self, name: str, source: bytes | Path, stamp: Stamp, names: dict[str, int]) -> None:
        """Copy a file, unless an earlier attempt has, and read it again there. Raises OSError where it is not the same."""
        here = names.get(name) == stamp.bytes and checksum(self._target, name, stamp.bytes) == stamp.sha256
        if not here:
            self._target.write(name, source)
            if checksum(self._target, name, stamp.bytes) != stamp.sha256:
                raise OSError(0, f"{name} does not match its checksum in {self._target}")
        self._there[name] = stamp.sha256

    def _tell_damaged(self, name: str, why: str) -> None:
        if name not in self._damaged:
            self._damaged.add(name)
            self._tell(f"not mirrored: {self._store.folder / name}: {why}")

    def _missing(self) -> Iterator[str]:
        """Yield what the mirror lacks of the run folder."""
        for name in dict.fromkeys([*self._store.linked().values(), *(folder.name for folder in self._store.folders())]):
            if f"checkpoints/{name}/{MANIFEST}" not in self._there:
                yield f"checkpoints/{name}"
        for link, name in self._store.linked().items():
            if self._there.get(f"checkpoints/{link}") != hashlib.sha256(text_of(name)).hexdigest():
                yield f"checkpoints/{link}"
        for file in FILES:
            with suppress(OSError):
                if self._there.get(file) != hashlib.sha256((self._run / file).read_bytes()).hexdigest():
                    yield file


def grace_s() -> float:
    """Time from a signal to the end of the last copy: a little less than torchrun, and most launchers, wait before they kill."""
    try:
        return int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) - 5.0
    except (KeyError, ValueError):
        return FAILED_S


def copy_rest(mirrored: Mirrored, store: Store) -> None:
    """Copy what the mirror lacks of a run that has nothing left to train, and print what came of it."""

    def tell(line: str) -> None:
        print(printable(line), flush=True)

    mirrored.record()
    with Mirror(mirrored, store, tell, lambda title, text: tell(f"{title}: {text}")):
        pass  # it waits at its end


def _checkpoint(name: str) -> str:
    """Name of the checkpoint that a file of the mirror belongs to; "" for any other file."""
    parts = name.split("/")
    return parts[1] if len(parts) == 3 and parts[0] == "checkpoints" else ""


def _stamp(file: BufferedReader) -> Stamp:
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    return Stamp(file.tell(), found)
