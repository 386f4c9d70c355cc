"""Manifests: a CSV or Parquet table of image names and labels, as Kaggle publishes them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig, require
from data_pipeline.sources.image_headers import SUFFIXES
from data_pipeline.sources.listing import Listing, is_image, share

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".tsv", ".parquet")

_IMAGE_COLUMNS = ("image", "image_id", "id", "filename", "file", "path", "image_path")
_LABEL_COLUMNS = ("label", "class", "target", "category")


def table_names(file: Path, cfg: DataConfig) -> list[str]:
    """The images that a table names, as it writes them. Raises `UserError`."""
    table, images = _read_table(file, cfg)
    return table[images].astype(str).tolist()


def manifest(file: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing:
    table, images = _read_table(file, cfg)
    labels = _column(table, cfg.label_column, _LABEL_COLUMNS, 1, "data.label_column", file)
    require(not table[labels].isna().any(), f"data.path: {file} has rows without a {labels}; fill or remove them")
    if classes is None:
        classes = [str(name) for name in sorted(table[labels].unique())]
    parts = cfg.split_column or ("split" if "split" in table else None)
    if parts is not None:
        require(parts in table, f"data.split_column: {file} has no column {parts}; it has {', '.join(map(str, table))}")
        table = table[table[parts] == split]
        require(len(table) > 0, f"data.split_column: no row of {file} has {parts} = {split}; name both train and val")
    root = Path(cfg.images) if cfg.images else file.parent
    paths = completed(root, table[images].astype(str).tolist(), file)
    numbers = {name: number for number, name in enumerate(classes)}
    names = table[labels].astype(str)
    unknown = sorted(set(names) - set(numbers))
    require(
        not unknown, f"data.path: {file} has a class that training lacks: {', '.join(unknown[:3])}; remove its rows"
    )
    listing = Listing(root, paths, [numbers[name] for name in names], classes, [file])
    return listing if parts is not None else share(listing, cfg.val_share, split)


def _read_table(file: Path, cfg: DataConfig) -> tuple["pd.DataFrame", str]:
    """A table, and which of its columns has the images' names."""
    import pandas as pd  # here, for only tables need it

    def images(table: pd.DataFrame) -> str:
        return _column(table, cfg.image_column, _IMAGE_COLUMNS, 0, "data.image_column", file)

    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
            return table, images(table)
        sep = "\t" if file.suffix == ".tsv" else ","
        column = images(pd.read_csv(file, sep=sep, nrows=0))
        return pd.read_csv(file, sep=sep, dtype={column: str}), column  # 0012 is a name, and no number
    except ImportError:
        raise UserError(f"data.path: reading {file} needs pyarrow; pip install pyarrow, or give a CSV file") from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"data.path: {file} is no table that can be read ({error}); give a CSV or Parquet file"
        ) from None


def _column(table: "pd.DataFrame", wanted: str | None, usual: tuple[str, ...], at: int, option: str, file: Path) -> str:
    """The named column, else one of a usual name, else the one at `at`."""
    if wanted is not None:
        require(wanted in table, f"{option}: {file} has no column {wanted}; it has {', '.join(map(str, table))}")
        return wanted
    found = [name for name in table if str(name).lower() in usual]
    require(bool(found) or table.shape[1] > at, f"{option}: {file} has {table.shape[1]} columns; name the one to use")
    return str(found[0] if found else table.columns[at])


def completed(root: Path, names: list[str], file: Path) -> list[str]:
    """Names with the suffix that their files have, which tables often leave out. Files that are missing are told together."""
    there = {os.path.relpath(os.path.join(folder, name), root) for folder, _, found in os.walk(root) for name in found}
    paths, missing = [], []
    for name in names:
        candidates = [name, *(name + suffix for suffix in sorted(SUFFIXES))]
        path = next((c for c in map(os.path.normpath, candidates) if c in there and is_image(c)), None)
        paths.append(path or name)
        if path is None:
            missing.append(name)
    require(
        not missing,
        f"data.images: {len(missing)} of the {len(names)} images that {file} names are not in {root}: "
        f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}; name their folder by data.images",
    )
    return paths
