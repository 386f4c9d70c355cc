"""Tables of image names and classes, CSV or Parquet, as Kaggle publishes them.

Columns and images are found with certainty or refused, and a run prints them at its start (`Taken`).
"""

from dataclasses import replace
from pathlib import Path

from data_pipeline.common.class_names import lacking
from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.label_sets import NO_SETS, as_sets
from data_pipeline.sources.held_out import divided
from data_pipeline.sources.listing import TABLE_OPTIONS, UNLABELLED, Listing, Taken, counted, is_image
from data_pipeline.sources.splits import role_of
from data_pipeline.sources.tables.class_columns import check_classes, class_column, in_order
from data_pipeline.sources.tables.columns import (
    Images,
    Split,
    image_column,
    require_named,
    split_by_folder,
    split_column,
)
from data_pipeline.sources.tables.text_table import TextTable, few, read_table, shown, without_index


def manifest(file: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing:
    """List the samples of `split` in a table; labels follow `classes`, or the classes of training. Raises `UserError`."""
    # Choose the rows of the split first: images and classes are then checked for these alone.
    whole, root = _read(file), _root(file, cfg)
    everything = whole
    require_named(whole, file, cfg)
    parts = split_column(whole, file, cfg)
    if not parts.column:
        parts = split_by_folder(image_column(whole, file, root, cfg, role_of(file.stem) or "train").located.paths)
    whole, parts = _used(whole, parts)
    role = parts.val_role if parts.val_names and split == "val" else "train"
    rows = [row for row, its in enumerate(parts.roles) if its == role]
    require(
        len(rows) > 0,
        f"data.split_column: no row of {file} has {shown(parts.column)} = {split}; name both train and val",
    )
    table = whole.only(rows)
    own_role = role if parts.column else role_of(file.stem) or "train"
    images = image_column(table, file, root, cfg, own_role)
    group = cfg.group if cfg.group in whole.columns else None
    rest = whole.without([images.column, parts.column, *([group] if group else [])])
    found = class_column(rest, file, cfg)
    # Labels are numbered by the classes of the training rows, for both splits.
    if classes is None:
        # Where images have several, those of both splits: a rare one may be in neither.
        own = [its for its, role in zip(found.rows, parts.roles, strict=True) if role == "train" or found.written]
        classes = in_order({*found.columns, *(name for its in own for name in its)})
        insisted = cfg.label_column is not None or cfg.labels == "multi"
        check_classes(classes, len(own), found.source, file, rest, insisted=insisted)
    _check_apart(parts, whole.columns[images.column], file)
    where = f"rows with {shown(parts.column)} = " if parts.column else "rows that name images in "
    val_from = f"{where}{few(parts.val_names)}" if parts.val_names else ""
    taken = Taken(
        f"{_said(file, images)}, {'several ' * bool(found.written)}classes by {found.source}",
        val_from,
        notes=[*_notes(table, images), *_in_no_row(everything, images, file), *found.notes],
        options=[*TABLE_OPTIONS],
        written=found.written,
    )
    listing = _labelled(images.located.paths, [found.rows[row] for row in rows], classes, file, cfg, taken)
    return divided(listing, cfg, split, _groups(table, group, images.located.paths, listing, file) if group else None)


def table_images(file: Path, cfg: DataConfig) -> tuple[list[str], Listing]:
    """List the images of a table in its order: their names as written, and their places. Raises `UserError`."""
    table = _read(file)
    images = image_column(table, file, _root(file, cfg), cfg, role_of(file.stem))
    paths, taken = images.located.paths, Taken(_said(file, images), notes=_notes(table, images))
    listing = Listing(_root(file, cfg), paths, [UNLABELLED] * len(paths), [], [file], taken=taken)
    return table.columns[images.column], listing


def _groups(table: TextTable, column: str, paths: list[str], listing: Listing, file: Path) -> list[str]:
    """Name the group of each image of a listing. Raises `UserError` where a row has none, or an image has two."""
    groups: dict[str, str] = {}
    for path, name in zip(paths, table.columns[column], strict=True):
        require(name != "", f"data.group: {file} has rows without a {shown(column)}, as {shown(path)}; fill them")
        require(
            groups.setdefault(path, name) == name,
            f"data.group: {file} gives {shown(path)} two of {shown(column)}, {shown(groups[path])} and {shown(name)}; leave "
            "one of its rows",
        )
    return [groups[path] for path in listing.paths]


def _read(file: Path) -> TextTable:
    table = without_index(read_table(file, "data.path", is_image))
    require(len(table) > 0, f"data.path: {file} has no rows; give a table with a row for each image")
    return table


def _root(file: Path, cfg: DataConfig) -> Path:
    return Path(cfg.images) if cfg.images else file.parent


def _labelled(
    paths: list[str], rows: list[tuple[str, ...]], classes: list[str], file: Path, cfg: DataConfig, taken: Taken
) -> Listing:
    """List each image once, with its classes. Raises `UserError` where two rows differ, or one is not in `classes`."""
    named: dict[str, tuple[str, ...]] = {}
    for path, names in zip(paths, rows, strict=True):
        other = named.setdefault(path, names)
        require(
            {*other} == {*names},
            f"data.path: {file} gives {shown(path)} two classes, {few([*other])} and {few([*names])}; leave one of its rows",
        )
    unknown = sorted({name for names in rows for name in names} - {*classes})
    hint = lacking(unknown[0], classes) if unknown else ""
    require(
        not unknown,
        f"data.path: {file} has a class that training lacks: {few(unknown, 3)} ({hint}); remove or mend its rows",
    )
    numbers = {name: number for number, name in enumerate(classes)}
    numbered = [[numbers[name] for name in names] for names in named.values()]
    labels, sets = as_sets(numbered, len(classes)) if taken.written else ([its[0] for its in numbered], NO_SETS)
    again = len(paths) - len(named)
    notes = [f"{again} rows name an image again and are left out"] if again else []
    return Listing(
        _root(file, cfg),
        list(named),
        labels,
        classes,
        [file],
        taken=replace(taken, notes=[*taken.notes, *notes]),
        label_sets=sets,
    )


def _used(table: TextTable, parts: Split) -> tuple[TextTable, Split]:
    """Keep the rows that train or validate, with a note on the others."""
    used = [row for row, role in enumerate(parts.roles) if role in ("train", parts.val_role)]
    left = len(table) - len(used)
    notes = [f"{left} rows are left alone, as their {shown(parts.column) or 'folder'} is another"] if left else []
    kept = table.only(used)
    return replace(kept, notes=[*kept.notes, *notes]), parts._replace(roles=[parts.roles[row] for row in used])


def _check_apart(parts: Split, images: list[str], file: Path) -> None:
    """Raise `UserError` where an image is in both splits."""
    train, val = (
        {name for name, its in zip(images, parts.roles, strict=True) if its == role}
        for role in ("train", parts.val_role)
    )
    both = sorted(train & val)
    require(
        not both,
        f"data.split_column: {shown(parts.column)} of {file} puts {len(both)} images into both splits, as {few(both, 1)}; "
        "leave one row of each",
    )


def _in_no_row(table: TextTable, images: Images, file: Path) -> list[str]:
    beyond = images.located.beyond(table.columns[images.column])
    return [f"in no row of {file.name}, so left out: {counted(len(beyond), 'image')}, as {beyond[0]}"] if beyond else []


def _said(file: Path, images: Images) -> str:
    folders = [f"{shown(folder)}/" for folder in images.located.folders]
    where = f" in {few(folders, 3)}" if folders else ""
    return f"table {file.name}: images by {shown(images.column)}{where}"


def _notes(table: TextTable, images: Images) -> list[str]:
    foreign = images.located.foreign
    if not foreign:
        return table.notes
    place = images.located.paths[table.columns[images.column].index(foreign[0])]
    return [
        *table.notes,
        f"{len(foreign)} names begin elsewhere, as {shown(foreign[0])}, and are taken for {shown(place)} …",
    ]
