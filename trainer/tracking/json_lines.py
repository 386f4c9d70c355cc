"""`metrics.jsonl`, the source of truth about a run's metrics."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic_io import replace_file
from trainer.tracking.row_file import RowFile
from trainer.tracking.sink import Sink

METRICS = "metrics.jsonl"
"""Name of the file in a run folder."""


class JsonLines(Sink):
    """`metrics.jsonl`: a row a line, flushed at once: `{"step": int, "epoch": float, "time": Unix seconds, ...}`.

    JSON has no NaN and no infinity: both become `null`, which pandas reads as NaN. An alert is a line with its title as
    `alert`, its `text`, and its facts.
    """

    def __init__(self, path: Path, resume_step: int, tell: Callable[[str], None]) -> None:
        self._step, self._epoch = resume_step, 0.0
        self._file = RowFile(path.name, lambda: _open_rows(path, resume_step), tell)

    def write(self, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        self._step, self._epoch = step, epoch
        self._line({name: value if math.isfinite(value) else None for name, value in scalars.items()})

    def alert(self, title: str, text: str, facts: Mapping[str, str | float]) -> None:
        self._line({"alert": title, "text": text, **facts})

    def close(self, failed: bool) -> None:
        self._file.close()

    def _line(self, content: Mapping[str, Any]) -> None:
        row = {"step": self._step, "epoch": self._epoch, "time": time.time(), **content}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a file of metrics, rows and alerts; nothing where it is not there."""
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except OSError:
        return
    for line in lines:
        with suppress(ValueError):  # the line is being written, or torn
            row = json.loads(line)
            if line.endswith("\n") and isinstance(row, dict):
                yield row


def _open_rows(path: Path, resume_step: int) -> int:
    """Open the file of rows up to `resume_step`, to append to. Raises OSError."""
    if resume_step and path.exists():
        # A kill may tear the last line: a line that is no whole row is dropped too.
        kept = [line for line in path.read_text(errors="replace").splitlines() if 0 <= _step(line) <= resume_step]
        replace_file(path, "".join(line + "\n" for line in kept).encode())
    return os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if resume_step else os.O_TRUNC), 0o666)


def _step(line: str) -> int:
    """Read the step of a row of `metrics.jsonl`; -1 where the line is no whole row."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1
