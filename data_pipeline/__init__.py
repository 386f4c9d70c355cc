"""Batches of images that follow from (seed, epoch, position) alone; usable without the trainer.

>>> from data_pipeline import Cursor, DataConfig, Loader
>>> loader = Loader(DataConfig("/data/imagenette", batch=64, size_px=128), seed=1, epochs=2)
>>> for epoch in range(2):
...     loader.seek(Cursor(epoch))
...     for batch in loader:
...         train(batch.images, batch.labels)  # [64, 3, 128, 128] uint8, channels last; [64] int64

The names below are imported when they are first used, so that `import data_pipeline` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.batch import IGNORE_LABEL, Batch
    from data_pipeline.common.errors import UserError
    from data_pipeline.config import AugmentConfig, DataConfig
    from data_pipeline.cursor import Cursor
    from data_pipeline.loader import Loader
    from data_pipeline.sharding import RankInfo
    from data_pipeline.sources.catalog import Catalog, open_catalog

_HOMES = {
    "AugmentConfig": "config",
    "Batch": "batch",
    "Catalog": "sources.catalog",
    "Cursor": "cursor",
    "DataConfig": "config",
    "IGNORE_LABEL": "batch",
    "Loader": "loader",
    "RankInfo": "sharding",
    "UserError": "common.errors",
    "open_catalog": "sources.catalog",
}

__all__ = [
    "IGNORE_LABEL",
    "AugmentConfig",
    "Batch",
    "Catalog",
    "Cursor",
    "DataConfig",
    "Loader",
    "RankInfo",
    "UserError",
    "open_catalog",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"data_pipeline.{_HOMES[name]}"), name)
