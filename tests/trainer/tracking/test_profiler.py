"""Traces of chosen updates: real ones, read back."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from data_pipeline.common.errors import UserError
from tests.support.runs import SOLO
from trainer.run_config import chosen_steps
from trainer.tracking.profiler import Trace

RANGES = ("data", "forward", "backward", "update")


def train(trace: Trace, first: int, last: int) -> None:
    """The updates from `first` to `last`, each with all ranges and a mark of its number."""
    layer = torch.nn.Linear(4, 4)
    for number in range(first, last + 1):
        with record_function("data"):
            rows = torch.ones(2, 4)
        with record_function("forward"):
            loss = layer(rows).sum()
        with record_function("backward"):
            loss.backward()
        with record_function("update"), record_function(f"mark {number}"):
            layer.weight.data.sub_(0.1)
        trace.step(number)


def events(path: Path) -> list[dict[str, Any]]:
    """The complete events ("X" in the format of Chrome's traces) of a file."""
    with gzip.open(path) as file:
        return [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]


def named(path: Path, prefix: str) -> list[str]:
    return sorted(event["name"] for event in events(path) if event["name"].startswith(prefix))


def test_only_the_chosen_updates_are_in_the_trace_with_their_ranges(tmp_path: Path) -> None:
    folder = tmp_path / "a new/folder"
    with Trace(range(3, 5), folder, SOLO) as trace:
        train(trace, 1, 6)
    assert [path.name for path in folder.iterdir()] == ["rank0-3-4.pt.trace.json.gz"]
    (path,) = folder.iterdir()
    assert named(path, "step ") == ["step 3", "step 4"] and named(path, "mark ") == ["mark 3", "mark 4"]
    assert named(path, "aten::linear") == ["aten::linear"] * 2
    steps = {event["name"]: event for event in events(path) if event["name"].startswith("step ")}
    for name in RANGES:
        parts = [event for event in events(path) if event["name"] == name]
        assert len(parts) == 2
        for part, step in zip(parts, (steps["step 3"], steps["step 4"]), strict=True):
            assert step["ts"] <= part["ts"] and part["ts"] + part["dur"] <= step["ts"] + step["dur"]


def test_the_first_update_can_be_chosen(tmp_path: Path) -> None:
    with Trace(range(1, 2), tmp_path, SOLO) as trace:
        train(trace, 1, 3)
    assert named(tmp_path / "rank0-1.pt.trace.json.gz", "mark ") == ["mark 1"]


def test_a_resumed_run_keeps_what_is_there_and_adds_what_is_not(tmp_path: Path) -> None:
    with Trace(range(3, 6), tmp_path, SOLO) as trace:
        train(trace, 1, 4)  # and then it was told to stop
    path = tmp_path / "rank0-3-4.pt.trace.json.gz"
    assert named(path, "mark ") == ["mark 3", "mark 4"]
    before = path.read_bytes()
    with Trace(range(3, 6), tmp_path, SOLO, done=4) as trace:
        train(trace, 5, 7)
    assert named(tmp_path / "rank0-5.pt.trace.json.gz", "mark ") == ["mark 5"]
    with Trace(range(3, 5), tmp_path, SOLO) as trace:
        train(trace, 1, 5)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_nothing_is_written_where_no_update_is_reached(tmp_path: Path) -> None:
    for steps, done, last in ((range(0), 0, 3), (range(5, 7), 0, 3), (range(1, 3), 2, 4), (range(1, 4), 0, 0)):
        with Trace(steps, tmp_path, SOLO, done=done) as trace:
            train(trace, done + 1, last)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_run_leaves_the_updates_before(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Trace(range(1, 10), tmp_path, SOLO) as trace:
        train(trace, 1, 2)
        with record_function("data"):
            1 / 0  # noqa: B018
    assert named(tmp_path / "rank0-1-2.pt.trace.json.gz", "mark ") == ["mark 1", "mark 2"]


def test_a_disk_that_takes_no_trace_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").touch()
    with Trace(range(1, 2), tmp_path / "profile", SOLO) as trace:
        train(trace, 1, 2)
    line = f"no profile is written: {tmp_path / 'profile'}: File exists\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(("text", "steps"), [("10-12", [10, 11, 12]), ("7", [7]), ("3-3", [3])])
def test_updates_are_counted_from_one_with_both_ends(text: str, steps: list[int]) -> None:
    assert list(chosen_steps(text)) == steps


@pytest.mark.parametrize("text", ["", "0", "0-3", "5-4", "-3", "3-", "1,2", "ten", "1.5", "3-4-5"])
def test_other_texts_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^run\.profile: .* names no steps"):
        chosen_steps(text)
