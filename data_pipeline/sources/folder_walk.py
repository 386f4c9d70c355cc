"""Looking into folders of images: each real folder once, other programs' files left alone, and no folder passed over."""

import errno
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.sources.listing import counted, is_foreign, is_image, is_unread


class Entries(NamedTuple):
    """What lies in a folder, sorted by name, but for what belongs to other programs."""

    folders: list[str]
    links: set[str]
    """Those of `folders` that are links."""
    files: list[str]


@dataclass
class Walk:
    """What was found below some folders."""

    images: list[list[str]]
    """Of each folder, the sorted paths of its images."""
    folders: list[Path] = field(default_factory=list)
    """All that were looked into."""
    repeated: list[str] = field(default_factory=list)
    """Links to folders that are read already, or that lie above."""
    unread: Counter[str] = field(default_factory=Counter)
    """Suffixes of images that are not read, and how many there are of each."""

    def notes(self) -> list[str]:
        """What was left aside, a line each."""
        notes = []
        if self.unread:
            kinds = " and ".join(counted(count, f"{suffix} file") for suffix, count in sorted(self.unread.items()))
            notes.append(f"of kinds that are not read, until converted to PNG or JPEG: {kinds}")
        if self.repeated:
            links = counted(len(self.repeated), "link")
            notes.append(
                f"passed over, as they lead to folders that are read already or lie above: {links}, as {min(self.repeated)}"
            )
        return notes


def look_into(folder: Path) -> Entries:
    """The entries of a folder. Raises `UserError` where it cannot be listed."""
    folders, links, files = [], set(), []
    for entry in _scanned(folder):
        if _is_folder(entry):
            folders.append(entry.name)
            links |= {entry.name} if entry.is_symlink() else set()
        else:
            files.append(entry.name)
    return Entries(sorted(folders), links, sorted(files))


def holds(folder: Path, wanted: Callable[[str], bool]) -> bool:
    """Whether a file of a wanted name lies directly in the folder. Raises `UserError` where it cannot be listed."""
    return any(wanted(entry.name) and not _is_folder(entry) for entry in _scanned(folder))


def holds_below(folder: Path, wanted: Callable[[str], bool]) -> bool:
    """Whether a file of a wanted name lies anywhere below the folder. Links that lead above it are not followed."""
    seen, left = {_identity(above) for above in folder.resolve().parents}, [folder]
    while left:
        folder = left.pop()
        identity = _identity(folder)
        if identity in seen:
            continue
        seen.add(identity)
        if holds(folder, wanted):
            return True
        left += [folder / name for name in look_into(folder).folders]
    return False


def walk(base: Path, tops: list[Path]) -> Walk:
    """The images below each of `tops`, as paths below `base`. Each real folder is read once, by its real path if it has one.

    Raises `UserError` where a folder cannot be listed.
    """
    above = base.resolve()
    seen = {_identity(folder) for folder in (*above.parents, *([] if base in tops else [above]))}
    real = [(row, top) for row, top in reversed(list(enumerate(tops))) if not top.is_symlink() or top == base]
    links = deque((row, top) for row, top in enumerate(tops) if top.is_symlink() and top != base)
    found = Walk([[] for _ in tops])
    while real or links:
        row, folder = real.pop() if real else links.popleft()
        path = os.path.relpath(folder, base)
        identity = _identity(folder)
        if identity in seen:
            found.repeated.append(path)
            continue
        seen.add(identity)
        found.folders.append(folder)
        entries = look_into(folder)
        # A folder named like an image is listed too, and so told to be bad: it was hardly meant.
        names = [name for name in (*entries.files, *entries.folders) if is_image(name)]
        found.images[row] += names if path == "." else [f"{path}/{name}" for name in names]
        found.unread.update(os.path.splitext(name)[1].lower() for name in entries.files if is_unread(name))
        for name in entries.folders:
            (links if name in entries.links else real).append((row, folder / name))
    for images in found.images:
        images.sort()
    return found


def _scanned(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not is_foreign(entry.name))
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"data.path: cannot list {where} ({error.strerror}), so its images would be missing; mend that first"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _identity(folder: Path) -> tuple[int, int]:
    """What is the same for all names of a folder."""
    try:
        entry = os.stat(folder)
    except OSError as error:
        raise UserError(f"data.path: cannot look into {folder} ({error.strerror}); mend that first") from None
    return entry.st_dev, entry.st_ino
