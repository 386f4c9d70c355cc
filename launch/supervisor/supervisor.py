"""Supervisors: one on each node, of which the first one's decides for all.

Each starts the ranks of its node and tells the first how they are. When a rank has ended too early, or a node is silent,
the first has all ranks ended and started again from the last checkpoint, within the same allocation: at most so many times,
and where a node is lost, on a spare one.

The first says what is to be done by an order, "run" on these nodes or "stop", and sends it again and again. The others answer
with reports of their ranks. A start has a number, the generation, in its orders and in the reports of its ranks: a report of
an earlier start, which was under way when the order changed, does not count.
"""

import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import NamedTuple

from data_pipeline.common.errors import printable
from launch.supervisor.link import Link, connect
from launch.supervisor.ranks import NodeRanks, Order, Report
from launch.supervisor.verdict import STALLED, Failure, choose_nodes, first_cause, may_restart

POLL_S = 0.1
SETTLE_S = 0.5
"""Time after a failure in which others may be told, of which one may be its cause."""
GATHER_S = 600.0
"""Longest time until the nodes have come together."""
SPARES_S = 10.0
"""Longest time that nodes wait for the spare ones at the beginning."""
STALLED_S = 10.0
"""Further time for the other ranks to notice that nothing moves, and to write their stacks."""
FAREWELL_S = 60.0
"""Time in which all ranks have to end once a signal has ended one of them, by its own checkpoint or before it could."""
_LEAVE_S = 10.0


class Restart(NamedTuple):
    """A restart of all ranks."""

    number: int
    cause: str
    nodes: tuple[str, ...]
    """Names of the nodes that go on; empty where too few are left."""


class End(NamedTuple):
    """End of the training, as the first supervisor saw it."""

    code: int
    cause: str = ""
    """Cause, where it is a failure."""
    lost: bool = False
    """True where the cause is the loss of nodes."""


class Supervisor:
    """The deciding supervisor, on the first of several nodes, or on the only one.

    `wanted` nodes run ranks, the `spares` are others that connect to `listener` too. `told` hears of each restart.
    """

    def __init__(
        self,
        own: NodeRanks,
        wanted: int = 1,
        restarts: int = 0,
        told: Callable[[Restart], None] = lambda restart: None,
        listener: socket.socket | None = None,
        spares: int = 0,
    ) -> None:
        self.own, self.wanted, self.limit, self.told, self.listener = own, wanted, restarts, told, listener
        self.spares = spares
        self.missing: list[str] = []
        """Names of the nodes that were lost before the end."""
        self._strangers: list[Link] = []
        self._links: dict[int, Link] = {}
        self._reports: dict[int, Report] = {}
        self._lost: list[Failure] = []
        self._failures: Counter[int] = Counter()
        self._order = Order()

    def run(self) -> End:
        """Run the ranks, again and again, until they have ended well or may not be started again."""
        end = self._run()
        self._order = Order("end", code=end.code)
        self._until(lambda: not (self._links or _alive(self._reports.values())), _LEAVE_S)
        return end

    def _run(self) -> End:
        self._until(lambda: len(self._reports) >= self.wanted, GATHER_S)
        self._until(lambda: len(self._reports) >= self.wanted + self.spares, SPARES_S)  # so that the first ones train
        restarts, cause = 0, ""
        while nodes := self._choose():
            failure = self._train(restarts + 1, nodes, cause)
            if failure is None:
                return End(0)
            cause = self._blame(failure)
            if self._signal or not may_restart(failure, restarts, self.limit):
                return End(failure.exit_code, cause, failure.lost)
            restarts += 1
            self.told(Restart(restarts, cause, tuple(self._reports[node].name for node in self._choose())))
        there = f"{len(self._reports)} of {self.wanted} nodes are there"
        return End(1, f"{cause}, and {there}" if cause else there, lost=bool(cause))

    def _choose(self) -> tuple[int, ...]:
        """Nodes to train on; none where there are too few."""
        return tuple(choose_nodes({node: self._failures[node] for node in self._reports}, self.wanted) or ())

    def _train(self, generation: int, nodes: tuple[int, ...], cause: str) -> Failure | None:
        """Run ranks on these nodes until all have ended. Returns the failure that made it necessary, if one did."""
        first = self._reports[nodes[0]]
        self._lost = []
        self._order = Order("run", generation, nodes, first.name or "127.0.0.1", first.port, cause)

        def reports() -> list[Report]:
            return [one for node in nodes if (one := self._reports.get(node)) and one.generation == generation]

        def failures() -> list[Failure]:
            lost = [failure for failure in self._lost if failure.node in nodes]
            return [*lost, *(failure for one in reports() if (failure := one.failure))]

        def done() -> bool:
            return len(reports()) == len(nodes) and not _alive(reports())

        self._until(lambda: bool(failures()) or done())
        if not failures():
            return None
        # One that a signal has ended has saved with the others, which may take longer. Else others may tell the cause.
        asked = self._signal or all(failure.asked for failure in failures())
        self._until(done, FAREWELL_S if asked else SETTLE_S)
        if any(failure.code == STALLED for failure in failures()):
            self._until(done, STALLED_S)
        self._order = Order("stop", generation)
        self._until(lambda: not _alive(reports()))
        return first_cause(failures())

    def _blame(self, failure: Failure) -> str:
        """Count a failure against its node, so that a spare one is preferred. Returns the cause in words."""
        hung = {rank: node for node, report in self._reports.items() for rank in report.killed}
        if failure.code != STALLED or not hung:
            self._failures[failure.node] += 1
            return str(failure)
        self._failures.update(set(hung.values()))
        names = ", ".join(map(str, sorted(hung)))
        return f"{failure}, and rank{'s' * (len(hung) > 1)} {names} did not end"

    @property
    def _signal(self) -> int:
        return max((report.signal for report in self._reports.values()), default=0)

    def _until(self, reached: Callable[[], bool], patience_s: float = float("inf")) -> None:
        """Exchange orders and reports until it is reached, or for so long."""
        end_s = time.monotonic() + patience_s
        self._exchange()
        while not reached() and time.monotonic() < end_s:
            links = [link.socket for link in (*self._links.values(), *self._strangers)]
            wait([*links, self.listener] if self.listener else links, POLL_S)
            self._exchange()

    def _exchange(self) -> None:
        self.own.obey(self._order)
        self._reports[self.own.node] = self.own.report()
        self._strangers += self._arrivals()
        for link in [*self._strangers, *self._links.values()]:
            report = link.receive(Report)
            if report:
                self._hear(link, report)
        self._strangers = [link for link in self._strangers if not link.lost and link not in self._links.values()]
        for node, link in list(self._links.items()):
            link.send(self._order)
            if link.lost:
                del self._links[node]
                link.close()
                report = self._reports.pop(node)
                self._lost.append(Failure(node, report.name))
                if self._order.act != "end":
                    self.missing.append(report.name)

    def _hear(self, link: Link, report: Report) -> None:
        known = self._links.setdefault(report.node, link)
        if known is not link or report.node == self.own.node:
            link.close()  # it pretends to be another
        else:
            self._reports[report.node] = report

    def _arrivals(self) -> Iterator[Link]:
        while self.listener:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            yield Link(connection)


def _alive(reports: Iterable[Report]) -> int:
    return sum(report.alive for report in reports)


def follow(own: NodeRanks, address: str, port: int) -> int:
    """Do on another node what the deciding supervisor says. Returns its exit code."""
    try:
        link = connect(address, port, GATHER_S)
    except OSError as error:
        print(f"error: the first node, {printable(address)}, cannot be reached: {error}", file=sys.stderr, flush=True)
        return 1
    order = Order()
    while not link.lost:
        order = link.receive(Order) or order
        own.obey(order)
        report = own.report()
        link.send(report)
        if order.act == "end" and not report.alive:
            link.close()
            return order.code
        if not link.lost:
            wait([link.socket], POLL_S)
    print(f"error: the first node, {printable(address)}, is lost", file=sys.stderr, flush=True)
    return 1
