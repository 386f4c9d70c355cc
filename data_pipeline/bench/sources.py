"""The contestants of `bench --sources`: our loader on the same images in each of the places that it reads, and others' there."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from data_pipeline.bench.object_store import PACK, REMOTE, SHARD
from data_pipeline.bench.peers import CONTESTANTS, SPDL, Contestant, Delivery, Task, ours
from data_pipeline.bench.source_writers import write_imagenet_tars, write_parquet, write_zip
from data_pipeline.bench.streaming_peers import contestants, write_for_litdata, write_for_mosaicml
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sources.catalog import open_catalog


class _Source(NamedTuple):
    path: str
    """Place below the folder of the sample: the value of data.path."""
    write: Callable[[Path, Path], object] | None = None
    """Function that writes the class folders (first argument) there (second one); None where they are there already."""


_MIXED = PackConfig(shard_size=f"{SHARD // 10**6}MB", shuffle=True)
_SOURCES = {
    "class folders": _Source("folders"),
    "pack": _Source(PACK, lambda folders, into: pack(DataConfig(str(folders)), into, _MIXED)),
    "tar shards": _Source("as shards", lambda folders, into: _link_shards(folders, into)),
    "ImageNet's tars": _Source("as imagenet", write_imagenet_tars),
    "zip, stored": _Source("stored.zip", lambda folders, into: write_zip(folders, into, deflated=False)),
    "zip, deflated": _Source("deflated.zip", lambda folders, into: write_zip(folders, into, deflated=True)),
    "Parquet": _Source("as parquet", lambda folders, into: _parquet(folders, into, "none")),
    "Parquet, snappy": _Source("as snappy", lambda folders, into: _parquet(folders, into, "snappy")),
}


def write_sources(folder: Path) -> None:
    """Write the class folders in `folder` in the other layouts, beside them. Raises `UserError`."""
    with progress("writing", len(_SOURCES), unit="layouts") as advance:
        for source in _SOURCES.values():
            if source.write:
                source.write(folder / "folders", folder / source.path)
            advance(1)
    images = open_catalog(DataConfig(str(folder / PACK)), "train")
    for package, write in (("streaming", write_for_mosaicml), ("litdata", write_for_litdata)):
        if find_spec(package):
            write(images, folder)


def _reading(path: str) -> Callable[[Task], Delivery]:
    return lambda task: ours(task, task.folder / path)


def _on_folders(contestant: Contestant) -> Contestant:
    return contestant._replace(deliver=lambda task: contestant.deliver(task._replace(folder=task.folder / "folders")))


SOURCES = {name: Contestant(_reading(source.path)) for name, source in _SOURCES.items()}
SOURCES |= {f"{SPDL}, class folders": _on_folders(CONTESTANTS[SPDL])}
SOURCES |= {
    f"{server.name}: {name}": contestant
    for server, on_it in REMOTE.items()
    for name, contestant in (on_it | dict(contestants(server))).items()
}
"""Name -> contestant. The first reads class folders; the CPU time of the others is compared with its."""


def _parquet(folders: Path, into: Path, compression: str) -> Path:
    return write_parquet(folders, into, compression=compression, splits=("train",))


def _link_shards(folders: Path, into: Path) -> None:
    into.mkdir()
    for shard in folders.glob("*.tar"):
        (into / shard.name).symlink_to(shard)
