"""Position of a run in the order of training. The module imports nothing, so run folders are read without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cursor:
    """Position in the order of training: `seen` images of `epoch`, counted over all ranks."""

    epoch: int = 0
    seen: int = 0
