"""Find the image that a name in a table means: with or without folders and suffix, in any case, with either slash.

A name must fit a single image. Where it begins with the folders of another machine, at least one of them must be among
the image's own folders.
"""

import os
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.common.errors import require
from data_pipeline.sources.folder_walk import walk
from data_pipeline.sources.image_headers import SUFFIXES
from data_pipeline.sources.splits import Role, role_of
from data_pipeline.sources.tables.text_table import few, shown


@dataclass
class Located:
    """Images found for N names."""

    paths: list[str]
    """Path of each image below the images' folder; the name itself where there is no such image."""
    missing: list[str] = field(default_factory=list)
    """Names without an image."""
    several: dict[str, list[str]] = field(default_factory=dict)
    """Names that fit several images."""
    folders: list[str] = field(default_factory=list)
    """Folders in which the images lie, where the names do not say so."""
    foreign: list[str] = field(default_factory=list)
    """Names that begin with folders of another machine."""
    there: set[str] = field(default_factory=set)
    """All images below the images' folder."""
    unread: str = ""
    """Files and links that were left out below the images' folder, in words."""

    @property
    def all_found(self) -> bool:
        return not self.missing and not self.several

    def beyond(self, names: list[str]) -> list[str]:
        """List the images in the folders of those that were found that none of `names` can mean."""
        keys = {_key((_parts(name) or [""])[-1]) for name in names}
        folders = {os.path.dirname(path) for path in self.paths}
        return sorted(
            path for path in self.there if os.path.dirname(path) in folders and keys.isdisjoint(_names_of(path))
        )

    def check(self, names: int, file: Path, root: Path) -> None:
        """Raise `UserError` where an image is missing, or a name fits several."""
        require(
            not self.missing,
            f"data.images: {len(self.missing)} of the {names} images that {file} names are not in {root}: "
            f"{few(self.missing)}{f' ({self.unread})' if self.unread else ''}; give the folder that they are in as --data.images",
        )
        name, images = next(iter(self.several.items()), ("", [""]))
        require(
            not self.several,
            f"data.images: {len(self.several)} of the {names} images that {file} names could be several files, as "
            f"{shown(name)}: {few(images, 3)}; give the folder that they are in as --data.images, or write their suffixes "
            "into the table",
        )


class NamedImages:
    """Images below a folder, to be found by name; of the same name in folders of several splits, those of `role`."""

    def __init__(self, root: Path, role: Role | None = None) -> None:
        self._role = role
        self._tops = {os.path.abspath(root) + "/", f"{root.resolve()}/"}
        self._above = [_key(part) for part in root.resolve().parts[1:]]
        walked = walk(root, [root])
        self._unread = "; ".join(walked.notes())
        self._paths = set(walked.images[0])
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in sorted(self._paths):
            for name in _names_of(path):
                self._by_name[name].append(path)

    def locate(self, names: list[str]) -> Located:
        """Find the images that all of `names` together mean.

        If a name fits several images, the one in the only folder that has images for all other names is taken.
        """
        fitting = {name: self._fitting(name) for name in dict.fromkeys(names)}
        if any(len(images) > 1 for images in fitting.values()):
            fitting = _in_one_folder(fitting, self._role)
        found = {name: images[0] for name, images in fitting.items() if len(images) == 1}
        elsewhere = {_folder(name, path) for name, path in found.items()}
        return Located(
            [found.get(name, name) for name in names],
            [name for name in names if not fitting[name]],
            {name: images for name, images in fitting.items() if len(images) > 1},
            sorted(elsewhere - {""}),
            [name for name in found if self._below(name) == name and _is_foreign(_parts(name))],
            self._paths,
            self._unread,
        )

    def _fitting(self, name: str) -> list[str]:
        below = self._below(name)
        return self._exact(below) or (self._ending_in(name) if below == name else [])

    def _below(self, name: str) -> str:
        """Cut the images' folder from the front of a name."""
        return next((name.removeprefix(top) for top in self._tops if name.startswith(top)), name)

    def _exact(self, name: str) -> list[str]:
        """Find images at exactly this place; the name may lack the suffix."""
        path = os.path.normpath(name)
        return [path] if path in self._paths else [path + end for end in sorted(SUFFIXES) if path + end in self._paths]

    def _ending_in(self, name: str) -> list[str]:
        """Find images whose paths, with the folders above included, end in the name."""
        parts = _parts(name)
        foreign, inside = _is_foreign(parts), [part for part in parts if part not in ("..", "/")]
        wanted, last = [_key(part) for part in inside[:-1]], (inside or [""])[-1]
        depths: dict[str, int] = {}
        for path in self._by_name.get(_key(last), []):
            own = [_key(part) for part in path.split("/")[:-1]]
            depth = _common_end(wanted, [*self._above, *own])
            # Folders of another machine: the last ones must be the image's own, and at least one of them.
            if depth >= max(len(own), 1) if foreign else depth == len(wanted):
                depths[path] = depth
        best = [path for path, depth in depths.items() if depth == max(depths.values())]
        for same in (lambda path: _key(path) == _key(last), lambda path: path.startswith(last)):  # suffix, then case
            best = [path for path in best if same(os.path.basename(path))] or best
        return best


def _parts(name: str) -> list[str]:
    """Split a name into folders and file; "/" in front stands for the root of any system, ".." for a way out of the folder."""
    parts: list[str] = ["/"] if re.match(r"[\\/]|[A-Za-z]:[\\/]", name) else []
    for part in re.split(r"[\\/]+", re.sub(r"^[A-Za-z]:(?=[\\/])", "", name)):
        if part == ".." and parts and parts[-1] not in ("..", "/"):
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return parts


def _is_foreign(parts: list[str]) -> bool:
    """Return True for a name that leads out of any folder, as one from another machine may."""
    return parts[:1] in (["/"], [".."])


def _key(text: str) -> str:
    """Reduce names that differ only in case, or in how accents are written, to one."""
    return unicodedata.normalize("NFC", text).lower()


def _names_of(path: str) -> set[str]:
    """Names that an image may have in a table, whatever its folders are."""
    name = _key(os.path.basename(path))
    return {name, os.path.splitext(name)[0]}


def _common_end(one: list[str], other: list[str]) -> int:
    """Count the folders at the end that are the same."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _in_one_folder(fitting: dict[str, list[str]], role: Role | None) -> dict[str, list[str]]:
    """Keep the images in the only folder that has one for each name; all of them if no folder has, or several.

    Of such folders of several splits, the one of the split `role` is taken.
    """
    folders = [{_folder(name, path) for path in images} for name, images in fitting.items() if images]
    common = set.intersection(*folders)
    if len(common) > 1 and role:
        common = {folder for folder in common if role in map(role_of, folder.split("/"))}
    if len(common) != 1:
        return fitting
    return {name: [path for path in images if _folder(name, path) in common] for name, images in fitting.items()}


def _folder(name: str, path: str) -> str:
    """Cut a name, with its own folders, from the end of a path."""
    folders = path.split("/")[:-1]
    own = _common_end([_key(part) for part in _parts(name)[:-1]], [_key(part) for part in folders])
    return "/".join(folders[: len(folders) - own])
