"""Tar shards: ROOT/{train,val}/*.tar in WebDataset layout, KEY.jpg beside KEY.cls."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.common.atomic_io import stays_below
from data_pipeline.common.errors import UserError
from data_pipeline.config import require
from data_pipeline.sources.listing import Listing, is_image


def tar_shards(base: Path, classes: list[str]) -> Listing:
    shards = sorted(file.name for file in base.glob("*.tar"))
    numbers = {name: number for number, name in enumerate(classes)}
    paths, labels, spans = [], [], []
    for number, shard in enumerate(shards):
        for member, offset, length, label in _samples(base / shard):
            require(label in numbers, f"data.path: {base / shard} has class {label}, which training lacks; remove it")
            paths.append(f"{shard}/{member}")
            labels.append(numbers[label])
            spans.append((number, offset, length))
    require(len(paths) > 0, f"data.path: no images in the shards of {base}; they need KEY.jpg beside KEY.cls members")
    watched = [base, *(base / shard for shard in shards)]
    return Listing(base, paths, labels, classes, watched, shards, np.array(spans, np.int64))


def shard_classes(base: Path) -> list[str]:
    """All labels in the shards of `base`: numbers in their order, or names."""
    found = {label for shard in sorted(base.glob("*.tar")) for _, _, _, label in _samples(shard)}
    numeric = all(label.isdecimal() for label in found)
    return sorted(found, key=int) if numeric else sorted(found)


def _samples(shard: Path) -> Iterator[tuple[str, int, int, str]]:
    """Name, offset, length and label of each image. The members of one sample stand together, in any order."""
    try:
        with open(shard, "rb") as file:
            file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
            require(not any(file.read()), f"data.path: the shard {shard} is cut off; copy it again or remove it")
        with tarfile.open(shard, "r:") as tar:
            group, image, label = "", None, None
            for member in tar:
                key = member.name.split(".")[0] if "/" not in member.name else _key(member.name)
                if key != group:
                    group, image, label = key, None, None
                require(
                    stays_below(member.name) and (member.isreg() or member.isdir()),
                    f"data.path: the shard {shard} has a member {member.name!r} that leads elsewhere; remove it",
                )
                if is_image(member.name):
                    image = member
                elif member.name.endswith(".cls"):
                    extracted = tar.extractfile(member)
                    label = extracted.read().decode().strip() if extracted else None
                if image is not None and label is not None:
                    yield image.name, image.offset_data, image.size, label
                    image, label = None, None
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.path: the shard {shard} cannot be read ({error}); copy it again or remove it") from None


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.split('.')[0]}"
