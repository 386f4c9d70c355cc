"""Blocks of remote objects on this machine's disk, shared by all processes: each is fetched once, the oldest make room.

A block is a file `objects/XX/HASH/NUMBER`, where HASH stands for the object's address and version, so that a replaced object
finds nothing of the old one. It is written beside and renamed: a killed process leaves no half block. The time of its last
change is that of its last use, within a minute.
"""

import fcntl
import hashlib
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.address import Address
from data_pipeline.common.atomic_io import read_bytes, why_untrusted
from data_pipeline.common.errors import UserError, printable
from data_pipeline.common.launcher import warn_on_rank0

BLOCK = 1 << 20
"""Bytes of a block: a distant store answers after 30 ms or so, in which a few more images cost nothing."""
_LOCKS = 4096  # files that processes lock while they fetch; two blocks that share one wait for each other
_FULL, _AFTER = 0.9, 0.8  # shares of the cap at which room is made, and to which
_STEP = 0.02  # share of the cap that a process writes before it looks at the whole again
_STALE_S = 3600.0  # age at which a half-written block is a killed process's
_USED_S = 60.0  # time for which one use of a block counts


class _Entry(NamedTuple):
    used_s: float
    size: int
    path: str


class BlockCache:
    """Folder of blocks of at most `most_bytes` in all, and at most half of what the disk would have free without them."""

    def __init__(self, folder: Path, most_bytes: float) -> None:
        """Open the cache, or make it. Raises OSError, and `UserError` where others may write there."""
        self.folder, self._most_bytes = folder, most_bytes
        self._held, self._written = 0, 0  # bytes of all blocks when last counted, and of those that were written since
        self._used: dict[str, float] = {}
        (folder / "locks").mkdir(mode=0o700, parents=True, exist_ok=True)
        untrusted = why_untrusted(folder)
        if untrusted:
            raise UserError(f"cache: {untrusted}; remove it, or set SLUICE_CACHE to a folder of your own")
        self._make_room()

    @property
    def most_bytes(self) -> float:
        """Most bytes of all blocks, as the disk is now."""
        disk = os.statvfs(self.folder)
        return min(self._most_bytes, (self._held + disk.f_bavail * disk.f_frsize) / 2)

    def folder_of(self, address: Address, version: str) -> str:
        """Name the folder of an object's blocks, whose names are their numbers."""
        name = hashlib.blake2b(
            f"{BLOCK}\n{address}\n{version}".encode(errors="surrogateescape"), digest_size=16
        ).hexdigest()
        return f"{self.folder}/{name[:2]}/{name}"

    def read(self, path: str, offset: int, length: int) -> bytes | None:
        """Read a part of a block; None where it is not there, or not whole. Raises OSError."""
        try:
            data = read_bytes(path, offset, length)
        except FileNotFoundError:
            return None
        now_s = time.monotonic()
        if now_s - self._used.get(path, -_USED_S) >= _USED_S:
            self._used[path] = now_s
            _touch(path)
        return data if len(data) == length else None

    def fetched(self, path: str, size: int, fetch: Callable[[], bytes]) -> bytes:
        """Fetch a block of `size` bytes and keep it, unless another process has done so by now. Returns all of it."""
        with _locked(self.folder / "locks" / str(zlib.crc32(path.encode()) % _LOCKS)):
            return self.read(path, 0, size) or self._keep(path, fetch())

    def _keep(self, path: str, data: bytes) -> bytes:
        """Write a block, if the disk takes it."""
        beside = f"{path}.{os.getpid()}.partial"
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            with open(beside, "wb") as file:
                file.write(data)
            os.replace(beside, path)
        except OSError as error:  # as of a full disk: then it is fetched again each time
            _say_uncached(self.folder, error.strerror or str(error))
            _remove(beside)
            return data
        self._written += len(data)
        if self._written > _STEP * self._most_bytes:
            self._make_room()
        return data

    def _make_room(self) -> None:
        """Remove the blocks that were not used for longest where the cache is nearly full, unless a process is at it."""
        self._written = 0
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
            entries = sorted(self._entries())
            self._held = sum(entry.size for entry in entries)
            most = self.most_bytes
            if self._held <= _FULL * most:
                return
            for entry in entries:
                if self._held <= _AFTER * most:
                    break
                _remove(entry.path)
                self._held -= entry.size

    def _entries(self) -> Iterator[_Entry]:
        now_s = time.time()
        for folder in self.folder.glob("??/*"):
            try:
                found = list(os.scandir(folder))
            except OSError:
                continue
            if not found:
                _remove_folder(folder)
            for block in found:
                try:
                    entry = block.stat()
                except OSError:
                    continue
                if block.name.endswith(".partial") and now_s - entry.st_mtime > _STALE_S:
                    _remove(block.path)
                else:
                    yield _Entry(entry.st_mtime, entry.st_size, block.path)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock of this machine's; without one on a file system that has none, where a block may be fetched twice."""
    with open(file, "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _touch(path: str) -> None:
    with suppress(OSError):
        os.utime(path)


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _remove_folder(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@cache
def _say_uncached(folder: Path, why: str) -> None:
    """Tell once that nothing more can be kept."""
    warn_on_rank0(printable(f"cache: cannot write to {folder} ({why}); what is not there is fetched each time"))
