"""Speeds and scores by a clock that the test turns."""

import math
from collections.abc import Iterator

import pytest
import torch

from tests.support.runs import SOLO
from trainer.checkpoint.progress import BestBy
from trainer.distributed import DistContext
from trainer.node import clock as clock_module
from trainer.node.clock import GpuClock
from trainer.tracking import meter as meter_module
from trainer.tracking.meter import Meter, Scores, beats, named

CLASSES = 6


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


class TwoRanks(DistContext):
    """Rank 0 of two, the other of which has the same sums, waits for its data twice as long and is asked to stop."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        other = values.clone()
        other[5] = 1
        own, its = other[7:].view(2, -1)
        its[:] = own
        its[:2] += torch.tensor([own[0], -own[0]])
        own[:] = 0
        return values.add_(other)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    turned = Clock()
    for module in (meter_module, clock_module):
        monkeypatch.setattr(module, "time", turned)
    return turned


def sums(loss: float, top1: float, top5: float, images: float, grad_norm: float) -> torch.Tensor:
    return torch.tensor([loss, top1, top5, images, grad_norm], dtype=torch.float64)


def test_scores() -> None:
    scores = Scores.of([12.0, 3.0, 6.0, 8.0, 99.0])
    assert scores[:4] == (1.5, 37.5, 75.0, 8) and scores.macro_recall_pct is None
    assert named("val", scores.figures(6)) == {"val/loss": 1.5, "val/top1_pct": 37.5, "val/top5_pct": 75.0}
    assert named("val", scores.figures(5)) == {"val/loss": 1.5, "val/top1_pct": 37.5}, (
        "of five classes all are among the best five"
    )
    judged = scores._replace(macro_recall_pct=20.0)
    assert named("val", judged.figures(5))["val/macro_recall_pct"] == 20
    assert judged.words(6) == "loss 1.5000  top-1 37.50 %  top-5 75.00 %  macro recall 20.00 %"


@pytest.mark.parametrize(
    ("by", "best", "worse", "better"),
    [("top1", 37.5, 37.5, 37.4), ("macro_recall", 20, 20, 19.9), ("loss", 1.5, 1.5, 1.6)],
)
def test_the_best_by_each_score(by: BestBy, best: float, worse: float, better: float) -> None:
    scores = Scores(1.5, 37.5, 75.0, 8, 20.0)
    assert scores.by(by) == best and beats(scores, None, by)
    assert beats(scores, better, by) and not beats(scores, worse, by)


def test_scores_that_are_no_numbers_are_never_the_best() -> None:
    for loss in (math.nan, math.inf):
        bad = Scores(loss, 37.5, 75.0, 8)
        assert not beats(bad, None, "top1") and not beats(bad, 1.0, "top1")


def test_an_interval(clock: Clock) -> None:
    """Ten steps of 0.5 s, of which 0.1 s are waiting for data; one of them takes a second more."""
    meter = Meter(SOLO, [], CLASSES)

    def batches() -> Iterator[int]:
        for number in range(10):
            clock.now += 0.1
            yield number

    for number in meter.waiting(batches()):
        clock.now += 1.4 if number == 3 else 0.4
        meter.add(sums(loss=4.0, top1=1.0, top5=2.0, images=4.0, grad_norm=number))
    scalars, stops = meter.reduce()
    assert stops == []
    assert scalars.pop("perf/host_mem_gib") > 0
    assert scalars == pytest.approx(
        {
            "train/loss": 1.0,
            "train/top1_pct": 25.0,
            "train/top5_pct": 50.0,
            "train/grad_norm": 4.5,
            "perf/images_per_s": 40 / 6,
            "perf/data_wait_pct": 100 * 1 / 6,
            "perf/step_ms_p50": 500.0,
            "perf/step_ms_p95": 1500.0,
            "perf/train_min": 0.1,
        }
    )


class Gpu:
    """A device that works through what it was given while the host goes on, and its events."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.done_s = clock, 0.0

    def launch(self, seconds: float) -> None:
        self.done_s = max(self.done_s, self.clock.now) + seconds

    def event(self, *, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at_s = max(self.gpu.done_s, self.gpu.clock.now)

    def synchronize(self) -> None:
        self.gpu.clock.now = max(self.gpu.clock.now, self.at_s)

    def elapsed_time(self, end: "Event") -> float:
        assert end.at_s <= self.gpu.clock.now, "the device is not there yet: torch raises an error"
        return 1e3 * (end.at_s - self.at_s)


@pytest.mark.parametrize(
    ("data_s", "wait_s", "step_s"),
    [(0.25, 0.25, [0.75, 0.5, 0.5, 0.5]), (0.75, 3.0 - 3 * 0.5, [1.25, 0.75, 0.75, 0.75])],
    ids=["device behind", "device starved"],
)
def test_a_device_that_works_behind_the_host(
    data_s: float, wait_s: float, step_s: list[float], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 0.5 s on the device, whose batches take `data_s` on the host.

    Only the device's idle time is a wait for data: in the first case but that for the first batch.
    """
    gpu = Gpu(clock)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    meter = Meter(SOLO, [], CLASSES)
    meter._clock = GpuClock()
    meter.pause()

    def batches() -> Iterator[int]:
        for number in range(4):
            clock.now += data_s
            yield number

    for _ in meter.waiting(batches()):
        gpu.launch(0.5)
        meter.add(sums(loss=4.0, top1=1.0, top5=2.0, images=4.0, grad_norm=1.0))
    assert clock.now == 1000 + 4 * data_s, "nothing has waited for the device"
    scalars, _ = meter.reduce()
    elapsed_s = clock.now - 1000
    assert elapsed_s == sum(step_s)
    assert scalars["perf/data_wait_pct"] == pytest.approx(100 * wait_s / elapsed_s)
    assert scalars["perf/step_ms_p50"] == 1e3 * sorted(step_s)[2]
    assert scalars["perf/step_ms_p95"] == 1e3 * max(step_s)


def test_an_epoch_adds_up_and_leaves_pauses_out(clock: Clock) -> None:
    meter = Meter(SOLO, [], CLASSES)
    for images in (8.0, 8.0, 5.0):
        clock.now += 2
        meter.add(sums(loss=2 * images, top1=images / 2, top5=images, images=images, grad_norm=1.0))
        scalars, _ = meter.reduce()
        assert scalars["train/loss"] == 2.0 and scalars["perf/images_per_s"] == images / 2
        clock.now += 100  # a checkpoint is written
        meter.pause()
    assert meter.epoch_sums == [42.0, 10.5, 21.0, 21.0, 3.0]
    assert meter.end_epoch() == {
        "train/loss": 2.0,
        "train/top1_pct": 50.0,
        "train/top5_pct": 100.0,
        "perf/train_min": 0.1,
        "perf/epoch_s": 6.0,
        "perf/images_per_s": 3.5,
    }
    assert meter.epoch_sums == [0.0] * 5 and meter.end_epoch() == {}


def test_a_resumed_epoch_scores_all_and_times_its_own_part(clock: Clock) -> None:
    meter = Meter(SOLO, [16.0, 8.0, 16.0, 16.0, 2.0], CLASSES, train_s=58.0)
    clock.now += 2
    meter.add(sums(loss=8.0, top1=0.0, top5=4.0, images=4.0, grad_norm=1.0))
    meter.reduce()
    assert meter.end_epoch() == {
        "train/loss": 24 / 20,
        "train/top1_pct": 40.0,
        "train/top5_pct": 100.0,
        "perf/train_min": 1.0,
        "perf/epoch_s": 2.0,
        "perf/images_per_s": 2.0,
    }


def test_two_ranks(clock: Clock) -> None:
    """Images and hits add up, waits are averaged, the gradient's norm is everybody's, one who stops stops all."""
    meter = Meter(TwoRanks(torch.device("cpu"), rank=0, world=2, cores=1), [], CLASSES)

    def batches() -> Iterator[int]:
        for number in range(2):
            clock.now += 0.5
            yield number

    for _ in meter.waiting(batches()):
        clock.now += 1.5
        meter.add(sums(loss=4.0, top1=1.0, top5=2.0, images=4.0, grad_norm=3.0))
    scalars, (stop,) = meter.reduce(False)
    assert stop
    assert scalars["train/grad_norm"] == 3.0
    assert scalars["perf/images_per_s"] == 16 / 4
    assert scalars["train/top1_pct"] == 25.0
    assert scalars["perf/data_wait_pct"] == 100 * (1 + 2) / 2 / 4
    assert meter.rank_times == [(0.5, 1.5, 0.0, 4.0), (1.0, 1.0, 0.0, 4.0)]
    assert meter.epoch_sums == [16.0, 4.0, 8.0, 16.0, 6.0]


def test_nothing_counted(clock: Clock) -> None:
    """No steps since the last time, or none with a readable image: no scores rather than a division by zero."""
    meter = Meter(SOLO, [], CLASSES)
    clock.now += 1
    assert meter.reduce(True, 3) == ({}, [1.0, 3.0])
    clock.now += 1
    meter.add(sums(0.0, 0.0, 0.0, 0.0, 0.0))
    scalars, _ = meter.reduce()
    assert scalars.keys() == {
        "perf/host_mem_gib",
        "train/grad_norm",
        "perf/images_per_s",
        "perf/data_wait_pct",
        "perf/step_ms_p50",
        "perf/step_ms_p95",
        "perf/train_min",
    }
    assert meter.end_epoch() == {}
