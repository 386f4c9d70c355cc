"""Results of items, as they are printed and kept."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError

PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"
FILES = ("check.json", "check.md")


class Skip(Exception):
    """Raised where this machine lacks something that an item needs; the message names it."""


@dataclass(frozen=True)
class Found:
    """Measurement of an item that has passed."""

    told: str
    figures: dict[str, float] = field(default_factory=dict)
    """Name with unit -> speed, of which more is better: to compare nodes by."""


@dataclass(frozen=True)
class Result:
    """Result of one item."""

    item: str
    state: str
    """PASS, FAIL or SKIPPED."""
    told: str
    """Measurement, or the reason."""
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        return f"{self.state:8}{self.item:20}{self.seconds:7.1f} s  {self.told}"


def check_free(out: Path) -> None:
    """Raise `UserError` where a folder has a check already."""
    if any((out / name).exists() for name in FILES):
        raise UserError(f"--out: {out} holds a check already; give another folder")


def write(out: Path, about: dict[str, str], results: Iterable[Result]) -> None:
    """Write check.json and check.md, each beside its place and then renamed. Raises `UserError`."""
    results = list(results)
    rows = [f"| {r.item} | {r.state} | {r.told.replace('|', '/')} | {r.seconds} |" for r in results]
    page = [
        "# Check of a machine",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
        "| item | | figure or reason | s |",
        "|---|---|---|---|",
        *rows,
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "check.md", ("\n".join(page) + "\n").encode())
        content = {"about": about, "results": [asdict(result) for result in results]}
        replace_file(out / "check.json", json.dumps(content, indent=2).encode())
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); give another folder") from None


def read(out: Path) -> list[Result]:
    """Read the results that `write` has left in a folder. Raises OSError and ValueError."""
    return [Result(**row) for row in json.loads((out / "check.json").read_text())["results"]]
