"""Ranks of one node: start them, watch them, end them, as the deciding supervisor orders."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

from launch.supervisor.verdict import Failure, first_cause
from trainer.resilience.signals import RESTARTED, SIGNALS

GRACE_S = 5.0
"""Time in which ranks may end by themselves after one of them has failed."""


@dataclass(frozen=True)
class Order:
    """Order to all nodes. It stands until another comes; repeating it changes nothing."""

    act: Literal["wait", "run", "stop", "end"] = "wait"
    """To wait for the others; to run the ranks of `generation`; to end the ranks; to end the ranks and leave with `code`."""
    generation: int = 0
    """Number of this start of the ranks, from 1."""
    nodes: tuple[int, ...] = ()
    """Nodes that run ranks, in the order of the ranks; the others are spares."""
    address: str = ""
    port: int = 0
    """Address and port at which the ranks meet."""
    cause: str = ""
    """Cause for which the ranks before these were ended; empty for the first."""
    code: int = 0


@dataclass(frozen=True)
class Report:
    """State of a node."""

    node: int
    name: str
    port: int
    """A port that is free there, for ranks to meet."""
    generation: int = 0
    """Start of the ranks that this is about."""
    state: Literal["idle", "running", "done", "failed"] = "idle"
    """No ranks; all are running, or have ended well; all have ended well; one has failed."""
    rank: int = -1
    code: int = 0
    """The rank whose failure is the cause of the others' (see `first_cause`), and its exit code, negative for a signal."""
    alive: int = 0
    """Ranks that are running."""
    killed: tuple[int, ...] = ()
    """Ranks that did not end by themselves when they had to."""
    signal: int = 0
    """Signal that asks for an end of the training; 0 where none has come."""

    @property
    def failure(self) -> Failure | None:
        failed = self.state == "failed"
        return Failure(self.node, self.name, self.rank, self.code) if failed else None


@dataclass
class NodeRanks:
    """Ranks of this node, each a process of `command`. As a context manager it takes signals, and hands them on to the ranks."""

    node: int
    """Number of the node, from 0."""
    name: str
    """Name under which the other nodes reach it; empty where it is the only one."""
    count: int
    """Ranks on each node."""
    command: Sequence[str]
    _order: Order = Order()
    _processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _failures: list[Failure] = field(default_factory=list)
    _killed: tuple[int, ...] = ()
    _stop_s: float | None = None
    _signal: int = 0
    _port: int = 0
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "NodeRanks":
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # it is ignored under nohup
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def signalled(self) -> bool:
        """True once a signal has asked for an end of the training."""
        return self._signal > 0

    def obey(self, order: Order) -> None:
        """Do what an order says, as far as it is not done. Never waits."""
        if order.act == "run" and order.generation > self._order.generation:
            self._order = order
            self._start()
        elif order.act in ("stop", "end") and self._stop_s is None:
            self._stop_s = time.monotonic()
        if self._stop_s is not None and time.monotonic() - self._stop_s > GRACE_S:
            self._kill()

    def report(self) -> Report:
        """State now."""
        ended = {rank: process.poll() for rank, process in self._processes.items()}
        if self._stop_s is None:  # later ends are our doing
            known = {failure.rank for failure in self._failures}
            new = (Failure(self.node, self.name, rank, code) for rank, code in ended.items() if code)
            self._failures += [failure for failure in new if failure.rank not in known]
        alive = sum(code is None for code in ended.values())
        cause = first_cause(self._failures) if self._failures else None
        if not self._port:
            self._port = free_port()
        return Report(
            node=self.node,
            name=self.name,
            port=self._port,
            generation=self._order.generation,
            state="idle" if not ended else "failed" if cause else "running" if alive else "done",
            rank=cause.rank if cause else -1,
            code=cause.code if cause else 0,
            alive=alive,
            killed=self._killed,
            signal=self._signal,
        )

    def _start(self) -> None:
        order = self._order
        self._processes, self._failures, self._killed, self._stop_s, self._port = {}, [], (), None, 0
        if self.node not in order.nodes:
            return
        before = order.nodes.index(self.node) * self.count
        for local_rank in range(self.count):
            variables = {
                "RANK": str(before + local_rank),
                "WORLD_SIZE": str(len(order.nodes) * self.count),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(self.count),
                "MASTER_ADDR": order.address,
                "MASTER_PORT": str(order.port),
                "TORCHELASTIC_RESTART_COUNT": str(order.generation - 1),  # as torchrun counts
                **({RESTARTED: order.cause} if order.cause else {}),
            }
            # A rank must not outlive its supervisor, which alone would end it where it hangs.
            self._processes[before + local_rank] = subprocess.Popen(
                self.command, env={**os.environ, **variables}, preexec_fn=_die_with_parent
            )
        if self._signal:  # it may have come before they were there
            self._on_signal(self._signal, None)

    def _kill(self) -> None:
        alive = {rank: process for rank, process in self._processes.items() if process.poll() is None}
        for process in alive.values():
            process.kill()
        for process in alive.values():
            process.wait()
        self._killed += tuple(alive)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)


PORTS = range(30000, 32768)
"""Ports for ranks to meet at: below those that systems assign, above those of `rank_variables`."""


def free_port() -> int:
    """Find a port of PORTS that no process has now. Raises OSError."""
    for port in random.sample(PORTS, 100):  # nosec B311 # no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")


def _die_with_parent() -> None:
    """Have the kernel send SIGKILL to this process when its parent ends."""
    _PRCTL(1, signal.SIGKILL)


def _prctl() -> Any:
    import ctypes

    return ctypes.CDLL(None).prctl


_PRCTL = _prctl()  # loaded before the fork, after which little is allowed


def python(module: str, *arguments: str) -> list[str]:
    """Command that runs a module by this interpreter."""
    return [sys.executable, "-u", "-m", module, *arguments]
