"""The check of a cluster: what is asked of SLURM, and what is said of its nodes. On a real one in end_to_end/test_slurm.py."""

from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from launch.slurm.check_nodes import main, node_lines, rank_lines, results_of, speed_lines
from trainer.check.results import FAIL, PASS, Result, write


def result(item: str, state: str = PASS, told: str = "", figures: dict[str, float] | None = None) -> Result:
    return Result(item, state, told, 1.0, figures or {})


def test_what_is_asked_of_slurm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    main(["--profile", "dev", "--nodes", "3", "--account", "it's", "--dry_run", "--", "--only", "worlds"])
    asked = "--job-name=sluice-check --nodes=3 --ntasks-per-node=2 --time=60 --partition=low '--account=it'\"'\"'s'"
    assert capsys.readouterr().out == f"salloc {asked}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "HERE"], r"--out: HERE exists; give another folder"),
        (["--", "--out=x"], r"--out: it is behind --; put it before"),
        (["--nope"], r"--nope: no such option of a job; see python -m launch check-nodes --help, .*"),
        ([], r"no salloc here: .*"),
    ],
)
def test_mistakes(arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{told.replace('HERE', str(tmp_path))}$"):
        main([one.replace("HERE", str(tmp_path)) for one in arguments])


def test_each_node_is_counted_and_its_failures_named(tmp_path: Path) -> None:
    write(tmp_path / "a", {}, [result("worlds"), result("capture", FAIL, "bits")])
    found = {node: results_of(tmp_path / node) for node in ("a", "b")}
    assert list(node_lines(found)) == [
        "a: 1 pass, 1 FAIL, 0 skipped",
        "FAIL b has written no check",
        "FAIL a, capture: bits",
    ]


@pytest.mark.parametrize(
    ("speeds", "told"),
    [
        ({"a": 100.0, "b": 98.0, "c": 101.0}, ["slowest node, within the usual: b, 98% of the others in loader"]),
        ({"a": 100.0, "b": 50.0, "c": 100.0}, ["slow node: b, 50% of the others in loader"]),
        ({"a": 100.0, "b": 50.0, "c": 60.0, "d": 90.0, "e": 95.0}, [
            "slow node: b, 54% of the others in loader",
            "slow node: c, 65% of the others in loader",
        ]),
        ({"a": 100.0}, []),
    ],
)  # fmt: skip
def test_the_slow_nodes_are_named(speeds: dict[str, float], told: list[str]) -> None:
    found = {
        node: [result("loader speed", figures={"loader, images/s": speed, "other, GB/s": 1.0})]
        for node, speed in speeds.items()
    }
    assert list(speed_lines(found)) == told


def test_ranks_are_listed() -> None:
    place = {"rank": 0, "node": "a", "device": "H200", "uuid": "GPU-1", "cores": 8}
    pairs = [{"ranks": [0, 1], "nodes": ["a", "b"], "gb_s": 2.0}]
    report = {"places": [place, {**place, "rank": 1}], "megabytes": 10.0, "together_gb_s": 3.0, "pairs": pairs}
    assert list(rank_lines(report)) == [
        "FAIL ranks 0, 1 share GPU-1 on a",
        "rank 0: a, H200 GPU-1",
        "rank 1: a, H200 GPU-1",
        "all-reduce of 10 MB by 2 ranks: 3.00 GB/s",
        "slowest pair: ranks 0 and 1 on a and b, 2.00 GB/s (median 2.00)",
    ]
    assert list(rank_lines(None)) == ["FAIL the ranks have not found together"]
