"""Class folders inside archives: the same layout as on disk, found from the paths of the images alone."""

import posixpath
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from data_pipeline.common.class_names import lacking
from data_pipeline.common.errors import require
from data_pipeline.sources.class_folders import are_parts, doubtful_places, is_whole_set
from data_pipeline.sources.listing import counted
from data_pipeline.sources.splits import Splits, find_splits


class Halves(NamedTuple):
    """Folders of a dataset's splits, as paths in the archives; "" is the topmost."""

    train: str
    val: str | None
    """None where a part of `train` is for validation."""
    notes: list[str]


class Tree:
    """Folders that hold images, and those around them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.images: dict[str, list[str]] = defaultdict(list)
        """Folder -> paths of the images directly in it."""
        self.folders: dict[str, list[str]] = defaultdict(list)
        """Folder -> names of the folders in it that hold images at any depth, sorted."""
        for path in paths:
            self.images[posixpath.dirname(path)].append(path)
        found: dict[str, set[str]] = defaultdict(set)
        for folder in self.images:
            while folder:
                above, name = posixpath.split(folder)
                found[above].add(name)
                folder = above
        self.folders.update({folder: sorted(names) for folder, names in found.items()})

    def below(self, folder: str) -> list[str]:
        """List the images anywhere below a folder, sorted."""
        inner = [path for name in self.folders.get(folder, []) for path in self.below(posixpath.join(folder, name))]
        return sorted(self.images.get(folder, []) + inner)

    def holds_images(self, folder: str) -> bool:
        """Return True where images lie directly in the folder."""
        return folder in self.images

    def inwards(self, folder: str) -> Iterable[str]:
        """Yield the folder, then the only one in it, and so on, down to the one around a folder of images."""
        while True:
            yield folder
            inner = self.folders.get(folder, [])
            if len(inner) != 1 or self.holds_images(folder) or self.holds_images(posixpath.join(folder, inner[0])):
                return
            folder = posixpath.join(folder, inner[0])


def find_halves(tree: Tree, where: object) -> Halves:
    """Find the folders of the splits in archives `where`. Raises `UserError`."""
    base = ""
    for base in tree.inwards(""):
        splits = find_splits(tree.folders.get(base, []), f"{where}/{base}".rstrip("/"))
        if any(splits) and not _is_class(tree, base, splits):
            return _divided(tree, base, splits, where)
    return Halves(base, None, [])


def _divided(tree: Tree, base: str, splits: Splits, where: object) -> Halves:
    others = [name for name in tree.folders[base] if name not in splits]
    require(
        splits.train is not None and bool(splits.val or splits.test or not others),
        f"data.path: {where} has {splits.train or splits.val or splits.test}/ and not both train/ and val/ in {base or 'it'}; "
        "unzip it, and give the folder of the images",
    )
    notes = [f"left alone beside the splits: {', '.join(f'{name}/' for name in others[:5])}"] if others else []
    train = list(tree.inwards(posixpath.join(base, str(splits.train))))[-1]
    val = splits.val
    # Test images validate where no others do, if they have labels of the same classes.
    if splits.test and not val:
        test = list(tree.inwards(posixpath.join(base, splits.test)))[-1]
        val = splits.test if set(tree.folders.get(test, [])) & set(tree.folders.get(train, [])) else None
    if splits.test and val != splits.test:
        why = f"{val}/ is there" if val else f"it has none of the class folders of {splits.train}/"
        notes.append(f"{splits.test}/ is left alone, as {why}")
    return Halves(train, list(tree.inwards(posixpath.join(base, val)))[-1] if val else None, notes)


def _is_class(tree: Tree, base: str, splits: Splits) -> bool:
    """Return True where "train" is a class with pictures of trains."""
    if splits.train is None or splits.val or splits.test or not tree.holds_images(posixpath.join(base, splits.train)):
        return False
    return sum(tree.holds_images(posixpath.join(base, name)) for name in tree.folders[base]) > 2


def classes_in(tree: Tree, base: str, where: object) -> list[str]:
    """List the class folders in `base`. Raises `UserError` where they are no classes."""
    names = tree.folders.get(base, [])
    place = f"{where}/{base}".rstrip("/")
    require(len(names) > 0, f"data.path: {place} has no class folders; unzip it, and give a table of its labels")
    require(
        not are_parts(names) and not any(map(is_whole_set, names)),
        f"data.path: the folders of {place} ({', '.join(names[:3])}, …) are named like parts of one set, not like classes; "
        "unzip it, and give a table of labels",
    )
    for name in names:
        _, inner = _innermost(tree, posixpath.join(base, name))
        require(
            len(inner) < 2,
            f"data.path: {place}/{name} holds folders in place of images ({', '.join(inner[:3])}, …); unzip it, and give the "
            "folder whose folders are the classes",
        )
    return names


def _innermost(tree: Tree, folder: str) -> tuple[str, list[str]]:
    """Find the folders with images in a folder without images, or in the only folder that it holds, and so on."""
    while not tree.holds_images(folder) and len(inner := tree.folders.get(folder, [])) == 1:
        folder = posixpath.join(folder, inner[0])
    return folder, [] if tree.holds_images(folder) else tree.folders.get(folder, [])


def labelled(tree: Tree, base: str, classes: list[str], where: object) -> tuple[list[tuple[str, int]], list[str]]:
    """Pair the images of the class folders in `base` with their classes, in the order of class folders; and notes."""
    unknown = sorted(set(tree.folders.get(base, [])) - set(classes))
    require(
        not unknown,
        f"data.path: {where}/{base} has a class that training lacks: {', '.join(unknown[:3])} "
        f"({lacking(unknown[0], classes) if unknown else ''}); give one that has the same",
    )
    rows = [(path, label) for label, name in enumerate(classes) for path in tree.below(posixpath.join(base, name))]
    stray = tree.images.get(base, [])
    notes = [f"in no class folder, so left out: {counted(len(stray), 'image')}, as {stray[0]}"] if stray else []
    below = len(f"{base}/".lstrip("/"))
    return rows, notes + doubtful_places([path[below:] for path, _ in rows])
