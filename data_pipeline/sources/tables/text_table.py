"""Read tables as text: every cell of a CSV or Parquet file as it is written there, so that 001, NA and 1e3 stay unchanged."""

import codecs
import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.sources.image_headers import kind_of, other_kind

TABLES = (".csv", ".tsv", ".parquet")

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order mark -> encoding; longer marks come first, as they begin with the shorter ones."""
_SAMPLE = 1 << 16  # characters, or bytes, that are read to guess the format


@dataclass(frozen=True)
class TextTable:
    """Columns of text with the same number of cells; a missing cell is ""."""

    columns: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)
    """Guesses about the file's format, a line each."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def different(self, column: str) -> list[str]:
        """List the different cells of a column, sorted."""
        return sorted({*self.columns[column]})

    def only(self, rows: list[int]) -> "TextTable":
        """Keep the rows with these numbers."""
        return TextTable({name: [cells[row] for row in rows] for name, cells in self.columns.items()}, self.notes)

    def without(self, names: list[str]) -> "TextTable":
        """Drop these columns."""
        return TextTable({name: cells for name, cells in self.columns.items() if name not in names}, self.notes)


def is_table(file: Path) -> bool:
    """Return True for a file name of a table."""
    return file.suffix.lower() in TABLES


def read_table(file: Path, option: str, is_data: Callable[[str], bool] | None = None) -> TextTable:
    """Read the table in a CSV, TSV or Parquet file. Raises a `UserError` that begins with `option`.

    A first row with a cell for which `is_data` is true is no header; the columns are then called 1, 2, 3.
    """
    try:
        if file.suffix.lower() == ".parquet":
            return _read_parquet(file)
        return _read_csv(file, option, is_data)
    except UserError:
        raise
    except (ValueError, OSError, csv.Error) as error:
        why = f"it is {kind}" if (kind := kind_of(file)) else getattr(error, "strerror", None) or error
        why = shown(" ".join(str(why).split()), 200)
        raise UserError(f"{option}: {file} is no table that can be read ({why}); give a CSV or Parquet file") from None


def without_index(table: TextTable) -> TextTable:
    """Drop columns that only number the rows, as pandas and R write them in front."""
    first = next(iter(table.columns), "")
    index = [name for name, cells in table.columns.items() if _is_index(name, name == first, cells)]
    return table.without(index) if len(index) < len(table.columns) else table


def _is_index(name: str, first: bool, cells: list[str]) -> bool:
    if name.startswith("__index_level_"):
        return True
    unnamed = name.startswith("Unnamed: ") or (first and name == "1")
    return unnamed and cells in ([str(row + start) for row in range(len(cells))] for start in (0, 1))


def shown(text: str, most: int = 80) -> str:
    """Shorten a cell or a column's name to `most` characters for a message, and escape what a terminal would obey."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in cut)


def few(texts: list[str], most: int = 5) -> str:
    """List the first cells or columns for a message."""
    return ", ".join(map(shown, texts[:most])) + ", …" * (len(texts) > most)


# ---- CSV --------------------------------------------------------------------------------------------------------------


def _read_csv(file: Path, option: str, is_data: Callable[[str], bool] | None) -> TextTable:
    # Encoding and delimiter are found in the text itself.
    data = file.read_bytes()
    if kind := other_kind(data):
        raise ValueError(kind)
    text, notes = _decoded(data)
    first, _, rest = text.partition("\n")
    hint = re.fullmatch(r"sep=(.)\r?", first)  # a line that Excel writes
    delimiter = hint[1] if hint else _delimiter(text, "\t" if file.suffix.lower() == ".tsv" else ",")
    rows = _rows(rest if hint else text, delimiter)
    if not rows:
        raise UserError(f"{option}: {file} is empty; give a table with a row for each image")
    head, body = rows[0][1], rows[1:]
    # Find the header: a table may have none, or row numbers without a name.
    if is_data and any(map(is_data, head)):
        notes.append("its first row names an image and so is no header; the columns are called 1, 2, …")
        head, body = [""] * len(head), rows
    elif _numbered(head, [row for _, row in body]):
        head = ["", *head]  # R writes no name above the rows' numbers
    # A longer row usually has an unquoted delimiter in a cell; to cut it would shift the columns.
    for line, row in body:
        if any(row[len(head) :]):
            raise UserError(
                f"{option}: line {line} of {file} has {len(row)} cells, divided by {_DELIMITERS.get(delimiter, delimiter)}, "
                f"where its header has {len(head)}; put cells that hold {delimiter!r} into quotation marks"
            )
    # Fill short rows, name nameless columns, drop the empty ones behind a last delimiter.
    columns = [[row[at] if at < len(row) else "" for _, row in body] for at in range(len(head))]
    names = [name or str(at + 1) for at, name in enumerate(head)]
    named = [at for at, name in enumerate(head) if name or any(columns[at])]  # lines may end with a delimiter
    twice = sorted({names[at] for at in named if [names[other] for other in named].count(names[at]) > 1})
    if twice:
        raise UserError(f"{option}: {file} has several columns called {few(twice)}; give each a name of its own")
    return TextTable({names[at]: columns[at] for at in named}, notes)


def _numbered(head: list[str], body: list[list[str]]) -> bool:
    """Return True where each row begins with its number, and the header has nothing above it."""
    numbers = (str(number) for number in range(1, len(body) + 1))
    return all(row[0] == number and len(row) == len(head) + 1 for row, number in zip(body, numbers, strict=True))


def _rows(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Yield the number of the last line, and the cells, of each row that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        return [(reader.line_num, cells) for row in reader if any(cells := [cell.strip() for cell in row])]
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None


def _decoded(data: bytes) -> tuple[str, list[str]]:
    """Decode a file's text, with a note where its encoding is a guess."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding), []
    sample = data[:_SAMPLE]
    high, low = sample[::2].count(0), sample[1::2].count(0)
    if max(high, low) > len(sample) // 8:
        return data.decode("utf-16-be" if high > low else "utf-16-le"), []
    try:
        return data.decode(), []
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    note = f"line {line} is no UTF-8, so it was read as Latin-1; look whether the names in it are right"
    try:
        return data.decode("cp1252"), [note]
    except UnicodeDecodeError:
        return data.decode("latin-1"), [note]


def _delimiter(text: str, usual: str) -> str:
    """Find the delimiter: the first that gives rows of one width, at least 2; without one, the `usual` delimiter.

    One that gives the header this width too goes before those that make it a cell shorter, as R writes it.
    """
    fitting: list[tuple[int, str]] = []
    sample = text if len(text) <= _SAMPLE else text[: text.rfind("\n", 0, _SAMPLE) + 1]
    for delimiter in dict.fromkeys((usual, *_DELIMITERS)):
        try:
            widths = [len(cells) for _, cells in _rows(sample, delimiter)]
        except csv.Error:
            continue
        if len({*widths[1:]}) < 2 and max(widths, default=0) > 1 and widths[-1] - widths[0] in (0, 1):
            fitting.append((widths[-1] - widths[0], delimiter))
    return min(fitting, key=lambda fit: fit[0], default=(0, usual))[1]


# ---- Parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(file: Path) -> TextTable:
    import pyarrow  # type: ignore[import-untyped] # imported here: only such tables need it
    from pyarrow import parquet

    try:
        source = parquet.ParquetFile(file)
        kinds = {column.name: column.type for column in source.schema_arrow}
        passed = [name for name, kind in kinds.items() if pyarrow.types.is_nested(kind) or "binary" in str(kind)]
        table = source.read([name for name in kinds if name not in passed])
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    notes = [f"its columns {few(passed)} hold no text and are passed over"] if passed else []
    return TextTable({name: _texts(table.column(name).to_pylist()) for name in table.column_names}, notes)


def _texts(values: list[object]) -> list[str]:
    """Write values as text: whole numbers without a point, as pandas makes them floats where one is missing."""
    whole = all(value.is_integer() for value in values if isinstance(value, float) and value == value)
    return ["" if value is None or value != value else _text(value, whole) for value in values]


def _text(value: object, whole: bool) -> str:
    return str(int(value)) if whole and isinstance(value, float) else str(value).strip()
