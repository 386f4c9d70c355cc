"""ImageNet as Kaggle's competition "imagenet-object-localization-challenge" has it: class folders to train on, and flat
validation images whose classes are in LOC_val_solution.csv."""

import os
from pathlib import Path

from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.sources.class_folders import class_folders, class_names
from data_pipeline.sources.folder_walk import holds, look_into
from data_pipeline.sources.listing import Listing, Taken, is_image
from data_pipeline.sources.tables.text_table import TextTable, few, read_table

SOLUTION, INSIDE = "LOC_val_solution.csv", "ILSVRC/Data/CLS-LOC"
_ABOVE = 3  # folders of INSIDE, one of which may be given as data.path


def kaggle_imagenet(root: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing | None:
    """List the samples of `split` where `root` is this layout, or a folder of it; None where not. Raises `UserError`."""
    top = _top(root)
    if top is None:
        return None
    base = top / INSIDE
    val_from = f"{INSIDE}/val/ by {SOLUTION}"
    if split == "train":
        listing = class_folders(base / "train", classes or class_names(base / "train"))
        taken = Taken(f"Kaggle's ImageNet, class folders in {INSIDE}/train/", val_from, notes=listing.taken.notes)
        return Listing(**{**vars(listing), "taken": taken})
    return _validation(top, classes or class_names(base / "train"), val_from)


def _validation(top: Path, classes: list[str], val_from: str) -> Listing:
    folder, file = top / INSIDE / "val", top / SOLUTION
    labels, notes = solution(read_table(file, "data.path"), file, classes)
    there = [name for name in look_into(folder).files if is_image(name)]
    paths = [name for name in there if name.rpartition(".")[0] in labels]
    require(
        len(paths) == len(labels),
        f"data.path: {len(labels) - len(paths)} of the {len(labels):,} images that {file} names are not in {folder}; "
        "copy them again",
    )
    if len(there) > len(paths):
        notes.append(f"{len(there) - len(paths)} images of val/ are left out, as {SOLUTION} has no class for them")
    return Listing(
        folder,
        paths,
        [labels[name.rpartition(".")[0]] for name in paths],
        classes,
        [folder, file],
        taken=Taken("Kaggle's ImageNet", val_from, notes=notes),
    )


def solution(table: TextTable, file: Path, classes: list[str]) -> tuple[dict[str, int], list[str]]:
    """Read the number of each image's class, the first word of its boxes; and notes. Raises `UserError`."""
    require(
        {"ImageId", "PredictionString"} <= set(table.columns) and len(table) > 0,
        f"data.path: {file} has the columns {few(list(table.columns))}, where ImageId and PredictionString should be; "
        "download it again",
    )
    numbers = {name: number for number, name in enumerate(classes)}
    words = [cell.split() for cell in table.columns["PredictionString"]]
    # A box is a class and four numbers.
    firsts = [(boxes or [""])[0] for boxes in words]
    unknown = sorted(set(firsts) - set(numbers))
    require(not unknown, f"data.path: {file} has a class that training lacks: {few(unknown, 3)}; download both again")
    several = sum(len(set(boxes[::5])) > 1 for boxes in words)
    notes = [f"{several} rows of {SOLUTION} name several classes, of which the first is taken"] if several else []
    labels = {image: numbers[name] for image, name in zip(table.columns["ImageId"], firsts, strict=True)}
    return labels, notes


def _top(root: Path) -> Path | None:
    """Find the folder with ILSVRC/ that `root` is, lies in or has alone. Raises `UserError` where the solution is missing."""
    if root.is_file():
        return None
    inner = look_into(root).folders
    inside = [root / inner[0]] if len(inner) == 1 else []
    here = root.resolve()
    above = [top for top in here.parents[:_ABOVE] if (top / INSIDE).is_relative_to(here)]
    for top in (root, *inside, *above):
        train, val = (top / INSIDE / name for name in ("train", "val"))
        if os.path.isdir(train) and os.path.isdir(val) and holds(val, is_image):
            require(
                (top / SOLUTION).is_file(),
                f"data.path: {val} has its images in no class folders; put {SOLUTION}, which names their classes, into {top}",
            )
            return top
    return None
