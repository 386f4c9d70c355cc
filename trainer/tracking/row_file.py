"""Files of rows that survive a disk which is full for a while."""

import os
import threading
from collections.abc import Callable

MOST_BYTES = 64 << 20
"""Rows kept in memory at most: a week of a row each second, or some hundred sets of histograms."""


class RowFile:
    """A file that accepts every write: what the disk does not take stays in memory, and is written at the next.

    `open_file` returns the descriptor to append to; it may raise OSError, and is then called again at the next write. `tell`
    gets one line when the disk takes no more, one when it does again, and one at the end for what was never written. For
    several threads.
    """

    def __init__(self, name: str, open_file: Callable[[], int], tell: Callable[[str], None]) -> None:
        self._name, self._open, self._tell = name, open_file, tell
        self._file: int | None = None
        self._kept, self._lock = bytearray(), threading.Lock()
        self._failing = False
        self.flush()

    def write(self, data: bytes) -> None:
        """Raises MemoryError where more than MOST_BYTES wait for the disk."""
        with self._lock:
            if len(self._kept) + len(data) > MOST_BYTES:
                raise MemoryError(f"{MOST_BYTES >> 20} MiB wait for the disk")
            self._kept += data

    def flush(self) -> None:
        """Write the waiting rows, as far as the disk takes them."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            while self._kept:
                del self._kept[: os.write(self._file, self._kept)]
        except OSError as error:
            if not self._failing:
                self._tell(f"{self._name}: {error.strerror}; its rows wait in memory until they can be written")
            self._failing = True
        else:
            if self._failing:
                self._tell(f"{self._name}: written again, with all rows that had waited")
            self._failing = False

    def close(self) -> None:
        self.flush()
        if self._kept:
            self._tell(f"{self._name}: {len(self._kept)} bytes could not be written and are lost")
        if self._file is not None:
            os.close(self._file)
