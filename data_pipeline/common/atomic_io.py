"""Write files whole or not at all, and read them with as few system calls as possible."""

import errno
import os
import stat
from pathlib import Path

MOST_BYTES = 1 << 30
"""Most bytes that are read at once: twice the size of the largest image that is accepted, a BMP."""


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, force it to disk, then rename. Raises OSError."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def why_untrusted(folder: Path, *owners: int) -> str | None:
    """Say why another user may have put files into a folder; None if that is impossible. Raises OSError.

    The folder must belong to this process's user, or to one of `owners`, and must not be writable for everybody.
    """
    entry = folder.stat()
    if entry.st_uid not in (os.geteuid(), *owners):
        return f"{folder} belongs to another user"
    if entry.st_mode & stat.S_IWOTH:
        return f"everybody may write to {folder}"
    return None


def stays_below(name: str) -> bool:
    """Return True where a name from an archive or a manifest, joined to its folder, lies below it. Links are not resolved."""
    return not os.path.isabs(name) and ".." not in Path(name).parts


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: str | Path, offset: int = 0, length: int | None = None) -> bytes:
    """Read `length` bytes from `offset` on, fewer where the file ends before; to the end if `length` is not given.

    Raises OSError, also for more than MOST_BYTES.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        wanted = os.fstat(descriptor).st_size - offset if length is None else length
        if wanted > MOST_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        data = os.pread(descriptor, max(wanted, 1), offset)
        while len(data) < wanted and (more := os.pread(descriptor, wanted - len(data), offset + len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)
