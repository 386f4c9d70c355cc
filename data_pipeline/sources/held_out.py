"""Divide a set without validation images of its own: a share or a fold of each class, by hashes, with groups undivided."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.label_sets import strata
from data_pipeline.sources.listing import Listing, Taken

Unit = tuple[str, list[int]]
"""Name and rows of images that stay together: those of a group, or a single one."""


def divided(listing: Listing, cfg: DataConfig, split: str, groups: list[str] | None = None) -> Listing:
    """Take the part of a set that is for `split`; all of a listing whose set has validation images of its own.

    `groups` are the names of the images' groups where `cfg.group` is a column. Raises `UserError`.
    """
    if listing.taken.val_from:
        refuse_division(cfg, f"{listing.root} has validation images of its own ({listing.taken.val_from})")
        return listing
    groups = groups or _folders(listing, cfg)
    own = strata(np.array(listing.labels, np.int64), listing.label_sets, len(listing.classes)).tolist()
    names = [*listing.classes, ""]
    held = {
        row
        for label, units in _by_class(listing.paths, own, groups).items()
        for _, rows in _held(units, names[label], cfg)
        for row in rows
    }
    rows = [row for row in range(len(listing.paths)) if (row in held) == (split == "val")]
    option = f"data.fold: {cfg.fold}" if cfg.fold else f"data.val_share: {cfg.val_share}"
    other = "fewer folds" if cfg.fold else "another share"
    require(len(rows) > 0, f"{option} leaves no image in {listing.root} for {split}; give {other} or more images")
    return replace(
        listing,
        paths=[listing.paths[row] for row in rows],
        labels=[listing.labels[row] for row in rows],
        spans=listing.spans[rows] if len(listing.spans) else listing.spans,
        taken=replace(listing.taken, val_from=_how(cfg, groups, listing.taken), divided_from=len(listing.paths)),
    )


def refuse_division(cfg: DataConfig, why: str) -> None:
    """Raise `UserError` where options ask to divide what is divided already."""
    for option in ("fold", "group"):
        require(
            getattr(cfg, option) is None,
            f"data.{option}: {why}; leave it out, or give the training images alone as data.path",
        )


def _how(cfg: DataConfig, groups: list[str] | None, taken: Taken) -> str:
    share = f"fold {cfg.fold.replace('/', ' of ')}" if cfg.fold else f"{100 * cfg.val_share:g} %"
    by = f", {len({*groups}):,} groups by {_named(cfg)} undivided" if groups else ""
    rarest = " and an image of several counted to its rarest" if taken.written else ""
    return f"{share} of each class{rarest}, by a hash of the {'groups' if groups else 'names'}{by}"


def _named(cfg: DataConfig) -> str:
    return f"folder level {cfg.group}" if str(cfg.group).isdecimal() else str(cfg.group)


def _folders(listing: Listing, cfg: DataConfig) -> list[str] | None:
    """Read the group of each image from its path, where `cfg.group` is a level of folders."""
    if cfg.group is None:
        return None
    require(
        cfg.group.isdecimal() and int(cfg.group) > 0,
        f"data.group: {cfg.group} is a column, and the images are not named by a table; give the level of the folder that "
        f"is a group, 1 for those in {listing.root}, 2 for those in these",
    )
    level = int(cfg.group)
    shallow = next((path for path in listing.paths if path.count("/") < level), None)
    require(
        shallow is None,
        f"data.group: {shallow} lies in no folder of level {level} of {listing.root}; give another level, or move it",
    )
    groups = [path.split("/")[level - 1] for path in listing.paths]
    pairs = {*zip(groups, listing.labels, strict=True)}
    require(
        not len(pairs) == len({*groups}) == len({*listing.labels}),
        f"data.group: the folders of level {level} of {listing.root} are the classes; give the level of the groups in them",
    )
    return groups


def _by_class(paths: list[str], labels: list[int], groups: list[str] | None) -> dict[int, list[Unit]]:
    """List the units of each class in the order of their hashes; a group is of the class that most of its images have."""
    units: Iterable[Unit] = ((path, [row]) for row, path in enumerate(paths))
    if groups is not None:
        together: dict[str, list[int]] = {}
        for row, name in enumerate(groups):
            together.setdefault(name, []).append(row)
        units = together.items()
    classes: dict[int, list[Unit]] = {}
    for name, rows in units:
        counts = Counter(labels[row] for row in rows)
        label = labels[rows[0]] if len(rows) == 1 else min(counts, key=lambda label: (-counts[label], label))
        classes.setdefault(label, []).append((name, rows))
    return {label: sorted(members, key=lambda unit: (_hash(unit[0]), unit[0])) for label, members in classes.items()}


def _held(units: list[Unit], name: str, cfg: DataConfig) -> Iterator[Unit]:
    """Yield the units of the class `name` that are for validation.

    Of a share: those with the smallest hashes, `val_share` of the class's images, rounded, but at least one unit where it has
    two, and not all of them unless that is asked for. Of a fold: those in its piece of the row; the row begins with another
    fold in each class, so that small classes are spread. A new file moves few others, those at the pieces' ends.
    """
    total, before = sum(len(rows) for _, rows in units), 0
    if cfg.fold:
        number, folds = map(int, cfg.fold.split("/"))
        first = _hash(name)
        for unit, rows in units:
            if ((2 * before + len(rows)) * folds // (2 * total) + first) % folds == number - 1:
                yield unit, rows
            before += len(rows)
        return
    wanted = max(round(cfg.val_share * total), 1)
    for unit, rows in units[: len(units) - (cfg.val_share < 1)]:
        if before and 2 * before + len(rows) > 2 * wanted:
            return
        yield unit, rows
        before += len(rows)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
