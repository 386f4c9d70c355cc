"""Tables that lie beside class folders: a table that gives the same images other classes must not be passed over."""

from pathlib import Path

from data_pipeline.common.errors import UserError, require
from data_pipeline.config import DataConfig
from data_pipeline.sources.listing import Listing, is_image
from data_pipeline.sources.tables.class_columns import class_column
from data_pipeline.sources.tables.text_table import TextTable, read_table, without_index

_LARGEST = 1 << 26  # bytes of a table that is looked into


def check_agreement(file: Path, folders: Listing) -> None:
    """Raise `UserError` where a table beside class folders names their images, and has other classes for these."""
    try:
        table = without_index(read_table(file, "data.path", is_image)) if file.stat().st_size <= _LARGEST else None
        images = _images(table, folders) if table else {}
        pairs = _pairs(table, images, file) if table and images else []
    except (UserError, OSError):  # a table about something else
        return
    require(
        not pairs or _agree(pairs),
        f"data.path: {file} gives the images in the folders of {folders.root} classes that are not those folders; give the "
        "table as data.path, or move it elsewhere",
    )


def _images(table: TextTable, folders: Listing) -> dict[str, list[set[str]]]:
    """Map each column that mostly names images to the class folders that each row can mean."""
    classes: dict[str, set[str]] = {}
    for path, label in zip(folders.paths, folders.labels, strict=True):
        for key in _keys(path):
            classes.setdefault(key, set()).add(folders.classes[label])
    found = {
        column: [next((classes[key] for key in _keys(cell) if key in classes), set()) for cell in cells]
        for column, cells in table.columns.items()
    }
    return {column: names for column, names in found.items() if 2 * sum(map(bool, names)) > len(names)}


def _pairs(table: TextTable, images: dict[str, list[set[str]]], file: Path) -> list[tuple[str, str]]:
    """Pair folder and class of each image in the table; empty where it has no classes."""
    rest = table.without(list(images))
    found = class_column(rest, file, DataConfig()) if rest.columns else None
    classes = [names[0] for names in found.rows] if found and not found.written else []
    rows = zip(next(iter(images.values())), classes, strict=False)
    return [(name if name in folders else "/".join(sorted(folders)), name) for folders, name in rows if folders]


def _agree(pairs: list[tuple[str, str]]) -> bool:
    """Return True where the classes are those of the folders, perhaps by other names, or finer ones."""
    if all(folder in name for folder, name in pairs):
        return True
    folders, classes = ({*ones} for ones in zip(*pairs, strict=True))
    finer = len({*pairs}) == len(classes) <= len(pairs) // 2
    return finer and (len(folders) > 1 or len(classes) == 1)


def _keys(path: str) -> list[str]:
    """List the names by which an image is found: folder and name, and name alone, without case and suffix."""
    *above, name = path.replace("\\", "/").lower().split("/")
    stem = name.rsplit(".", 1)[0] if is_image(name) else name
    return [f"{folder}/{stem}" for folder in above[-1:]] + [stem]
