"""Walk folders of images: each real folder once, without other programs' files, and none passed over in silence."""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.sources.listing import LeftOut, counted, is_foreign, is_image


class Entries(NamedTuple):
    """Entries of a folder, sorted by name, without those of other programs."""

    folders: list[str]
    links: set[str]
    """Entries of `folders` that are links."""
    files: list[str]


@dataclass
class Walk:
    """Images found below some folders."""

    images: list[list[str]]
    """Sorted paths of the images in each folder."""
    folders: list[Path] = field(default_factory=list)
    """All folders that were read."""
    repeated: list[str] = field(default_factory=list)
    """Links to folders that were read already, or that lie above."""
    left_out: LeftOut = field(default_factory=LeftOut)

    def notes(self) -> list[str]:
        """Say in one line each which images and links were left out."""
        notes = self.left_out.images()
        if self.repeated:
            links = counted(len(self.repeated), "link")
            notes.append(
                f"passed over, as they lead to folders that are read already or lie above: {links}, as {min(self.repeated)}"
            )
        return notes


def look_into(folder: Path) -> Entries:
    """List a folder. Raises `UserError` where that fails."""
    folders, links, files = [], set(), []
    for entry in _scanned(folder):
        if _is_folder(entry):
            folders.append(entry.name)
            links |= {entry.name} if entry.is_symlink() else set()
        else:
            files.append(entry.name)
    return Entries(sorted(folders), links, sorted(files))


def holds(folder: Path, wanted: Callable[[str], bool]) -> bool:
    """Return True where a file of a wanted name lies directly in the folder. Raises `UserError` where it cannot be listed."""
    return any(wanted(entry.name) and not _is_folder(entry) for entry in _scanned(folder))


def holds_below(folder: Path, wanted: Callable[[str], bool]) -> bool:
    """Return True where a file of a wanted name lies anywhere below the folder. Links that lead above it are not followed."""
    here = folder.parent.resolve()
    seen, left = {_identity(above) for above in (*folder.resolve().parents, here, *here.parents)}, [folder]
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


def leads_back(link: Path) -> bool:
    """Return True where a link to a folder leads to the folder that it lies in, or above."""
    here = link.parent.resolve()
    return _identity(link) in {_identity(above) for above in (here, *here.parents)}


def walk(base: Path, tops: list[Path]) -> Walk:
    """List the images below each of `tops`, as paths below `base`. Each real folder is read once, by its real path if possible.

    Raises `UserError` where a folder cannot be listed.
    """
    # Real folders before links, so that an image gets its real path; and none above `base`, so that no link leads in a circle.
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
        # A folder named like an image is listed too, and so reported as bad: it is probably a mistake.
        names = [name for name in (*entries.files, *entries.folders) if is_image(name)]
        found.images[row] += names if path == "." else [f"{path}/{name}" for name in names]
        for name in entries.files:
            if not is_image(name):
                found.left_out.add(name if path == "." else f"{path}/{name}")
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
    """Device and inode: the same under every name of a folder."""
    try:
        entry = os.stat(folder)
    except OSError as error:
        raise UserError(f"data.path: cannot look into {folder} ({error.strerror}); mend that first") from None
    return entry.st_dev, entry.st_ino
