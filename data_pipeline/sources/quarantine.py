"""Faults of files: the table of kinds, and the list of files that training leaves out (`data.quarantine`).

The list is text: a line for each file, its path relative to `data.path` with "/" between the parts, as "train/CLASS/x.jpg".
Empty lines and lines that begin with "#" are skipped. A path with a line break, or one that begins with "#" or a double
quote, is written as a JSON string.
"""

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, printable
from data_pipeline.config import DataConfig
from data_pipeline.sources.torchvision_sets import dataset_root


class Fault(NamedTuple):
    path: str
    """Path of the file, relative to `data.path`."""
    why: str

    @property
    def kind(self) -> str:
        """Reason without its numbers."""
        return re.sub(r"\b(0x[0-9a-f]+|\d+)\b", "…", self.why)


def relative_to_data(cfg: DataConfig, root: Path, path: str) -> str:
    """Name the file `path` below a catalog's `root` in the way of a quarantine list."""
    return Path(os.path.relpath(root / path, _base(cfg))).as_posix()


def quarantined(cfg: DataConfig, root: Path) -> set[str]:
    """Read the files that `data.quarantine` leaves out, as paths below a catalog's `root`. Raises `UserError`."""
    paths = read_quarantine(Path(cfg.quarantine)) if cfg.quarantine else set()
    return {os.path.relpath(_base(cfg) / path, root) for path in paths}


def _base(cfg: DataConfig) -> Path:
    """Folder that the paths of a list are relative to: the data's, or that of the table which names the images."""
    base = dataset_root(cfg)
    return base.parent if base.is_file() else base


def print_faults(faults: list[Fault]) -> None:
    """Print a table: each kind, its number of files, and one of them; the most frequent first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault)
    table = Table("what is wrong", "files", "for example", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for column in table.columns:
        column.overflow = "fold"
    for kind, hits in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        table.add_row(kind, str(len(hits)), Text(printable(hits[0].path)))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def write_quarantine(file: Path, faults: Iterable[Fault]) -> None:
    """Write the list, sorted by kind, then path. Raises OSError."""
    lines = [
        "# Files that training leaves out: --data.quarantine FILE. One path a line, relative to data.path.",
        "# Written by python -m data_pipeline.verify; lines may be added and removed.",
    ]
    kind = None
    for fault in sorted(faults, key=lambda fault: (fault.kind, fault.path)):
        if fault.kind != kind:
            lines += ["", f"# {fault.kind}"]
        kind = fault.kind
        quoted = "\n" in fault.path or "\r" in fault.path or fault.path.startswith(("#", '"'))
        lines.append(json.dumps(fault.path) if quoted else fault.path)
    replace_file(file, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))


def read_quarantine(file: Path) -> set[str]:
    """Read the paths of a list, relative to `data.path`. Raises `UserError` where that fails."""
    try:
        text = file.read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        raise UserError(
            f"data.quarantine: cannot read {file} ({error.strerror}); give a list that verify wrote"
        ) from None
    paths = set()
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line and not line.startswith("#"):
            try:
                path = json.loads(line) if line.startswith('"') else line
            except json.JSONDecodeError:
                raise UserError(
                    f"data.quarantine: line {number} of {file} is no JSON string: {line}; mend it"
                ) from None
            paths.add(str(PurePosixPath(path)))
    return paths
