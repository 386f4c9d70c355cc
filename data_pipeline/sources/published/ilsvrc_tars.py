"""ImageNet as it is published: ILSVRC2012_img_train.tar, a tar of a tar for each class, and ILSVRC2012_img_val.tar.

The images are read from their places in these files. The classes of the validation images are in the development kit,
ILSVRC2012_devkit_t12.tar.gz, or in its folder.
"""

import os
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_pipeline.common.errors import UserError, require
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig
from data_pipeline.sources.folder_walk import look_into
from data_pipeline.sources.held_out import divided
from data_pipeline.sources.listing import Listing, Taken, counted
from data_pipeline.sources.published.mat_file import read_structs
from data_pipeline.sources.published.tar_headers import Member, members

TRAIN, VAL, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_OTHERS = re.compile(r"ILSVRC2012_.*\.tar")
_THREADS = 8  # more than processors, for network storage
_LONGEST = 1 << 24  # bytes of a file of the kit


def ilsvrc_tars(root: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing | None:
    """List the samples of `split` where `root` holds ImageNet's tars; None where it does not. Raises `UserError`."""
    if root.is_file() or not {TRAIN, VAL} & set(names := look_into(root).files):
        return None
    try:
        if split == "val" and VAL in names:
            listing = _validation(root, classes or _class_names(root))
        else:
            require(
                TRAIN in names,
                f"data.path: {root} has {VAL} and no {TRAIN} beside it; add it, or give a folder with both",
            )
            listing = _training(root, classes)
    except OSError as error:
        raise UserError(
            f"data.path: cannot read {error.filename or root} ({error.strerror}); mend that first"
        ) from None
    if VAL not in names:
        return divided(listing, cfg, split)
    # The kit is asked for before the hours of a training, not after.
    kit = _kit(root)
    others = [name for name in names if _OTHERS.fullmatch(name) and name not in (TRAIN, VAL, kit.name)]
    notes = [f"left alone beside {TRAIN}: {', '.join(others[:3])}"] if others else []
    taken = Taken(listing.taken.layout, f"{VAL}, by the kit's ground truth", notes=[*listing.taken.notes, *notes])
    return Listing(**{**vars(listing), "taken": taken})


def _training(root: Path, classes: list[str] | None) -> Listing:
    file = root / TRAIN
    names = classes or _class_names(root)
    with open(file, "rb") as stream, ThreadPoolExecutor(_THREADS) as pool:
        tars = _class_tars(stream.fileno(), file)
        unknown = sorted({_stem(tar) for tar in tars} - set(names))
        require(not unknown, f"data.path: {file} has the class {unknown[:1]}, which training lacks; give the same tar")

        def images(tar: Member) -> list[Member]:
            where = f"{tar.name} in {file}"
            return list(members(stream.fileno(), where, tar.offset, tar.offset + tar.length))

        # By class, then name: the order of class folders.
        by_class: dict[str, list[Member]] = {}
        with progress("listing", len(tars), unit="classes") as advance:
            for tar, found in zip(tars, pool.map(images, tars), strict=True):
                by_class[_stem(tar)] = sorted(found)
                advance(1)
    rows = [(label, image) for label, name in enumerate(names) for image in by_class.get(name, [])]
    require(len(rows) > 0, f"data.path: {file} holds no images; copy it again, and compare its checksum")
    return Listing(
        root,
        [f"{TRAIN}/{names[label]}.tar/{image.name}" for label, image in rows],
        [label for label, _ in rows],
        names,
        [root, file],
        [TRAIN],
        _spans([image for _, image in rows]),
        Taken(f"ImageNet's tars: {TRAIN} of {counted(len(tars), 'class tar')}"),
    )


def _validation(root: Path, classes: list[str]) -> Listing:
    file, kit = root / VAL, _kit(root)
    labels = _truth(kit)
    with open(file, "rb") as stream:
        images = sorted(members(stream.fileno(), str(file), 0, os.fstat(stream.fileno()).st_size))
    require(
        len(images) == len(labels),
        f"data.path: {file} has {len(images):,} images, and {kit} classes of {len(labels):,}; get the kit of the same year",
    )
    rows = {name: row for row, name in enumerate(classes)}
    unknown = next((label for label in labels if label not in rows), "")
    require(not unknown, f"data.path: {kit} has the class {unknown}, which training lacks; give the whole {TRAIN}")
    numbers = [_number(image.name, len(labels), file) for image in images]
    return Listing(
        root,
        [f"{VAL}/{image.name}" for image in images],
        [rows[labels[number - 1]] for number in numbers],
        classes,
        [root, file, kit],
        [VAL],
        _spans(images),
        Taken(f"ImageNet's tars: {VAL}"),
    )


def _class_names(root: Path) -> list[str]:
    """List the classes of the training tar, its members' names. Raises `UserError` where there is none."""
    file = root / TRAIN
    require(file.is_file(), f"data.path: {root} has {VAL} and no {TRAIN} beside it; add it, or give a folder with both")
    with open(file, "rb") as stream:
        return sorted(_stem(tar) for tar in _class_tars(stream.fileno(), file))


def _class_tars(descriptor: int, file: Path) -> list[Member]:
    """List the tars in the training tar, one a class. Raises `UserError` for other members."""
    tars = list(members(descriptor, str(file), 0, os.fstat(descriptor).st_size))
    other = next((tar.name for tar in tars if not re.fullmatch(r"n\d{8}\.tar", tar.name)), "")
    require(
        len(tars) > 0 and not other,
        f"data.path: {file} is not ImageNet's, a tar of tars such as n01440764.tar{f', but holds {other!r}' * bool(other)}; "
        "copy it again, or rename it",
    )
    return tars


def _stem(tar: Member) -> str:
    return tar.name.removesuffix(".tar")


def _spans(images: list[Member]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.array([(0, image.offset, image.length) for image in images], np.int64)


def _number(name: str, count: int, file: Path) -> int:
    match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
    number = int(match[1]) if match else 0
    require(0 < number <= count, f"data.path: {file} holds {name!r}, which is no image of ImageNet's; copy it again")
    return number


# ---- the development kit --------------------------------------------------------------------------------------------


def _kit(root: Path) -> Path:
    """Find the kit's archive, or its folder. Raises `UserError` where there is none."""
    kit = next((root / name for name in (f"{KIT}.tar.gz", f"{KIT}.tar", KIT) if (root / name).exists()), None)
    if kit is None:
        raise UserError(
            f"data.path: {root} has {VAL} and no {KIT}.tar.gz, which holds the classes of its images; put the kit beside it, "
            f"or move {VAL} elsewhere to validate on a share of {TRAIN}"
        )
    return kit


def _truth(kit: Path) -> list[str]:
    """Read the class of each validation image, in their order. Raises `UserError`."""
    try:
        files = _files_of(kit)
        ids = {record["ILSVRC2012_ID"]: str(record["WNID"]) for record in read_structs(files[_META], "synsets")}
        return [ids[int(line)] for line in files[_TRUTH].decode().split()]
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, KeyError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"data.path: the development kit {kit} cannot be read ({why}); get it again") from None


def _files_of(kit: Path) -> dict[str, bytes]:
    if kit.is_dir():
        return {name: (kit / "data" / name).read_bytes() for name in (_META, _TRUTH)}
    with tarfile.open(kit) as tar:
        wanted = [member for member in tar if member.isreg() and os.path.basename(member.name) in (_META, _TRUTH)]
        files = {os.path.basename(member.name): tar.extractfile(member) for member in wanted if member.size < _LONGEST}
        return {name: file.read() for name, file in files.items() if file}
