"""Processes of a run: how long they wait for each other, and how they leave when one of them fails."""

import argparse
import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.flight_recorder.components.loader import read_dir

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError
from data_pipeline.loader import Batch
from tests.support import warm
from tests.support.runs import dotted, environment, free_port, settings_of
from trainer.distributed import PATIENCE_S, open_dist_context
from trainer.resilience import watchdog
from trainer.resilience.watchdog import COLLECTIVES, FRESH, Watchdog


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def variables(rank: int, port: int) -> dict[str, str]:
    """Variables that a launcher sets for a rank of two."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}


# ---- patience --------------------------------------------------------------------------------------------------------


def timeouts(rank: int, port: int, folder: Path) -> None:
    os.environ |= variables(rank, port)
    told = []
    for stall_s in (1.0, 3600.0, 0.0):
        with open_dist_context(patience_s=FRESH * stall_s) as ctx:
            groups = [dist.group.WORLD, ctx.new_group()]
            told += [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "1800", "of NCCL's own watchdog"
    (folder / str(rank)).write_text(" ".join(str(int(one.total_seconds())) for one in told))


def test_groups_wait_longer_than_the_watchdog(tmp_path: Path) -> None:
    """Otherwise they end the process before it can say which rank the others wait for."""
    warm.start_ranks(timeouts, (free_port(), tmp_path), 2)
    for rank in range(2):
        short, of_saver, long, again, endless, _ = map(int, (tmp_path / str(rank)).read_text().split())
        assert short == of_saver == PATIENCE_S
        assert long == again >= 1.5 * FRESH * 3600
        assert endless > 86400


# ---- what they were doing --------------------------------------------------------------------------------------------


def write_collectives(rank: int, port: int, folder: Path) -> None:
    os.environ |= variables(rank, port)
    with open_dist_context() as ctx:
        ctx.sum(torch.ones(3))
        if rank == 0:
            dist.all_reduce(torch.ones(5), async_op=True)  # rank 1 joins late
        ctx.gather_objects(0, ctx.new_group())
        folder.mkdir(exist_ok=True)
        Watchdog(60, folder, ctx, print)._write_collectives()
        if rank == 1:
            dist.all_reduce(torch.ones(5))


def test_the_latest_collectives_are_written(tmp_path: Path) -> None:
    """In files that torch's own analysis reads."""
    warm.start_ranks(write_collectives, (free_port(), tmp_path / "stacks"), 2)
    details, _ = read_dir(argparse.Namespace(prefix=COLLECTIVES, trace_dir=str(tmp_path / "stacks")))
    sums = [
        [
            entry["input_sizes"]
            for entry in details[f"{COLLECTIVES}{rank}"]["entries"]
            if "all_reduce" in entry["profiling_name"]
        ]
        for rank in range(2)
    ]
    assert sums == [[[[3]], [[5]]], [[[3]]]], "the sum that rank 1 has not begun"


def hang_while_asked(rank: int, port: int, folder: Path) -> None:
    """Hold the interpreter's lock, as torch does while it asks a GPU that does not answer."""
    os.environ |= variables(rank, port)
    watchdog._REPORT_S = 1.0
    torch._C._distributed_c10d._dump_fr_trace = lambda: ctypes.PyDLL(None).sleep(300)  # type: ignore[attr-defined]
    with open_dist_context() as ctx:
        Watchdog(60, folder, ctx, print)._write_collectives()


def test_a_record_that_cannot_be_had_keeps_no_process(tmp_path: Path) -> None:
    start_s = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGALRM"):
        warm.start_ranks(hang_while_asked, (free_port(), tmp_path), 2)
    assert time.monotonic() - start_s < 200


# ---- the end ---------------------------------------------------------------------------------------------------------


def fail_in_mid_epoch(kind: str, options: list[str]) -> None:
    """A rank of two that trains; rank 1 fails in its third step, while a sum is under way that rank 0 never joins."""
    from trainer.__main__ import main
    from trainer.engine.ddp import DdpEngine

    step, kept = DdpEngine.step, list[Any]()

    def failing(engine: Any, micro_batches: list[Batch], lr: float) -> Tensor:
        if engine.updates == 1:
            kept.append(engine.ctx.new_group())
        if engine.updates == 2 and engine.ctx.rank == 1:
            kept.append(dist.all_reduce(torch.ones(1), group=kept[0], async_op=True))
            Path("raised").touch()
            raise {"mistake": UserError("data.path: it has gone"), "bug": ZeroDivisionError("a bug")}[kind]
        return step(engine, micro_batches, lr)

    DdpEngine.step = failing  # type: ignore[method-assign, assignment]
    sys.argv = ["trainer", *options]
    run_command(main)


@pytest.mark.parametrize(
    ("kind", "code", "line"), [("mistake", 2, "error: rank 1: data.path: it has gone\n"), ("bug", 1, ": a bug\n")]
)
def test_one_rank_fails_in_mid_epoch(kind: str, code: int, line: str, base: Path, tmp_path: Path) -> None:
    """It says why, and both end within seconds, without a launcher that would end them."""
    options, port = dotted(settings_of(base, tmp_path / "run")), free_port()
    logs = [tmp_path / f"rank {rank}.log" for rank in range(2)]
    ranks = [
        warm.Warm(
            "tests.trainer.test_distributed",
            kind,
            *options,
            stdout=logs[rank],
            environment=environment() | variables(rank, port),
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1].wait(100) == code, logs[1].read_text()
        assert ranks[0].wait(60) == 1, logs[0].read_text()
        assert time.time() - (tmp_path / "raised").stat().st_mtime < 60
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(log.read_text() for log in logs))
    finally:
        for rank in ranks:
            rank.send_signal(9)
    said = logs[1].read_text()
    assert said.endswith(line) and said.count("error:") == (kind == "mistake"), said


def mistake_of_all(rank: int, port: int, folder: Path) -> None:
    """All ranks meet a mistake at once; the process can then join again."""
    os.environ |= variables(rank, port)
    for _ in range(2):
        with pytest.raises(UserError), open_dist_context() as ctx:
            ctx.raise_together(lambda: int("x") if rank else (_ for _ in ()).throw(UserError("a mistake")))
    from data_pipeline.common.launcher import leaves_alone

    (folder / str(rank)).write_text(str(leaves_alone()))


def test_a_mistake_of_all_ranks_is_left_in_order(tmp_path: Path) -> None:
    warm.start_ranks(mistake_of_all, (free_port(), tmp_path), 2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["False", "False"]


if __name__ == "__main__":
    fail_in_mid_epoch(sys.argv[1], sys.argv[2:])
