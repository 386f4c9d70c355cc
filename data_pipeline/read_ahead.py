"""Read ahead of the training: a few threads fetch the next batches from storage, and slow files are named."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from data_pipeline.common.errors import printable
from data_pipeline.sources.catalog import Catalog
from data_pipeline.sources.image_headers import BadImage, Size, inspect

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 8  # most threads that read from storage, a batch each
_PATIENCE_S = 30.0  # time that storage may take for a batch before its files are named
_FIRST = 4  # first batches of an epoch; nothing was read ahead for them, so their wait says nothing of the storage


class ReadAhead:
    """Reads the images of a catalog for one rank, batch by batch in background threads."""

    def __init__(self, catalog: Catalog, rank: int) -> None:
        self._catalog, self._rank = catalog, rank
        self._pool = ThreadPoolExecutor(_THREADS)
        self._ahead = 1  # batches in flight: threads take the interpreter from each other, so no more than needed
        self._being_read: set[int] = set()

    def in_background(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Start `work` in another thread."""
        return self._pool.submit(work, *arguments)

    def fetched(self, fetch: Callable[[T], R], batches: Iterable[T]) -> Iterator[R]:
        """Yield `fetch(batch)` of each batch in order, computed by other threads before it is asked for."""
        pending: deque[Future[R]] = deque()
        for number, batch in enumerate(batches):
            pending.append(self._pool.submit(fetch, batch))
            if len(pending) > self._ahead:
                if number > _FIRST and not pending[0].done():
                    self._ahead = min(self._ahead + 1, _THREADS)  # storage is slow here
                yield self._awaited(pending.popleft())
        while pending:
            yield self._awaited(pending.popleft())

    def read(self, sample: int) -> tuple[bytes, Size]:
        """Read the encoded bytes of an image and its size. Raises `BadImage` where it cannot be read or decoded."""
        self._being_read.add(sample)
        try:
            data = self._catalog.read(sample)
            return data, inspect(data)
        except OSError as error:
            raise BadImage(error.strerror or type(error).__name__) from error
        finally:
            self._being_read.discard(sample)

    def _awaited(self, batch: Future[R]) -> R:
        """Wait for the batch, however long it takes; name again and again the files that it waits for."""
        waited_s = 0.0
        while not batch.done() and wait([batch], _PATIENCE_S).not_done:
            waited_s += _PATIENCE_S
            files = [f"{self._catalog.root}/{self._catalog.paths[sample]}" for sample in list(self._being_read)]
            print(
                f"rank {self._rank} has waited {waited_s:g} s for {printable(', '.join(files[:3]))}"
                f"{' and others' * (len(files) > 3)}; storage does not answer",
                file=sys.stderr,
                flush=True,
            )
        return batch.result()
