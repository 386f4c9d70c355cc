"""The layout of class folders: BASE/CLASS/**/IMAGE."""

import os
import re
from pathlib import Path

from data_pipeline.common.class_names import lacking
from data_pipeline.common.errors import require
from data_pipeline.sources.folder_walk import Entries, holds, holds_below, leads_back, look_into, walk
from data_pipeline.sources.listing import KINDS, Listing, Taken, counted, hidden_note, is_image

_OF_ONE_IMAGE = {
    *("image", "images", "img", "imgs", "mask", "masks", "label", "labels", "annotation", "annotations", "depth", "gt"),
}
_WHOLE_SET = re.compile("(jpe?g|png|raw|rgb)?(images|imgs)|annotations|imagesets")
"""Names, in small letters alone, of folders that hold all images of a set, or what belongs to them."""
_MASK = re.compile(r"[ _.-]+(mask|seg|segmentation|gt|groundtruth|annotation|label)s?([ _-]?\d+)?$", re.IGNORECASE)
_DEEPEST = 8  # folders that hold nothing but another
_PART = re.compile(r"(image|img|photo|part|batch|fold|folder|chunk|shard)s?$")


def class_folders(base: Path, classes: list[str]) -> Listing:
    """List the images of BASE's class folders. Raises `UserError` for a folder that is not in `classes`."""
    entries, back = _entries(base)
    # A class unknown to training could not be scored; folders without images do no harm.
    unknown = sorted(set(entries.folders) - set(classes))
    _refuse_parts(base, unknown)
    for name in unknown:
        require(
            not holds_below(base / name, is_image),
            f"data.path: {base / name} is a class that training lacks ({lacking(name, classes)}); remove it or add it "
            "to train/, or rename it",
        )
    there = [name for name in classes if name in set(entries.folders)]
    found = walk(base, [base / name for name in there])
    numbers = {name: number for number, name in enumerate(classes)}
    rows = [(path, numbers[name]) for name, paths in zip(there, found.images, strict=True) for path in paths]
    # Nothing is left out in silence.
    stray = [name for name in entries.files if is_image(name)]
    found.repeated += back
    notes = found.notes() + found.left_out.others()
    notes += doubtful_places([path for path, _ in rows])
    notes += hidden_note(_hidden(base))
    if stray:
        notes.append(f"in no class folder of {base}, so left out: {counted(len(stray), 'image')}, as {stray[0]}")
    also = f" ({'; '.join(notes)})" if notes else ""
    require(len(rows) > 0, f"data.path: no images in {base}{also}; put {KINDS} files into its class folders")
    return Listing(
        base,
        [path for path, _ in rows],
        [label for _, label in rows],
        classes,
        [base, *found.folders],
        taken=Taken("class folders", notes=notes),
    )


def class_names(base: Path, *, nested: bool = False, beside: list[str] | None = None) -> list[str]:
    """List the class folders of BASE. Raises `UserError` where they are no classes.

    Folders in them are refused, as they may be the classes, unless `nested`. `beside` are files that may have labels, to be named
    where the folders have none.
    """
    entries, _ = _entries(base)
    # Refuse what is no dataset of class folders, with a hint of what it may be.
    require(
        len(entries.folders) > 0,
        f"data.path: {base} has no class folders; put the images of each class into {base}/CLASS/, or give a CSV table of image "
        f"names and labels{_written_from(beside)}",
    )
    _refuse_parts(base, entries.folders, beside)
    for link in (base / name for name in entries.files if not is_image(name)):
        require(
            link.exists() or not link.is_symlink(),
            f"data.path: {link} is a link that leads nowhere; mend it or remove it",
        )
    # Classes may lie one folder deeper, as in SPECIES/BREED/: the user must choose a level.
    for folder in (base / name for name in entries.folders if not nested):
        folder, parts = _parts_of(folder)
        require(
            len(parts) < 2,
            f"data.path: {folder} holds folders in place of images ({', '.join(parts[:3])}{', …' * (len(parts) > 3)}); if "
            f"these are the classes, give {folder}; if they are patients or the like, data.group 2 keeps each whole; else put "
            f"their images into {folder} itself",
        )
    return entries.folders


def _entries(base: Path) -> tuple[Entries, list[str]]:
    """List the entries of BASE without links that lead back to it or above, and these."""
    entries = look_into(base)
    back = [name for name in entries.links if leads_back(base / name)]
    return entries._replace(folders=[name for name in entries.folders if name not in back]), back


def _parts_of(folder: Path) -> tuple[Path, list[str]]:
    """Find the folders with images in a folder without images, or in the only folder that it holds, and so on."""
    for _ in range(_DEEPEST):
        parts = [] if holds(folder, is_image) else look_into(folder).folders
        parts = [part for part in parts if holds_below(folder / part, is_image)]
        if len(parts) != 1:
            break
        folder = folder / parts[0]
    return folder, parts


def _hidden(base: Path) -> list[str]:
    """List the hidden folders of BASE with images in them."""
    with os.scandir(base) as entries:
        names = sorted(entry.name for entry in entries if entry.name.startswith(".") and entry.is_dir())
    return [name for name in names if holds(base / name, is_image)]


def doubtful_places(paths: list[str]) -> list[str]:
    """Say in a line each which images, by paths below their class folders, may be of another class or none at all."""
    notes, there = [], {os.path.splitext(path)[0] for path in paths}
    inner = [path for path in paths if path.count("/") > 1]
    if inner:
        notes.append(
            f"in folders inside class folders, and of their classes: {counted(len(inner), 'image')}, as {inner[0]}"
        )
    stems = ((path, os.path.splitext(path)[0]) for path in paths)
    masks = [path for path, stem in stems if (its := _MASK.search(stem)) and stem[: its.start()] in there]
    if masks:
        notes.append(
            f"named like masks of other images, and taken for images: {counted(len(masks), 'file')}, as {masks[0]}; move "
            "them away unless they are"
        )
    return notes


def are_parts(names: list[str]) -> bool:
    """Return True where names are those of images and their masks, or differ only in a number behind a word, as "images_part"."""
    if len(names) > 1 and {name.lower() for name in names} <= _OF_ONE_IMAGE:
        return True
    words = {re.sub(r"[\W_]*\d+[\W_]*$", "", name.lower()) for name in names}
    return len(names) > 1 and len(words) == 1 and bool(_PART.search(words.pop()))


def is_whole_set(name: str) -> bool:
    """Return True for the name of a folder of all images, as "JPEGImages" beside "SegmentationClass"."""
    return bool(_WHOLE_SET.fullmatch(re.sub(r"[\W\d_]", "", name.lower())))


def _written_from(beside: list[str] | None) -> str:
    return f" ({', '.join(beside[:3])} may have them)" if beside else ""


def _refuse_parts(base: Path, names: list[str], beside: list[str] | None = None) -> None:
    whole = (name for name in names if is_whole_set(name) and holds_below(base / name, is_image))
    require(
        not are_parts(names) and not any(whole),
        f"data.path: the folders of {base} ({', '.join(names[:3])}{', …' * (len(names) > 3)}) are named like parts of one set, "
        f"not like classes; give a CSV table of labels as data.path{_written_from(beside)}, and this folder as data.images, or "
        "the folder whose folders are the classes",
    )
