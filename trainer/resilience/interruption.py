"""Cost of an interruption, from the rows that a run had written before it."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_TAIL_BYTES = 1 << 20  # some thousand rows: more than there are between two checkpoints


class Interruption(NamedTuple):
    """Work and time that a run has lost by an interruption."""

    lost_steps: int
    """Optimizer steps that were reported and are trained again."""
    lost_s: float
    """Seconds since it had reached the step from which it goes on, or had told its first."""

    def __str__(self) -> str:
        return f"{self.lost_steps} steps are trained again, {self.lost_s:.1f} s are lost"


def interruption(metrics: Path, resume_step: int) -> Interruption | None:
    """Compute what an interruption costs a run that resumes at a step; None where its rows do not tell."""
    rows = []
    with suppress(OSError), metrics.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        for line in file:
            with suppress(ValueError, TypeError, KeyError):  # cut off by the start of the tail, or torn by a kill
                row = json.loads(line)
                rows.append((int(row["step"]), float(row["time"])))
    kept_s = [time_s for step, time_s in rows if step <= resume_step]
    if not rows or (resume_step and not kept_s):
        return None
    since_s = kept_s[-1] if kept_s else rows[0][1]
    return Interruption(max(0, rows[-1][0] - resume_step), max(0.0, time.time() - since_s))
