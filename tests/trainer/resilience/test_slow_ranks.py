"""Ranks that hold up the others: the decision on made-up times, the times of real ranks, and a core that others take."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_pipeline.common.errors import UserError
from data_pipeline.loader import Batch
from tests.support import warm
from tests.support.runs import Job, alerts, dotted, ranks_of, rows, settings_of
from tests.trainer.engine.test_engine import batch, build, join, part, small_net
from trainer.node.arrival import Arrival, Place
from trainer.resilience.slow_ranks import INTERVALS, RankTimes, SlowRanks, rank_figures
from trainer.run_config import RunConfig
from trainer.tracking.meter import Meter

PLACES = [Place("gpu07", f"GPU-{number}") for number in range(4)]
USUAL = RankTimes(0.001, 0.099, 0.010)
LOADS, COMPUTES = RankTimes(0.050, 0.100, 0.002), RankTimes(0.001, 0.149, 0.002)


@pytest.mark.parametrize(
    ("slow", "said"),
    [
        (LOADS, "mostly in data (a step: data 50.0 ms, median 1.0; compute 100.0 ms, median 99.0)"),
        (COMPUTES, "mostly in compute (a step: data 1.0 ms, median 1.0; compute 149.0 ms, median 99.0)"),
    ],
)
def test_a_rank_is_named_once_and_forgotten_once(slow: RankTimes, said: str) -> None:
    watch, seen = SlowRanks(20, PLACES), [USUAL, USUAL, slow, USUAL]
    assert [[*watch.look(seen)] for _ in range(INTERVALS - 1)] == [[]] * (INTERVALS - 1)
    ((title, text, found),) = watch.look(seen)
    assert title == "slow rank"
    assert (
        text.startswith("rank 2 on gpu07, GPU-2: its own work on an image takes 50 % longer than the median")
        and said in text
    )
    assert (found.rank, found.node, found.gpu, round(found.slower_pct)) == (2, "gpu07", "GPU-2", 50)
    assert found.phase in said and watch.named == {2: found}
    assert [[*watch.look(seen)] for _ in range(2 * INTERVALS)] == [[]] * (2 * INTERVALS)
    told = [alert for _ in range(INTERVALS) for alert in watch.look([USUAL] * 4)]
    assert [(title, text) for title, text, _ in told] == [("rank no longer slow", "rank 2 on gpu07, GPU-2")]
    assert watch.named == {}


def test_what_is_not_slow() -> None:
    """A pause between slow intervals, a rank within the limit, one that waits long, all alike, a limit of 0, one rank."""
    watch = SlowRanks(20, PLACES)
    for interval in range(4 * INTERVALS):
        other = USUAL if interval % INTERVALS == INTERVALS - 1 else COMPUTES
        assert not [*watch.look([USUAL, other, USUAL])]
    fewer = RankTimes(0.0008, 0.0792, 0.030, images=0.8)  # as in the last step of an epoch
    assert not [told for _ in range(2 * INTERVALS) for told in watch.look([USUAL, fewer, fewer])]
    within, waits = RankTimes(0.001, 0.118, 0.0), RankTimes(0.001, 0.099, 9.0)
    for times in ([USUAL, within, waits], [COMPUTES] * 4, [RankTimes(0, 0, 0)] * 2, [COMPUTES], []):
        assert not [told for _ in range(2 * INTERVALS) for told in watch.look(times)]
    assert not [told for _ in range(2 * INTERVALS) for told in SlowRanks(0, PLACES).look([USUAL, COMPUTES])]


def test_of_two_ranks_the_faster_is_the_measure() -> None:
    watch = SlowRanks(20, PLACES)
    told = [alert for _ in range(INTERVALS) for alert in watch.look([RankTimes(0, 0.13, 0), RankTimes(0, 0.1, 0.03)])]
    assert [(found.rank, round(found.slower_pct)) for _, _, found in told] == [(0, 30)]


def test_figures_of_ranks() -> None:
    """The exchange itself is what the slowest rank waits; the rest of the others' waits is lost on it."""
    times = [RankTimes(0.0, 0.1, 0.06), RankTimes(0.0, 0.1, 0.06), RankTimes(0.0, 0.15, 0.01)]
    assert rank_figures(times) == pytest.approx(
        {
            "perf/compute_ms": 100.0,
            "perf/comm_ms": 10.0,
            "perf/rank_wait_pct": 100 * (0.13 / 3 - 0.01) / 0.16,
            "perf/slowest_pct": 50.0,
        }
    )


def test_places() -> None:
    assert str(Arrival(host="gpu07 1f2e", gpu="8f6a-11").place) == "gpu07, GPU-8f6a-11"
    assert str(Arrival(host="node1 ").place) == "node1"


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_limit_that_is_none(value: str) -> None:
    with pytest.raises(UserError, match="slow_pct"):
        RunConfig(slow_pct=float(value))


LATE_S = 0.15


def as_one_of_two(rank: int, folder: Path) -> None:
    """Steps in which rank 1 is late: with its batch, with its forward pass, and so while the first layers are frozen."""
    ctx = join(rank, 2, folder)
    for case in ("data", "compute", "frozen"):
        module = small_net()
        engine = build(module, ctx=ctx)
        late = rank == 1

        def batches(case: str = case, late: bool = late) -> Iterator[Batch]:
            for seed in range(3):
                time.sleep(LATE_S if late and case == "data" else 0)
                yield part(batch(8, seed), slice(rank, None, 2))

        if case != "data":
            module.get_submodule("conv2").register_forward_hook(lambda *_: time.sleep(LATE_S if rank else 0))
        if case == "frozen":
            module.conv1.requires_grad_(False)
        engine.step([part(batch(8), slice(rank, None, 2))], 0.1)  # opens connections
        engine.waits.take()
        meter = Meter(ctx, [], 7)
        for one in meter.waiting(batches()):
            meter.add(engine.step([one], 0.1), engine.waits.take())
        scalars, _ = meter.reduce()
        torch.save({"times": [tuple(one) for one in meter.rank_times], "scalars": scalars}, folder / f"{case} {rank}")
    dist.destroy_process_group()


def test_each_rank_knows_who_waits_for_whom(tmp_path: Path) -> None:
    warm.start_ranks(as_one_of_two, (tmp_path,), 2)
    for case in ("data", "compute", "frozen"):
        here, there = (torch.load(tmp_path / f"{case} {rank}") for rank in (0, 1))
        assert here["times"] == there["times"], "every rank has the times of all"
        first, second = (RankTimes(*times) for times in here["times"])
        assert second.own_s - first.own_s > LATE_S / 2 and first.wait_s - second.wait_s > LATE_S / 2, (case, here)
        lost = second.data_s - first.data_s if case == "data" else second.compute_s - first.compute_s
        assert lost > LATE_S / 2, (case, here)
        assert here["scalars"]["perf/slowest_pct"] > 20 and here["scalars"]["perf/rank_wait_pct"] > 10


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of two ranks")
def test_a_core_that_another_program_takes(base: Path, tmp_path: Path) -> None:
    """Busy processes on the core of rank 1 of a training: it is named on the console, and in metrics.jsonl."""
    run = tmp_path / "run"
    settings = settings_of(base, run, 400) | {"run.log_every": "5", "run.save_every": "1000", "data.size_px": "64"}
    job = Job(2, tmp_path / "run.log", "trainer", *dotted(settings), cold=True)
    busy: list[subprocess.Popen[bytes]] = []
    try:
        job.wait_for_step(run, 20)
        core = os.sched_getaffinity(ranks_of(job)[1])
        busy = [
            subprocess.Popen(
                [sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, core)
            )
            for _ in range(3)
        ]
        end_s = time.monotonic() + 180
        while not alerts(run) and job.process.poll() is None and time.monotonic() < end_s:
            time.sleep(0.2)
    finally:
        for process in busy:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            job.terminate()
        job.wait()
    found = [one for one in alerts(run) if one["alert"] == "slow rank"]
    assert [(one["rank"], one["phase"] in ("data", "compute")) for one in found] == [(1, True)], job.output()
    assert f"slow rank: rank 1 on {found[0]['node']}: its own work on an image takes " in job.output()
    assert rows(run)[-1]["perf/slow_ranks"] in (0, 1)
