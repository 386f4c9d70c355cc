"""Supervisors on one node and on several: real processes, of a shell, and real connections."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.supervisor import supervisor as module
from launch.supervisor.link import Link, connect, listen
from launch.supervisor.ranks import NodeRanks, Order, Report, free_port
from launch.supervisor.record import record_restart, recorded_restarts
from launch.supervisor.supervisor import End, Restart, Supervisor, follow
from launch.supervisor.verdict import MISTAKE, STALLED, Failure, choose_nodes, first_cause, may_restart

LOST, KILLED, TIRED, OTHER = Failure(1, "b"), Failure(0, "a", 1, -9), Failure(0, "a", 0, STALLED), Failure(1, "b", 3, 1)
WRONG, ASKED = Failure(0, "a", 0, MISTAKE), Failure(0, "a", 0, -signal.SIGUSR2)


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([OTHER, KILLED], KILLED),
        ([OTHER, TIRED, KILLED, LOST], LOST),
        ([OTHER, LOST, WRONG], WRONG),
        ([OTHER, TIRED], TIRED),
        ([OTHER, Failure(0, "a", 2, 1)], OTHER),
    ],
)
def test_the_cause_is_what_made_the_others_fail(failures: list[Failure], cause: Failure) -> None:
    assert first_cause(failures) == cause


def test_what_is_started_again() -> None:
    assert all(may_restart(one, 2, 3) for one in (LOST, KILLED, TIRED, OTHER))
    assert not any(may_restart(one, 3, 3) for one in (LOST, KILLED, TIRED, OTHER))
    assert not any(may_restart(one, 0, 3) for one in (WRONG, ASKED)), "no restart mends a mistake; a signal is obeyed"


@pytest.mark.parametrize(
    ("failures", "wanted", "nodes"),
    [
        ({0: 0, 1: 0, 2: 0}, 2, [0, 1]),
        ({0: 0, 1: 1, 2: 0}, 2, [0, 2]),
        ({0: 1, 1: 2}, 2, [0, 1]),
        ({0: 0, 2: 0}, 2, [0, 2]),
        ({0: 0}, 2, None),
    ],
)
def test_nodes_that_failed_least_go_on(failures: dict[int, int], wanted: int, nodes: list[int] | None) -> None:
    assert choose_nodes(failures, wanted) == nodes


def shell(script: str) -> list[str]:
    """A rank: START is its number of starts so far, and the others' ends are waited for by `sleep 60`."""
    return ["sh", "-c", f"START=$TORCHELASTIC_RESTART_COUNT; {script}"]


def supervised(script: str, restarts: int = 0, ranks: int = 2) -> tuple[End, list[Restart]]:
    told: list[Restart] = []
    with NodeRanks(0, "", ranks, shell(script)) as own:
        return Supervisor(own, restarts=restarts, told=told.append).run(), told


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.supervisor.ranks.GRACE_S", 0.3)
    monkeypatch.setattr(module, "STALLED_S", 0.3)


def test_a_killed_rank_starts_all_again(tmp_path: Path) -> None:
    script = (
        f'echo "$RANK/$WORLD_SIZE $SLUICE_RESTARTED" >> "{tmp_path}/$START"; [ $START$RANK = 01 ] && kill -KILL $$; '
    )
    end, told = supervised(script + "[ $START = 0 ] && exec sleep 60; true", restarts=1)
    assert end == End(0)
    assert told == [Restart(1, "rank 1 was ended by SIGKILL", ("",))]
    assert sorted((tmp_path / "0").read_text().splitlines()) == ["0/2 ", "1/2 "]
    assert (tmp_path / "1").read_text().splitlines()[0].endswith("/2 rank 1 was ended by SIGKILL")


def test_restarts_have_a_limit() -> None:
    end, told = supervised("exit 7", restarts=2, ranks=1)
    assert end == End(7, "rank 0 ended with exit code 7") and [one.number for one in told] == [1, 2]


def test_a_mistake_is_not_tried_again() -> None:
    """Though the others fail first, as they lose their connections."""
    end, told = supervised("[ $RANK = 1 ] && { sleep 0.2; exit 2; }; exit 1", restarts=5)
    assert (end.code, told) == (2, [])


def test_the_hung_rank_is_named() -> None:
    end, told = supervised(f"[ $START$RANK = 01 ] && exec sleep 60; [ $START = 1 ] || exit {STALLED}", 1, ranks=3)
    assert end.code == 0
    assert told[0].cause == "rank 0 found that nothing moves, and rank 1 did not end"


def test_a_signal_is_handed_on_and_ends_it() -> None:
    """Each rank ends in its own time, by that signal, and is not started again."""
    script = 'trap "sleep 0.$RANK; trap - USR2; kill -USR2 $$" USR2; while :; do sleep 0.05; done'
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR2)).start()
    end, told = supervised(script, restarts=3, ranks=3)
    assert (end.code, told) == (128 + signal.SIGUSR2, [])


@contextmanager
def nodes(script: str, count: int) -> Iterator[tuple[NodeRanks, socket.socket, list[Link]]]:
    """The first node of so many, its listener, and the connections of the others, which run in threads."""
    port = free_port()
    links: list[Link] = []
    with listen(port) as listener, pytest.MonkeyPatch.context() as patch:

        def connected(*given: object) -> Link:
            links.append(connect("127.0.0.1", port, 10))
            return links[-1]

        patch.setattr(module, "connect", connected)
        others = [NodeRanks(number, f"n{number}", 1, shell(script)) for number in range(1, count)]
        threads = []
        for other in others:
            threads.append(threading.Thread(target=follow, args=(other, "127.0.0.1", port)))
            threads[-1].start()
            while len(links) < len(threads):
                time.sleep(0.01)
        with NodeRanks(0, "n0", 1, shell(script)) as own:
            yield own, listener, links
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


def test_a_spare_takes_the_place_of_a_lost_node(tmp_path: Path) -> None:
    script = f'echo "$RANK" >> "{tmp_path}/$START"; [ $START = 0 ] && exec sleep 60; true'
    told: list[Restart] = []
    with nodes(script, 3) as (own, listener, links):

        def lose() -> None:
            while not (tmp_path / "0").exists():
                time.sleep(0.02)
            links[0].close()

        threading.Thread(target=lose).start()
        supervisor = Supervisor(own, 2, 3, told.append, listener, spares=1)
        end = supervisor.run()
    assert (end, supervisor.missing) == (End(0), ["n1"]), "n2 leaves at the end"
    assert told == [Restart(1, "node n1 is lost", ("n0", "n2"))]
    assert sorted((tmp_path / "1").read_text().split()) == ["0", "1"]


def test_too_few_nodes_are_left() -> None:
    with nodes("exec sleep 60", 2) as (own, listener, links):
        threading.Timer(0.5, links[0].close).start()
        end = Supervisor(own, 2, 3, lambda restart: None, listener).run()
    assert end == End(1, "node n1 is lost, and 1 of 2 nodes are there", lost=True)


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b'{"node": "x", "name": 3, "port": 1}\n', b"x" * 200_000]
)
def test_strangers_change_nothing(noise: bytes) -> None:
    with nodes("sleep 0.3", 2) as (own, listener, _):
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(noise)
            assert Supervisor(own, 2, 0, lambda restart: None, listener).run() == End(0)


def test_messages_arrive_as_they_were_sent() -> None:
    ends = pair()
    order = Order("run", 2, (0, 2), "n0", 30001, "node n1 is lost")
    ends[0].send(Order())
    ends[0].send(order)
    time.sleep(0.05)
    assert ends[1].receive(Order) == order and ends[1].receive(Order) is None
    report = Report(1, "n1", 3, killed=(3, 4))
    ends[1].send(report)
    time.sleep(0.05)
    assert ends[0].receive(Report) == report
    ends[0].close()
    assert ends[1].receive(Order) is None and ends[1].lost


def test_a_suspended_job_loses_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time in which both sides were suspended is no silence: SLURM suspends all nodes of a job together."""
    monkeypatch.setattr("launch.supervisor.link.LOST_S", 0.3)
    ends = pair()
    ends[0].send(Order())
    time.sleep(0.6)  # nobody looks
    assert not ends[1].lost and ends[1].receive(Order) == Order() and not ends[1].lost
    start_s = time.monotonic()
    while not ends[1].lost:
        assert ends[1].receive(Order) is None and time.monotonic() - start_s < 30
        time.sleep(0.05)
    assert time.monotonic() - start_s >= 0.3


def pair() -> tuple[Link, Link]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return Link(client), Link(server.accept()[0])


def test_restarts_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recorded_restarts(tmp_path).number == 0
    record_restart(tmp_path, Restart(1, "node b is lost", ("a", "c")))
    with (tmp_path / "restarts.jsonl").open("a") as file:
        file.write('{"time": 1, "cau\n')
    record_restart(tmp_path, Restart(2, "rank 1 on \x1b was ended by SIGKILL", ("a", "c")))
    assert recorded_restarts(tmp_path) == (2, "rank 1 on \x1b was ended by SIGKILL")
    assert "restart 1 on a, c: node b is lost\nrestart 2 on a, c: rank 1 on \\x1b was" in capsys.readouterr().out
