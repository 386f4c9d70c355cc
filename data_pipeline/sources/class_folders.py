"""Class folders: ROOT/{train,val}/CLASS/**/IMAGE, or ROOT/CLASS/**/IMAGE divided by a hash."""

import os
from pathlib import Path

from data_pipeline.config import require
from data_pipeline.sources.listing import KINDS, Listing, is_image


def class_folders(base: Path, classes: list[str]) -> Listing:
    for name in folder_names(base):
        require(
            name in classes, f"data.path: {base / name} is a class that training lacks; remove it or add it to train/"
        )
    watched, found = [base], []
    for label, name in enumerate(classes):
        inside, folders = images_below(base / name, base)
        watched += folders
        found += [(path, label) for path in inside]
    require(len(found) > 0, f"data.path: no images in {base}; put {KINDS} files into its class folders")
    return Listing(base, [path for path, _ in found], [label for _, label in found], classes, watched)


def images_below(top: Path, base: Path) -> tuple[list[str], list[Path]]:
    """The images anywhere below `top`, as sorted paths below `base`, and the folders that were looked into."""
    found, watched = [], []
    for folder, folders, files in os.walk(top, followlinks=True):
        watched.append(Path(folder))
        # A folder named like an image is listed too, and so told to be bad: it was hardly meant.
        images = [entry for entry in (*files, *folders) if is_image(entry)]
        found += [os.path.relpath(os.path.join(folder, entry), base) for entry in images]
    return sorted(found), watched


def folder_names(base: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith("."))
    require(len(names) > 0, f"data.path: {base} has no class folders; put the images of each class into {base}/CLASS/")
    return names
