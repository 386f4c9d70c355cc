"""Files of a checkpoint with their lengths and hashes, by which it is known to be whole."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.progress import PROGRESS, read_json, read_progress

MANIFEST = "manifest.json"


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
    return {name: Stamp(**stamp) for name, stamp in read_json(checkpoint / MANIFEST).items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
