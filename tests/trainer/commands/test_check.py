"""The check of a machine: every item passes here, or says what is missing; and one that crashes or hangs is told."""

import json
import os
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import UserError
from tests.support import warm
from tests.support.runs import free_port
from trainer.check import cli, names, rank_report, ranks
from trainer.check.items import common, training, whole_runs
from trainer.check.names import ITEMS, find
from trainer.check.results import FAIL, PASS, SKIPPED, Result, Skip
from trainer.distributed import gpu_count

TINY = common.Scale(batch=4, size_px=32, width=0.125, images=32, steps=1, values=100_000, compiles=False)
SLOW = {"ranks and devices", "all-reduce", "ranks train", "kill and resume", "networks and losses"}
"""Items that start processes of their own, each of which imports torch, or that make many networks."""
ON_GPUS = {"fit memory"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ITEMS])
def test_an_item(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "SCALE", TINY)
    monkeypatch.setattr(training, "WARM", 1)
    monkeypatch.setattr(whole_runs, "PROFILED", range(3, 5))
    if name in ON_GPUS and not gpu_count():
        with pytest.raises(Skip):
            find(name)()
    else:
        assert find(name)().told


def test_no_function_is_left_out() -> None:
    """Each public function without arguments that returns what it has found is an item."""
    for module in {item.module for item in ITEMS.values()}:
        source = Path(common.__file__).with_name(f"{module}.py").read_text()
        there = set(re.findall(r"^def ([a-z]\w*)\(\) -> Found:", source, re.M))
        assert there == {re.sub(r"\W", "_", name) for name, item in ITEMS.items() if item.module == module}


def test_what_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "SCALE", TINY)
    import torch

    value = torch.ones(3)
    with training.Waits(on_host=[]) as waits:
        float(value.sum())
        bool(torch.equal(value, value))
    assert waits.seen == {"_local_scalar_dense": 1, "equal": 1}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "warning\n[rank1]: ValueError: no\n[rank0]: OSError: yes\nE1129 torch: failed (exitcode: 1)\n",
            "ValueError: no",
        ),
        ("error: data.path: nope\n", "error: data.path: nope"),
        ("Killed\n\n", "Killed"),
        ("", "it said nothing"),
    ],
)
def test_the_error_is_found_in_what_torchrun_says(said: str, told: str) -> None:
    assert common.complaint(said) == told


def test_a_package_that_a_process_misses_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("import nowhere.at_all")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ModuleNotFoundError) as missing:
        common.run_module("broken")
    assert missing.value.name == "nowhere"


def _join(rank: int, file: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["SLURMD_NODENAME"] = f"node{rank // 2}"
    ranks.main(file, "1000")


def test_ranks_tell_where_they_are_and_measure_each_pair(tmp_path: Path) -> None:
    """Three, two of which are on a node as SLURM names it: within the node, and the first of each node."""
    warm.start_ranks(_join, (str(tmp_path / "ranks.json"), free_port()), 3)
    report = json.loads((tmp_path / "ranks.json").read_text())
    assert [(one["rank"], one["node"], one["device"]) for one in report["places"]] == [
        (0, "node0", "cpu"),
        (1, "node0", "cpu"),
        (2, "node1", "cpu"),
    ]
    assert [pair["ranks"] for pair in report["pairs"]] == [[0, 1], [0, 2]] and report["together_gb_s"] > 0
    assert all(pair["gb_s"] > 0 for pair in report["pairs"])


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_rank_meets_each_other_once(count: int) -> None:
    played = list(ranks.rounds(range(count)))
    assert sorted(pair for pairs in played for pair in pairs) == list(combinations(range(count), 2))
    for pairs in played:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs), "a rank is in two pairs at once"


def test_the_slowest_pair_is_named() -> None:
    pairs = [{"ranks": [0, n], "nodes": ["a", "ab"[n > 1]], "gb_s": 10.0 / n} for n in (1, 2, 3)]
    assert (
        rank_report.slowest_pair({"pairs": pairs}) == "slowest pair: ranks 0 and 3 on a and b, 3.33 GB/s (median 5.00)"
    )
    assert rank_report.slowest_pair({"pairs": []}) == ""


def test_ranks_that_share_a_gpu_are_named() -> None:
    def at(rank: int, uuid: str, node: str = "a") -> dict[str, Any]:
        return {"rank": rank, "node": node, "uuid": uuid}

    assert rank_report.shared_gpus([at(0, "x"), at(1, "y"), at(2, "x", "b"), at(3, ""), at(4, "")]) == []
    assert rank_report.shared_gpus([at(0, "x"), at(1, "y"), at(2, "x")]) == ["ranks 0, 2 share x on a"]


@pytest.mark.parametrize(
    ("kernels", "idle"), [([(0, 10)], 0.0), ([(0, 4), (2, 4), (8, 2)], 0.2), ([(0, 9), (1, 2)], 0.0)]
)
def test_idle_share(kernels: list[tuple[float, float]], idle: float) -> None:
    assert whole_runs.idle_share([{"ts": ts, "dur": dur} for ts, dur in kernels]) == pytest.approx(idle)


@pytest.mark.parametrize(
    ("program", "state", "told"),
    [
        ("kill -SEGV $$", FAIL, "signal SIGSEGV: it said nothing"),
        ("echo warning; echo the last words; exit 3", FAIL, "exit code 3: the last words"),
        ("sleep 60", FAIL, "it took longer than 0.5 s"),
        ("""echo 'check-result: ["skipped", "no", {}]'; exit 1""", SKIPPED, "no"),
    ],
)
def test_a_crash_and_a_hang_are_findings(
    program: str, state: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{program}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    found = cli.run_item("worlds", limit_s=0.5)
    assert (found.state, found.told) == (state, told)


@pytest.mark.parametrize(
    ("error", "state", "told"),
    [
        (
            ModuleNotFoundError("No module named 'nvidia.dali'", name="nvidia.dali"),
            SKIPPED,
            "nvidia.dali is not installed",
        ),
        (ModuleNotFoundError("No module named 'trainer.x'", name="trainer.x"), FAIL, "No module named 'trainer.x'"),
        (ImportError("libnvjpeg.so: not found"), FAIL, "ImportError: libnvjpeg.so: not found"),
        (AssertionError("a\nb"), FAIL, "AssertionError: a b"),
    ],
)
def test_a_missing_package_is_no_failure(
    error: Exception, state: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: str) -> None:
        raise error

    monkeypatch.setattr(cli, "find", missing)
    monkeypatch.setattr(sys, "argv", ["", "--item", "worlds"])
    cli.main()
    assert capsys.readouterr().out == f"\ncheck-result: {json.dumps([state, told, {}])}\n"


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "worlds": Result("worlds", PASS, "the same", 1.0, {"images/s": 5.0}),
        "capture": Result("capture", FAIL, "a | b", 2.0),
    }
    monkeypatch.setattr(cli, "run_item", lambda name, _: found[name])
    monkeypatch.setattr(sys, "argv", ["", "--only", "worlds", "capture", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and "1 of 2 failed: capture" in capsys.readouterr().err
    saved = json.loads((tmp_path / "out/check.json").read_text())
    assert [result["state"] for result in saved["results"]] == [PASS, FAIL] and "torch" in saved["about"]
    assert saved["results"][0]["figures"] == {"images/s": 5.0}
    assert "| capture | FAIL | a / b | 2.0 |" in (tmp_path / "out/check.md").read_text()
    with pytest.raises(UserError, match=r"^--out: .* holds a check already; give another folder$"):
        cli.main()


def test_an_unknown_item_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--only", "nope"])
    with pytest.raises(UserError, match=r"^--only: there is no item nope; choose from ranks and devices, "):
        cli.main()


def test_each_item_has_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def run_item(name: str, limit_s: float) -> Result:
        given.append(limit_s)
        return Result(name, PASS, "", 0.0)

    monkeypatch.setattr(cli, "run_item", run_item)
    for more in ([], ["--limit_s", "5"]):
        monkeypatch.setattr(sys, "argv", ["", "--only", "step speed", "worlds", *more])
        cli.main()
    assert given == [names.ITEMS["worlds"].limit_s, 600.0, 5.0, 5.0]
