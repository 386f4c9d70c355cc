"""Read parts of the objects of a dataset, ahead of their use, through the cache on disk."""

import errno
import io
import os
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.address import Address
from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.common.launcher import warn_on_rank0
from data_pipeline.sources.builtin import cache_root
from data_pipeline.sources.storage import store
from data_pipeline.sources.storage.block_cache import BLOCK, BlockCache

THREADS = 32
"""Requests under way at a time."""
_ROOM = 0.8  # share of the cache that a dataset may take whose every image is read in every epoch


class Objects:
    """The objects `names` below `root`, of which the parts that were read stay in `cache`; without one, nothing stays."""

    def __init__(self, root: Address, names: list[str], stats: list[store.Stat], cache: BlockCache | None) -> None:
        self.root, self.names, self.stats, self.cache = root, names, stats, cache
        self._coming: dict[tuple[int, ...], Future[bytes]] = {}  # by object and block, or by object, offset and length
        self._seen: set[tuple[int, int]] = set()  # blocks that are in the cache, unless they have made room since
        self._folders: dict[int, str] = {}  # of each object's blocks
        self._pool: ThreadPoolExecutor | None = None
        self._failure: UserError | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(stat.size for stat in self.stats)

    @property
    def failed(self) -> bool:
        """True once a request was given up, so that the run ends."""
        return self._failure is not None

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Read `length` bytes of object `number` from `offset` on. Raises OSError where it ends before, and `UserError`."""
        if offset + length > self.stats[number].size:
            raise OSError(errno.EIO, "its shard is cut off")
        if not self.cache:
            coming = self._coming.pop((number, offset, length), None)
            return self._awaited(coming) if coming else self._request(number, offset, offset + length)
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if first == last:  # as of nearly all images
            return self._read_block(number, first, offset - first * BLOCK, length)
        pieces = []
        for block in range(first, last + 1):
            start, end = max(offset, block * BLOCK), min(offset + length, (block + 1) * BLOCK)
            pieces.append(self._read_block(number, block, start - block * BLOCK, end - start))
        return b"".join(pieces)

    def read_all(self, number: int) -> bytes:
        """Read a whole object."""
        size = self.stats[number].size
        self.prefetch_whole(number)
        return self.read(number, 0, size)

    def prefetch_whole(self, number: int) -> None:
        """Begin to fetch an object, if there is one of this number. Returns at once."""
        spans = [(number, 0, self.stats[number].size)] if number < len(self.stats) else []
        self.prefetch(np.array(spans, np.int64).reshape(-1, 3))

    def prefetch(self, spans: NDArray[np.int64]) -> None:
        """Begin to fetch what is not there of spans [N, 3]: number of the object, offset, length. Returns at once."""
        if not self.cache:
            for number, offset, length in spans.tolist():
                self._begin((number, offset, length), self._request, number, offset, offset + length)
            return
        firsts, lasts = spans[:, 1] // BLOCK, (spans[:, 1] + spans[:, 2] - 1) // BLOCK
        wanted = {
            (number, block)
            for number, first, last in zip(spans[:, 0].tolist(), firsts.tolist(), lasts.tolist(), strict=True)
            for block in range(first, last + 1)
        }
        for number, block in sorted(wanted - self._seen):
            self.begin_block(number, block)

    def begin_block(self, number: int, block: int) -> Future[bytes] | None:
        """Begin to fetch a block into the cache; None where it is there, or under way. Returns at once."""
        if os.path.exists(self._path(number, block)):
            self._seen.add((number, block))
            return None
        return self._begin((number, block), self._fetch_ahead, number, block)

    def _begin(self, key: tuple[int, ...], work: Callable[..., bytes], *arguments: int) -> Future[bytes] | None:
        """Start a request that is not under way yet. In the cache it is done with; otherwise its bytes wait for their reader."""
        if key in self._coming:
            return None
        pool = self._pool = self._pool or ThreadPoolExecutor(THREADS)
        try:
            self._coming[key] = coming = pool.submit(work, *arguments)
        except RuntimeError:  # another thread has given up just now, or the process ends
            return None
        if self.cache:
            coming.add_done_callback(lambda _: self._coming.pop(key, None))
        return coming

    def _awaited(self, coming: Future[bytes]) -> bytes:
        try:
            return coming.result()
        except CancelledError:
            raise self._failure or UserError(f"{self.root}: reading was given up; start again") from None

    def _fetch_ahead(self, number: int, block: int) -> bytes:
        self._fetch(number, block)
        return b""

    def _read_block(self, number: int, block: int, offset: int, length: int) -> bytes:
        assert self.cache
        coming = self._coming.get((number, block))
        if coming:
            self._awaited(coming)
        data = self.cache.read(self._path(number, block), offset, length)
        return self._fetch(number, block)[offset : offset + length] if data is None else data

    def _fetch(self, number: int, block: int) -> bytes:
        """Fetch a block into the cache, unless it is there by now. Returns all of it."""
        assert self.cache
        self._seen.discard((number, block))
        start = block * BLOCK
        end = min(start + BLOCK, self.stats[number].size)
        return self.cache.fetched(self._path(number, block), end - start, lambda: self._request(number, start, end))

    def _request(self, number: int, start: int, end: int) -> bytes:
        address = self.root / self.names[number]
        try:
            return store.read(address, start, end, self.stats[number].etag)
        except FileNotFoundError:
            raise UserError(f"{address}: it was removed since it was opened; restore it, and start again") from None
        except UserError as error:
            self._give_up(error)
            raise

    def _give_up(self, failure: UserError) -> None:
        """Drop the requests that wait for their turn: each would try for as long again, and keep the process from its end."""
        self._failure, pool, self._pool = failure, self._pool, None
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)

    def _path(self, number: int, block: int) -> str:
        if number not in self._folders:
            assert self.cache
            stat = self.stats[number]
            version = stat.etag or f"{stat.size} bytes"
            self._folders[number] = self.cache.folder_of(self.root / self.names[number], version)
        return f"{self._folders[number]}/{block}"


class ObjectFile(io.RawIOBase):
    """An object as a file that is read here and there up to its end, and then the next one."""

    def __init__(self, objects: Objects, number: int) -> None:
        self._objects, self._number, self._at = objects, number, 0
        for ahead in (number, number + 1):
            objects.prefetch_whole(ahead)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        size = self._objects.stats[self._number].size
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: size}[whence]
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._objects.stats[self._number].size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._objects.read(self._number, self._at, wanted) if wanted else b""
        self._at += len(data)
        return data


def open_objects(root: Address, names: list[str], cache_gb: float, *, keep: bool = True) -> Objects:
    """Look up the objects `names` below `root`. Raises `UserError` where one is missing.

    With `keep`, what is read stays in the cache, which has at most `cache_gb` GB. Without, it does so only where all of it
    fits: a block of which one image is wanted must not push out another one.
    """
    stats = _stats(root, names)
    missing = next((name for name, stat in zip(names, stats, strict=True) if stat is None), None)
    require(missing is None, f"{root / str(missing)}: it is not there; copy the dataset again")
    objects = Objects(root, names, [stat for stat in stats if stat], _open_cache(cache_gb))
    if objects.cache and not keep and objects.total_bytes > _ROOM * objects.cache.most_bytes:
        _say_too_large(root, objects.total_bytes, objects.cache.most_bytes)
        objects.cache = None
    return objects


def read_object(address: Address) -> bytes:
    """Read a whole object. Raises `UserError` where that fails."""
    try:
        return store.read(address)
    except FileNotFoundError:
        raise UserError(f"{address}: it is not there; give the address of a pack, or of tar shards") from None


def _stats(root: Address, names: list[str]) -> list[store.Stat | None]:
    if root.can_list and len(names) > 1:
        known = dict(store.list_below(root))
        return [known.get(name) for name in names]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda name: store.stat(root / name), names))


def _open_cache(cache_gb: float) -> BlockCache | None:
    if not cache_gb:
        return None
    try:
        return BlockCache(cache_root() / "objects", cache_gb * 1e9)
    except (OSError, UserError) as error:
        _say_no_cache(str(error))
        return None


@cache
def _say_no_cache(why: str) -> None:
    warn_on_rank0(printable(f"nothing that is read from a distance is kept: {why}"))


@cache
def _say_too_large(root: Address, size: int, most_bytes: float) -> None:
    warn_on_rank0(
        f"data: {root} has {size / 1e9:.1f} GB, more than the cache holds ({most_bytes / 1e9:.1f} GB): its images are read "
        "one by one, each time; raise data.cache_gb, or set data.shuffle_shards"
    )
