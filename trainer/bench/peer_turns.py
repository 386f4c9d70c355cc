"""Peers take turns: the worker processes of one are idle while another is measured."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import active_children

from data_pipeline.common.errors import UserError
from trainer.bench.peers import CONTESTANTS, Race

_PREFETCH = 2  # batches that each worker makes ahead, as a DataLoader's default is
_GLANCE_S, _IDLE_S = 0.1, 0.005  # a worker that uses less CPU time than _IDLE_S in _GLANCE_S is idle


class Peer:
    """A contestant whose worker processes are idle in the turns of others. Made on all ranks at once: it may use DDP.

    Raises `UserError` with the reason if its first step fails.
    """

    def __init__(self, name: str, race: Race) -> None:
        before = set(active_children())
        try:
            self._training = CONTESTANTS[name].train(race)
            next(self._training)
        except Exception as error:  # an error in another library must not stop the other contestants
            raise UserError(" ".join(f"{name}: {type(error).__name__}: {error}".split())) from None
        self._workers = [worker.pid or 0 for worker in set(active_children()) - before]
        self._rest()

    @property
    def ahead(self) -> int:
        """Steps that its workers may have prepared by the beginning of a turn."""
        return _PREFETCH * len(self._workers)

    @contextmanager
    def turn(self) -> Iterator[Callable[[], int]]:
        """Give a function that makes one optimizer step and returns the number of this rank's images in it."""
        try:
            yield lambda: next(self._training)
        finally:
            self._rest()

    def close(self) -> None:
        """Let its workers end."""
        self._training.close()  # type: ignore[attr-defined] # a generator

    def _rest(self) -> None:
        """Wait until its workers have filled their queues: then they do not work until the next turn takes from them.

        They get no SIGSTOP, because a stopped worker would stay for ever if this process were killed.
        """
        burnt_s = -1.0
        while (now_s := sum(_cpu_s(worker) for worker in self._workers)) > burnt_s + _IDLE_S:
            burnt_s = now_s
            time.sleep(_GLANCE_S)


def _cpu_s(pid: int) -> float:
    """CPU time of a process."""
    with suppress(OSError):
        return time.clock_gettime(~pid << 3 | 2)  # its clock's number, as clock_getcpuclockid(3) makes it on Linux
    return 0.0


def open_peers(race: Race) -> tuple[dict[str, Peer], list[str]]:
    """The contestants that train, by name, and for each of the others a line that says why it does not. Collective."""
    peers: dict[str, Peer] = {}
    left_out: list[str] = []

    def start(name: str) -> None:
        peers[name] = Peer(name, race)

    for name, contestant in CONTESTANTS.items():
        if contestant.needs and not importlib.util.find_spec(contestant.needs):
            left_out.append(f"{name}: {contestant.needs} is not installed; pip install {contestant.needs}")
            continue
        try:
            race.ctx.raise_together(partial(start, name))
        except UserError as error:
            left_out.append(str(error))
            if name in peers:  # it failed on another rank only
                peers.pop(name).close()
    return peers, left_out
