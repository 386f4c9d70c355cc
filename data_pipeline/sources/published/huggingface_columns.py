"""Find the columns of images and classes in tables that hold their images, by the types and metadata of their files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError, require
from data_pipeline.config import DataConfig
from data_pipeline.sources.image_headers import kind_of
from data_pipeline.sources.published.arrow_images import arrow_schema
from data_pipeline.sources.published.parquet_images import Column, parquet_schema
from data_pipeline.sources.tables.text_table import few

_NAMED_IMAGE = ("image", "img", "jpg", "jpeg", "png")
_NAMED_LABEL = ("label", "labels", "class", "target")


class Table(NamedTuple):
    """Schema of all files, as far as it matters."""

    columns: Column
    names: list[str] | None
    """Classes by their numbers; None where the labels themselves are the classes."""


def image_columns(schema: Any) -> dict[str, bool]:
    """List the columns that hold images, and whether each is a structure of bytes and path."""
    features, found = _features(schema), {}
    for field in schema:
        if _is_binary(field.type):
            if _type_of(features.get(field.name)) == "Image" or field.name.lower() in _NAMED_IMAGE:
                found[field.name] = False
        elif str(field.type).startswith("struct<"):
            inner = {part.name: part.type for part in field.type}
            if {"bytes", "path"} <= inner.keys() and _is_binary(inner["bytes"]):
                found[field.name] = True
    return found


def _is_binary(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary")


def _type_of(feature: Any) -> str | None:
    return feature.get("_type") if isinstance(feature, dict) else None


def _features(schema: Any) -> dict[str, Any]:
    """Read what `datasets` says of each column in a file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def table_of(folder: Path, names: list[str], cfg: DataConfig) -> Table:
    """Find the columns of the images and the classes, the same in all files. Raises `UserError`."""
    found = [guarded(folder / name, schema_of) for name in names]
    tables = [_columns(schema, folder / name, cfg) for schema, name in zip(found, names, strict=True)]
    other = next((name for name, table in zip(names, tables, strict=True) if table != tables[0]), None)
    require(
        other is None,
        f"data.path: {folder} holds several data sets, as {names[0]} and {other} have other columns or classes; give one of "
        "their folders, or one file",
    )
    return tables[0]


def _columns(schema: Any, file: Path, cfg: DataConfig) -> Table:
    images, features = image_columns(schema), _features(schema)
    image = cfg.image_column or _only([name for name in images if name.lower() in _NAMED_IMAGE] or list(images))
    require(
        image in images,
        f"data.image_column: {file} has {few(list(images)) or 'no column'} with images; name the one to use by it",
    )
    numbered = [name for name, said in features.items() if _type_of(said) == "ClassLabel"]
    plain = [name for name in schema.names if name.lower() in _NAMED_LABEL]
    label = cfg.label_column or _only([name for name in numbered if name in plain] or numbered or plain)
    require(
        label in schema.names,
        f"data.label_column: {file} has the columns {few(schema.names, 20)}; name the one with the classes by it",
    )
    kind = str(schema.field(label).type)
    require(
        kind.startswith(("int", "uint", "string", "large_string", "bool", "dictionary")),
        f"data.label_column: {label} of {file} is of the type {kind}, where one class for an image is read; name another column, "
        "or write a table of the classes",
    )
    group = "" if cfg.group is None else cfg.group
    require(
        not group or group in schema.names,
        f"data.group: {file} has the columns {few(schema.names, 20)}, and images in a table lie in no folders; name the one "
        "with the groups",
    )
    names = features[str(label)].get("names") if label in numbered else None
    return Table(Column(str(image), images[str(image)], str(label), group), _distinct(names) if names else None)


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _distinct(names: list[str]) -> list[str]:
    """Add their numbers to names that several classes have, as ImageNet's two of "crane"."""
    return [f"{name} ({row})" if names.count(name) > 1 else name for row, name in enumerate(names)]


def schema_of(file: Path) -> Any:
    return arrow_schema(file) if file.suffix.lower() == ".arrow" else parquet_schema(file)


def guarded(file: Path, read: Callable[[Path], Any]) -> Any:
    """Return `read(file)`. Raises `UserError` where that fails."""
    from pyarrow import ArrowException  # type: ignore[import-untyped]

    try:
        return read(file)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ArrowException) as error:
        why = kind_of(file) or getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"data.path: {file} cannot be read ({why}); download it again") from None
