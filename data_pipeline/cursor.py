"""Where in the order of training a run is. Nothing is imported: run folders are read without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cursor:
    """A place in the order of training: `seen` images of `epoch`, counted over all ranks."""

    epoch: int = 0
    seen: int = 0
