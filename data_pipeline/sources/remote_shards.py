"""List tar shards in an object store, as `layouts` lists those of a folder: in train/ and val/, or divided by their names."""

from dataclasses import replace
from typing import NamedTuple

from data_pipeline.common.address import Address
from data_pipeline.common.errors import UserError, require
from data_pipeline.config import DataConfig
from data_pipeline.sources.held_out import divided
from data_pipeline.sources.listing import Listing, is_image
from data_pipeline.sources.splits import find_splits
from data_pipeline.sources.storage.objects import open_objects
from data_pipeline.sources.storage.store import list_below, stat
from data_pipeline.sources.webdataset import divided_by_name, is_shard, tar_shards

_ON_DISK = (".zip", ".parquet", ".arrow", ".csv")
"""Ends of the names of data sets and tables that are read on this machine's disk alone."""


def unfinished(pack: Address) -> Address:
    """Name the object that is there as long as a pack is being written, with the plan of it."""
    return pack.with_name(f"{pack.name}.partial") / "plan.json"


class RemoteShards(NamedTuple):
    """Shards of one split, before any is opened."""

    base: Address
    """Folder of the split."""
    names: list[str]
    """Paths of the shards below `base`."""
    versions: list[tuple[int, str]]
    """Size and ETag of each."""
    layout: str
    """Words behind the number of shards, such as " in train/"; may be empty."""
    val_from: str
    """Source of the validation images; empty where they are a share of the others."""
    notes: list[str]


def find_shards(root: Address, split: str) -> RemoteShards:
    """Find the shards of `split` ("train" or "val") below an address. Raises `UserError` where there are none."""
    require(
        root.can_list,
        f"data.path: {root} has no manifest.json, so it is no pack, and a web server does not list its files; give a pack's "
        "address, or shards at an s3:// or gs:// address",
    )
    there = dict(list_below(root))
    stats = {name: version for name, version in there.items() if is_shard(name)}
    refuse_others(root, list(there))
    require(
        len(stats) > 0,
        f"data.path: {root} holds neither a pack nor .tar shards; pack the images: python -m data_pipeline.pack SRC {root}",
    )
    require(
        not root.key or stat(unfinished(root)) is None,
        f"data.path: {root} is a pack that is not finished; let python -m data_pipeline.pack go on with it",
    )
    # The splits are folders, or words in the shards' names.
    splits = find_splits({name.partition("/")[0] for name in stats if "/" in name}, root)
    val = splits.val or splits.test
    if splits.train:
        folder = splits.train if split == "train" or not val else val
        names = [name.removeprefix(f"{folder}/") for name in stats if name.startswith(f"{folder}/")]
        base, layout, val_from, notes = root / folder, f" in {folder}/", f"{val}/" if val else "", list[str]()
    else:
        parts = divided_by_name(list(stats), root)
        names = parts.val if split == "val" and parts.val else parts.train
        base, layout, val_from, notes = root, "", parts.val_from, parts.notes
    versions = [stats[str(base / name).removeprefix(f"{root}/")] for name in names]
    return RemoteShards(base, names, [(version.size, version.etag) for version in versions], layout, val_from, notes)


def refuse_others(root: Address, names: list[str]) -> None:
    """Raise `UserError` for what is read on a disk alone: a single object, data sets as published, tables, bare images."""
    if not names and root.key and stat(root):
        require(
            not is_shard(root.name),
            f"data.path: {root} is one tar; give the address of the folder that it lies in, {root.parent}",
        )
        names, root = [root.name], root.parent
    imagenet = [name for name in names if name.rpartition("/")[2].startswith("ILSVRC2012_")]
    others = [name for name in names if name.lower().endswith(_ON_DISK) or is_image(name)]
    found = imagenet if imagenet or any(map(is_shard, names)) else others
    if found:
        more = " and others" * (len(found) > 1)
        raise UserError(
            f"data.path: {root / found[0]}{more} cannot be read from a distance, where only packs and tar shards are; copy the "
            "data set to this machine and train there, or pack the copy once: python -m data_pipeline.pack COPY "
            f"{root.scheme}://BUCKET/PACK"
        )


def remote_shards(found: RemoteShards, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing:
    """List the samples of these shards; they are read once, through the cache. Raises `UserError`."""
    require(
        cfg.cache_gb > 0,
        f"data.cache_gb: the tar shards in {found.base} are listed through the cache; give it room for one at least",
    )
    objects = open_objects(found.base, found.names, cfg.cache_gb)
    listing = tar_shards(found.base, found.names, classes, objects)
    taken = listing.taken
    taken = replace(
        taken, layout=taken.layout + found.layout, val_from=found.val_from, notes=[*found.notes, *taken.notes]
    )
    listing = replace(listing, watched=[], taken=taken)
    return divided(listing, cfg, split)
