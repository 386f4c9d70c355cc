"""Cores of the ranks of a node: shares on paper, and processes that are really bound."""

import os
from pathlib import Path

import pytest

from tests.support import warm
from tests.support.runs import free_port
from trainer.distributed import open_dist_context
from trainer.node.arrival import Arrival, take_cores
from trainer.node.cores import in_order, numa_node, share


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """As the kernel shows two sockets of four cores with two threads each: 0 to 7, and their second threads from 8."""
    for node, cpulist in enumerate(["0-3,8-11", "4-7,12-15"]):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(cpulist + "\n")
    for cpu in range(16):
        folder = tmp_path / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    return tmp_path


def test_neighbours_are_near(two_sockets: Path, tmp_path: Path) -> None:
    assert in_order(range(16), two_sockets) == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert in_order({9, 4, 1, 12}, two_sockets) == [1, 9, 4, 12], "of a job that was given four"
    assert in_order({3, 1, 2}, tmp_path / "nothing") == [1, 2, 3], "a machine that does not say"


@pytest.mark.parametrize(
    ("near", "parts"),
    [
        ([0, 0, 1, 1], [{0, 8, 1, 9}, {2, 10, 3, 11}, {4, 12, 5, 13}, {6, 14, 7, 15}]),
        ([1, 0, 1, 0], [{4, 12, 5, 13}, {0, 8, 1, 9}, {6, 14, 7, 15}, {2, 10, 3, 11}]),
        ([-1, -1], [{0, 8, 1, 9, 2, 10, 3, 11}, {4, 12, 5, 13, 6, 14, 7, 15}]),
        ([1], [set(range(16))]),
        ([-1] * 17, [set()] * 17),
    ],
)
def test_each_rank_has_cores_of_its_gpus_node(near: list[int], parts: list[set[int]], two_sockets: Path) -> None:
    ordered = in_order(range(16), two_sockets)
    assert [set(share(ordered, near, rank)) for rank in range(len(near))] == parts


def test_numa_node_of_a_gpu(tmp_path: Path) -> None:
    for address, text in (("0000:3b:00.0", "1\n"), ("0000:5e:00.0", "-1\n")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "numa_node").write_text(text)
    assert [numa_node(address, tmp_path) for address in ("0000:3b:00.0", "0000:5e:00.0", "0000:ff:00.0")] == [1, -1, -1]


@pytest.mark.parametrize(
    ("masks", "share"),
    [
        ([(0, 1, 2, 3)] * 2, 2),  # the launcher lets each process use all cores
        ([(0, 1, 2, 3), (4, 5, 6, 7)], 4),  # SLURM or numactl has bound each
        ([(0, 1)] * 3, 1),
    ],
)
def test_count_of_cores(masks: list[tuple[int, ...]], share: int) -> None:
    everyone = [Arrival(host="here", local_rank=rank, cpus=cpus) for rank, cpus in enumerate(masks)]
    other = [Arrival(host="there", local_rank=rank, cpus=masks[0]) for rank in range(len(masks))]
    assert take_cores([*other, *everyone], len(masks), len(masks), bind=False) == share


def report_cores(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    all_cores = sorted(os.sched_getaffinity(0))
    for name, given, bind in (
        ("bound", all_cores, True),
        ("free", all_cores, False),
        ("own", [all_cores[-rank]], True),
    ):
        os.sched_setaffinity(0, given)
        with open_dist_context(bind_cores=bind) as ctx:
            (folder / f"{name} {rank}").write_text(f"{ctx.cores} {sorted(os.sched_getaffinity(0))}")
            ctx.barrier()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_processes_are_bound(tmp_path: Path) -> None:
    warm.start_ranks(report_cores, (free_port(), tmp_path), 2)
    said = {file.name: file.read_text() for file in tmp_path.iterdir()}
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    ordered = in_order(cores)
    assert [said["bound 0"], said["bound 1"]] == [
        f"{half} {sorted(part)}" for part in (ordered[:half], ordered[half : 2 * half])
    ]
    assert said["free 0"] == said["free 1"] == f"{half} {cores}"
    assert [said["own 0"], said["own 1"]] == [f"1 [{cores[0]}]", f"1 [{cores[-1]}]"], "a launcher's choice stays"
