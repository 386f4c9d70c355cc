"""Fetch the blocks of an epoch in the order of their first use, as far ahead of it as the cache bears.

Reading by batches alone would leave the store idle wherever many images in a row come out of blocks that are there already, as
in the middle of a window of shards (`data.shuffle_shards`), and ask it for all blocks of the next window at once.
"""

from threading import RLock

import numpy as np
from numpy.typing import NDArray

from data_pipeline.sources.storage.block_cache import BLOCK
from data_pipeline.sources.storage.objects import Objects

_AT_A_TIME = 8
"""Requests under way: those of one time share the line, so that more of them would let the first ones come later."""
_SHARE = 0.25  # of the cache: most that lies there ahead of its use
_GLANCES = 1024  # blocks looked up at a time: the batches wait meanwhile


class Lookahead:
    """Keeps requests under way for the blocks that samples still to come need first."""

    def __init__(self, objects: Objects, spans: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Begin with the first block of samples with these spans [N, 3], used at these ascending positions [N]."""
        assert objects.cache
        self._objects = objects
        self._blocks, self._first_uses = _by_first_use(spans, positions)
        self._most = max(int(_SHARE * objects.cache.most_bytes / BLOCK), _AT_A_TIME)
        self._lock = RLock()  # a request may end before it is known here
        self._next = self._limit = self._under_way = 0
        self.reach(0)

    def reach(self, position: int) -> None:
        """Fetch on, now that the samples before `position` are done with. Returns at once."""
        used = int(np.searchsorted(self._first_uses, position))
        with self._lock:
            self._limit = max(self._limit, min(used + self._most, len(self._blocks)))
            self._advance()

    def _advance(self) -> None:
        for _ in range(_GLANCES):
            if self._under_way == _AT_A_TIME or self._next == self._limit or self._objects.failed:
                return
            number, block = self._blocks[self._next].tolist()
            self._next += 1
            coming = self._objects.begin_block(number, block)
            if coming:
                self._under_way += 1
                coming.add_done_callback(self._arrived)

    def _arrived(self, _: object) -> None:
        with self._lock:
            self._under_way -= 1
            self._advance()


def _by_first_use(
    spans: NDArray[np.int64], positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List each block once: object and number [M, 2], and the position of its first use [M], ascending."""
    firsts, lasts = spans[:, 1] // BLOCK, (spans[:, 1] + np.maximum(spans[:, 2], 1) - 1) // BLOCK
    counts = lasts - firsts + 1
    sample = np.repeat(np.arange(len(spans)), counts)
    within = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = np.stack([spans[sample, 0], firsts[sample] + within], axis=1)
    keys = (blocks[:, 0] << 32) + blocks[:, 1]  # blocks of one object are fewer than 2^32
    order = np.sort(np.unique(keys, return_index=True)[1])
    return blocks[order], positions[sample[order]]
