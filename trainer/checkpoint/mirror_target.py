"""Places that a run is mirrored to: a folder, as on a second disk, or a folder in an object store."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from data_pipeline.common.address import Address, place
from data_pipeline.common.errors import require
from data_pipeline.sources.storage import store
from trainer.checkpoint.store import PARTIAL

PIECE = 8 << 20
"""Bytes read at a time."""
_REQUESTS = 2  # parts of 16 MiB on their way at a time, as they take memory and must arrive in 90 s each


class Target(Protocol):
    """Files by their names, such as checkpoints/last. Methods raise OSError or `UserError` where the place does not answer."""

    def names(self) -> dict[str, int]:
        """Size in bytes of each file; what a kill left of one is called `.partial`."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Read the bytes from `start` to `end`, or all. Raises FileNotFoundError."""

    def write(self, name: str, source: bytes | Path) -> None:
        """Write a file, whole or not at all."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, in this order."""


def open_target(mirror: str, name: str) -> Target:
    """Open the place of the run `name` in `mirror`. Asks nothing there yet. Raises `UserError`."""
    where = place(mirror, "run.mirror")
    return ObjectTarget(where, name) if isinstance(where, Address) else FolderTarget(where, name)


class FolderTarget:
    """A folder. The one that it lies in must exist: a disk that is not mounted must not become a folder of another one."""

    def __init__(self, parent: Path, name: str) -> None:
        self._parent, self._root = parent, parent / name

    def __str__(self) -> str:
        return str(self._root)

    def names(self) -> dict[str, int]:
        self._check_parent()
        found = (Path(folder, file) for folder, _, files in os.walk(self._root) for file in files)
        return {str(file.relative_to(self._root)): file.stat().st_size for file in found}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        self._check_parent()
        with (self._root / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def write(self, name: str, source: bytes | Path) -> None:
        self._check_parent()
        file = self._root / name
        beside = file.with_name(PARTIAL)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as stream:
                if isinstance(source, bytes):
                    stream.write(source)
                else:
                    with source.open("rb") as given:
                        while piece := given.read(PIECE):
                            stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
                # What is read next, to be compared, comes from the disk and not from memory.
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            beside.replace(file)
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self._root / name).unlink(missing_ok=True)
            with suppress(OSError):
                (self._root / name).parent.rmdir()  # only if nothing is left in it

    def _check_parent(self) -> None:
        require(self._parent.is_dir(), f"{self._parent} is no folder that is there; make it, or mount its disk")


class ObjectTarget:
    """A folder in an object store."""

    def __init__(self, parent: Address, name: str) -> None:
        require(
            parent.can_list,
            f"run.mirror: {parent} is on a web server, where nothing can be written; give a folder, or an s3:// or gs:// address",
        )
        store.require_obstore(parent.scheme)
        self._root = parent / name

    def __str__(self) -> str:
        return str(self._root)

    def names(self) -> dict[str, int]:
        return {name: stat.size for name, stat in store.list_below(self._root)}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        return store.read(self._root / name, start, end)

    def write(self, name: str, source: bytes | Path) -> None:
        store.write(self._root / name, source, _REQUESTS)

    def remove(self, names: Iterable[str]) -> None:
        store.remove([self._root / name for name in names])


def checksum(target: Target, name: str, size: int) -> str:
    """Compute the SHA-256 of a file of `size` bytes as the place returns it, piece by piece."""
    found = hashlib.sha256()
    for start in range(0, size, PIECE):
        found.update(target.read(name, start, min(start + PIECE, size)))
    return found.hexdigest()
