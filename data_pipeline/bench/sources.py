"""The contestants of `bench --sources`: our loader alone, on the same images in each of the places that it reads."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_pipeline.bench.object_store import PACK, REMOTE
from data_pipeline.bench.peers import Contestant, Delivery, Task, ours
from data_pipeline.bench.source_writers import write_imagenet_tars, write_parquet, write_zip
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig
from data_pipeline.pack.cli import PackConfig, pack


class _Source(NamedTuple):
    path: str
    """Place below the folder of the sample: the value of data.path."""
    write: Callable[[Path, Path], object] | None = None
    """Function that writes the class folders (first argument) there (second one); None where they are there already."""


_SOURCES = {
    "class folders": _Source("folders"),
    "pack": _Source(PACK, lambda folders, into: pack(DataConfig(str(folders)), into, PackConfig())),
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


def _reading(path: str) -> Callable[[Task], Delivery]:
    return lambda task: ours(task, task.folder / path)


SOURCES = {name: Contestant(_reading(source.path)) for name, source in _SOURCES.items()} | REMOTE
"""Name -> contestant. The first reads class folders; the CPU time of the others is compared with its."""


def _parquet(folders: Path, into: Path, compression: str) -> Path:
    return write_parquet(folders, into, compression=compression, splits=("train",))


def _link_shards(folders: Path, into: Path) -> None:
    into.mkdir()
    for shard in folders.glob("*.tar"):
        (into / shard.name).symlink_to(shard)
