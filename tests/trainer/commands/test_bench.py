"""Measurements of the benchmark, their order and report, and the command on one process and on two."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from data_pipeline.bench.budget import rounds_within
from data_pipeline.common.errors import UserError
from tests.conftest import picture
from tests.support.runs import SOLO, Job, descendants, dotted, state_of
from tests.trainer.tracking.test_tracker import inspect
from trainer.bench import cli as bench
from trainer.bench import results, worlds
from trainer.bench import turns as measured
from trainer.bench.__main__ import main
from trainer.bench.peers import CONTESTANTS, PLAIN_LOOP, PLAIN_STEP
from trainer.bench.results import BOTH, COMPUTE, DECODE, JOINED, LOADER, MATMUL, REDUCE
from trainer.config import Config, load

BATCH = 8


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a recipe that grows to 32 px in two epochs, for 70 images of two classes, and two to validate on."""
    root = tmp_path_factory.mktemp("some images")
    for number in range(72):
        path = root / f"{'train' if number < 70 else 'val'}/{number % 2}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(40, 50, seed=number).save(path)
    settings = {"data.path": str(root), "data.batch": str(BATCH), "data.size_px": "[16,32]", "run.epochs": "2"}
    return dotted({**settings, "tracking.wandb": "off"})


def frame(rates: dict[str, list[float]], world: int = 1, repeat: int = 0) -> pd.DataFrame:
    """Turns as `measure` gives them, from each part's rate in each round."""
    rows = [(world, number, part, rate) for part, values in rates.items() for number, rate in enumerate(values)]
    return pd.DataFrame(rows, columns=["world", "round", "part", "rate"]).assign(repeat=repeat)


def fact(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "world": 1,
        "cores": 2,
        "gpu": None,
        "size_px": 32,
        "batch": 10,
        "precision": "bf16",
        "best_precision": "bf16",
        "flops_per_image": 1e9,
        "gradient_bytes": 4_000_000,
        "left_out": [],
        "steps": 8,
        "asked": [1, 8, 5],
    }
    return plain | changes


# ---- the measurement ------------------------------------------------------------------------------------------------


def test_one_process_measures_its_parts_in_turn(options: list[str], tmp_path: Path) -> None:
    cfg = load([*options, "--optim.accumulate", "2"])
    taken = measured.Measured()
    bench.measure(cfg, SOLO, taken, rounds=2, steps=1, profile=tmp_path / "traces")
    rows, facts = taken.rows, taken.facts[1]
    parts = [LOADER, COMPUTE, BOTH, MATMUL, DECODE]
    assert [(row["round"], row["part"]) for row in rows] == [(number, part) for number in (0, 1) for part in parts]
    assert all(row["world"] == 1 and row["rate"] > 0 for row in rows)
    assert (facts["size_px"], facts["batch"], facts["cores"], facts["left_out"]) == (32, BATCH, 1, [])
    weights = 11_689_512 - 1000 * 513 + 2 * 513  # ResNet-18 of He et al., with two classes for its thousand
    assert facts["gradient_bytes"] == 4 * weights
    assert (tmp_path / "traces/rank0-1-3.pt.trace.json.gz").stat().st_size > 1000
    json.dumps(facts)


def test_steps_that_do_not_count_are_taken_before_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each call moves on by 2 s: 5 calls of 3 images take 10 s."""
    now = [0.0]

    def act() -> float:
        now[0] += 2
        return 3.0

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert measured.timed(SOLO, act, calls=5, skipped=4) == (1.5, 2)
    assert now[0] == 18


def test_the_images_of_an_update_are_counted(options: list[str]) -> None:
    """70 images in batches of 8: each epoch ends with 6."""
    cfg = load([*options, "--optim.accumulate", "2"])
    ours = measured.Ours(cfg, bench.open_catalog(cfg.data, "train"), SOLO)  # which takes the first update
    assert [ours.update() for _ in range(9)] == [8, 8, 8, 8, 8, 8, 8, 6, 8]
    assert [ours._load() for _ in range(8)] == [8, 8, 8, 8, 8, 8, 8, 6]
    before = {name: tensor.clone() for name, tensor in ours.engine.module.state_dict().items()}
    assert ours._compute(ours.engine) == 8
    assert any(not torch.equal(before[name], tensor) for name, tensor in ours.engine.module.state_dict().items())


def test_images_that_are_no_jpegs_are_measured_without_bare_decoding(tmp_path: Path) -> None:
    for number in range(16):
        path = tmp_path / f"train/{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(20, 20, seed=number).save(path)
    cfg = load(dotted({"data.path": str(tmp_path), "data.batch": "8", "data.size_px": "32"}))
    taken = measured.Measured()
    bench.measure(cfg, SOLO, taken, rounds=1, steps=1, peers=True)
    rows, facts = taken.rows, taken.facts[1]
    assert [row["part"] for row in rows] == [LOADER, COMPUTE, BOTH, MATMUL]
    assert re.match(rf"{DECODE}, peers: data\.path: .* has 0 JPEGs", facts["left_out"][0])
    turns = pd.DataFrame(rows)
    assert f"left out: {DECODE}, peers" in results.report(turns, {1: facts}, cfg)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round() -> None:
    turns = frame({BOTH: [1, 4, 9], COMPUTE: [2, 4, 3]})
    assert results.ratios(turns, 1, BOTH, COMPUTE).to_list() == [0.5, 1, 3]
    assert results.summary(turns).to_dict("records") == [
        {"world": 1, "part": BOTH, "median": 4, "min": 1, "max": 9},
        {"world": 1, "part": COMPUTE, "median": 3, "min": 2, "max": 4},
    ]


def test_scaling_compares_repeat_by_repeat() -> None:
    """By hand: medians of (100, 150), (50, 60), (80, 160) for one process and two."""
    one, two = [[90.0, 100, 110], [50.0], [80.0]], [[150.0, 160, 10], [60.0], [160.0]]
    frames = [
        frame({BOTH: rates}, world, repeat)
        for world, repeats in ((1, one), (2, two))
        for repeat, rates in enumerate(repeats)
    ]
    scaled = results.scaling(pd.concat(frames))
    assert scaled[1].to_list() == [1, 1, 1]
    assert scaled[2].to_list() == [1.5, 1.2, 2.0]


def test_the_report_by_hand() -> None:
    """1e9 FLOPs an image: 100 images/s are 10 % of 1e12 FLOP/s. Ten images in 0.1 s alone, 0.125 s with communication."""
    rates = {
        LOADER: [500.0],
        COMPUTE: [100.0],
        JOINED: [80.0],
        BOTH: [60.0],
        PLAIN_STEP: [50.0],
        PLAIN_LOOP: [40.0],
        MATMUL: [1e12],
        DECODE: [1000.0],
        REDUCE: [4e8],
    }
    one = frame({part: rates[part] for part in (LOADER, COMPUTE, BOTH, MATMUL, DECODE)})
    turns = pd.concat([one, frame(rates, world=2)])
    left_out = ["timm: timm is not installed; pip install timm"]
    text = results.report(turns, {1: fact(), 2: fact(world=2, cores=1, left_out=left_out)}, Config())
    first, second, last = text.split("\n\n")[0], text.split("\n\n")[1], text.splitlines()[-1]
    assert first.startswith("resnet18, 32 px, batch 10, bf16; 1 process x 2 cores\n")
    assert second.startswith("resnet18, 32 px, batch 10, bf16; 2 processes x 1 core\n")
    assert re.search(rf"{LOADER} +500\.0 \(500\.0 to 500\.0\) images/s +50% of {DECODE}\n", second)
    assert re.search(rf" {COMPUTE} +100\.0 .* images/s +10% of {MATMUL}\n", second)
    assert re.search(rf"{MATMUL} +1000\.0 .* GFLOP/s *\n", second)
    assert re.search(rf"{REDUCE} +400\.0 .* MB/s *\n", second)
    assert "end to end / compute: 0.600 (0.600 to 0.600)" in first and JOINED not in first
    assert "end to end / compute: 0.750 (0.750 to 0.750)" in second
    assert "with / without communication: 0.800 (0.800 to 0.800)" in second
    assert "25.0 ms of a step of 125.0 ms are exposed; alone, 4.0 MB take 10.0 ms" in second
    assert f"ours / {PLAIN_STEP}: 2.00 (2.00 to 2.00)" in second  # the compute, 100 / 50
    assert f"ours / {PLAIN_LOOP}: 1.50 (1.50 to 1.50)" in second  # all of it, 60 / 40
    assert f"left out: {left_out[0]}" in second
    assert "A share of the machine holds this run back: alone the loader delivers 500 images/s" in second
    assert last == "2 processes x 1 core / 1 process x 2 cores, end to end: 1.000 (1.000 to 1.000), efficiency 100%"


def test_a_busy_machine_is_named_and_no_advice_given() -> None:
    calm = {LOADER: [500.0] * 3, COMPUTE: [100.0, 110.0, 149.0], BOTH: [90.0] * 3, MATMUL: [1e12] * 3}
    told = results.report(frame(calm), {1: fact()}, Config())
    assert "busy" not in told and "holds this run back" in told
    restless = results.report(frame({**calm, COMPUTE: [100.0, 110.0, 160.0]}), {1: fact()}, Config())
    assert restless.endswith(
        "other work kept the machine busy: compute alone varied by a factor of 1.6, too much to say what holds this run "
        "back; measure again"
    )


@pytest.mark.parametrize("count", range(1, 7))
def test_whatever_was_measured_has_a_report(count: int, tmp_path: Path) -> None:
    """Broken off within its first round, after any of its parts."""
    parts = [LOADER, COMPUTE, JOINED, BOTH, PLAIN_STEP, MATMUL][:count]
    turns = frame({part: [100.0] for part in parts}, world=2)
    text = results.report(turns, {2: fact(world=2)}, Config())
    assert all(re.search(rf"^ *{re.escape(part)} +[\d.]+ \(", text, re.MULTILINE) for part in parts)
    assert ("is not known without" in text) == (count < 6)
    results.write(turns, {2: fact(world=2)}, Config(), tmp_path)
    assert len(pd.read_csv(tmp_path / "bench.csv")) == count


def test_what_was_shortened_is_said() -> None:
    turns = frame({LOADER: [1.0, 1.0], COMPUTE: [1.0, 1.0], BOTH: [1.0, 1.0], MATMUL: [1.0, 1.0]})
    whole = results.report(turns, {1: fact(asked=[2, 8, 5])}, Config())
    assert "medians and ranges of 2 interleaved rounds of 8 steps\n" in whole
    short = results.report(turns, {1: fact(asked=[9, 8, 0.5], steps=1)}, Config())
    assert "2 interleaved rounds of 1 step; asked for were 9 rounds of 8 steps, in at most 0.5 minutes" in short
    assert short.endswith("turns of 1 step are too short to say what holds this run back")


@pytest.mark.parametrize(
    ("left_s", "rounds", "steps"),
    [
        (1000, 9, 8),  # a round of 8 steps takes 2 * (4 + 8) + 1 + 8 = 33 s
        (300, 9, 8),
        (270, 8, 8),
        (60, 3, 3),  # three rounds of 2 * (4 + 3) + 1 + 3 = 18 s
        (30, 2, 1),
        (1, 1, 1),
        (-5, 1, 1),
    ],
)
def test_rounds_and_steps_fit_into_the_time(left_s: float, rounds: int, steps: int) -> None:
    turns = {
        BOTH: measured.Turn(lambda *_: measured.Timed(1, 2), skipped=4),
        COMPUTE: measured.Turn(lambda *_: measured.Timed(1, 1)),
    }
    assert bench.fit_into(left_s, turns, {BOTH: 2.0, COMPUTE: 1.0}, 9, 8) == (rounds, steps)


def test_rounds_end_before_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock: rounds of 10, 20 and 10 s; in 55 s a fourth could take as long as the second."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    seen = []
    for number in rounds_within(9, 55):
        now[0] += (10, 20, 10, 10)[number]
        seen.append(number)
    assert seen == [0, 1, 2]
    assert list(rounds_within(9, 0)) == [0], "one in any case"
    assert list(rounds_within(3, 99)) == [0, 1, 2]


# ---- the command ----------------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    main()


@pytest.mark.slow
def test_two_processes_with_peers(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (bench, worlds):
        monkeypatch.setattr(module, "REPEATS", 1)
    out = tmp_path / "a new/folder"
    call(monkeypatch, *options, "--worlds", "2", "--rounds", "1", "--peers", "--out", str(out))
    turns = pd.read_csv(out / "bench.csv")
    assert (turns.world == 2).all() and not turns.part.duplicated().any()
    assert {LOADER, COMPUTE, JOINED, BOTH, PLAIN_STEP, PLAIN_LOOP, MATMUL, DECODE, REDUCE} <= set(turns.part)
    written = json.loads((out / "bench.json").read_text())
    assert written["rounds"] == turns.to_dict("records")
    assert written["medians"]["2"] == turns.set_index("part").rate.to_dict()
    assert written["config"]["data"]["size_px"] == [16, 32]
    assert written["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "-m trainer.bench" in written["command"] and "--worlds 2" in written["command"]
    (one,) = written["facts"]
    assert len(CONTESTANTS.keys() & set(turns.part)) + len(one["left_out"]) == len(CONTESTANTS)
    said = capsys.readouterr().out
    assert said.count("holds this run back") == 1 and f"ours / {PLAIN_LOOP}: " in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("worn out"),
        pytest.param(KeyboardInterrupt(), marks=pytest.mark.slow),
        pytest.param(SystemExit(143), marks=pytest.mark.slow),
    ],
)
def test_what_was_measured_is_kept_when_it_is_broken_off(
    error: BaseException,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the second of three rounds, in a later part than the first."""
    calls = iter(range(99))  # two in the round that does not count, nine in each that does

    def act() -> float:
        if next(calls) == 2 + 9:
            raise error
        return 1e9

    monkeypatch.setattr(bench.roofline, "matmul", lambda *_: act)
    with pytest.raises(type(error)):
        call(monkeypatch, *options, "--rounds", "3", "--out", str(tmp_path / "out"))
    turns = pd.read_csv(tmp_path / "out/bench.csv")
    assert turns.groupby("round").part.agg(list).to_list() == [
        [LOADER, COMPUTE, BOTH, MATMUL, DECODE],
        [LOADER, COMPUTE, BOTH],
    ]
    said = capsys.readouterr().out
    assert f"{BOTH} " in said and f"broken off by {type(error).__name__}; what was measured" in said


def test_of_several_numbers_of_processes_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second of the processes is broken off after it wrote what it had."""
    calls = []

    def start(world: int, options: list[str]) -> None:
        calls.append(options)
        turns = frame({LOADER: [1.0] * len(calls)}, world)
        results.write(turns, {world: fact(world=world)}, Config(), Path(options[-1]))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(worlds, "_torchrun", start)
    taken = measured.Measured()
    with pytest.raises(KeyboardInterrupt):
        worlds.measure_worlds([1, 2], ["--rounds", "1"], 6, taken)
    assert [(row["world"], row["round"]) for row in taken.rows] == [(1, 0), (2, 0), (2, 1)]
    assert [option[:4] for option in calls] == [
        ["--rounds", "1", "--minutes", minutes] for minutes in ("1.00", "1.20")
    ], "a sixth of the time, and a fifth of what is left"


def test_several_numbers_of_processes_are_drawn(tmp_path: Path) -> None:
    rates = {LOADER: [900.0], COMPUTE: [100.0, 110.0], BOTH: [90.0, 100.0], MATMUL: [1e12]}
    turns = pd.concat([frame(rates), frame({**rates, JOINED: [99.0], REDUCE: [1e9]}, world=2)])
    results.write(turns, {1: fact(), 2: fact(world=2)}, Config(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"bench.csv", "bench.json"}
    with Image.open(tmp_path / "scaling.png") as plot:
        assert plot.format == "PNG" and plot.width > 600
        assert len(plot.convert("RGB").getcolors(1 << 24) or ()) > 4


def test_medians_are_logged_to_wandb(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = load([*options, "--tracking.wandb", "auto"])
    results.log_to_wandb(frame({BOTH: [1.0, 2.0, 4.0], COMPUTE: [3.0]}), cfg, tmp_path)
    (segment,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (row,) = [record["history"]["item"] for record in inspect(segment) if record["type"] == "history"]
    assert (row["bench/1/end_to_end_per_s"], row["bench/1/compute_per_s"]) == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worlds", "2,2"], "--worlds: 2,2 does not fit"),
        (["--worlds", "0"], "--worlds: 0 does not fit"),
        (["--worlds", "two"], "--worlds: two does not fit"),
        (["--worlds", "1", "--profile", "x"], "--worlds: no trace is made"),
        (["--rounds", "0"], "--rounds: 0 is not positive"),
        (["--rounds", "many"], "--rounds: invalid int value: 'many'"),
        (["--minutes", "0"], "--minutes: 0 is not positive"),
        (["--wandb"], "--wandb: W&B keeps files"),
        (["--wandb", "--out", "x"], "--wandb: tracking.wandb is off"),
        (["--outt", "x"], "--outt: no such option"),
    ],
)
def test_mistakes_are_found_at_once(
    options: list[str], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        call(monkeypatch, *options, *arguments)


@pytest.mark.parametrize("name", ["bench.csv", "bench.json", "scaling.png"])
def test_nothing_is_overwritten(options: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=f"^--out: {re.escape(str(tmp_path / name))} exists; give another folder"):
        call(monkeypatch, *options, "--out", str(tmp_path))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


def test_worlds_are_not_for_torchrun(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^--worlds: it starts the processes itself; call it without torchrun"):
        call(monkeypatch, *options, "--worlds", "1,2")


def test_a_mistake_that_only_the_processes_find_is_told(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^data\.batch: 8 images cannot be shared"):
        call(monkeypatch, *options, "--worlds", "1", "--optim.accumulate", "3")


@pytest.mark.parametrize("of_torchrun", [False, True])
def test_whoever_ends_it_ends_what_it_has_started(options: list[str], tmp_path: Path, of_torchrun: bool) -> None:
    """Also where torchrun cannot end its worker: one that is killed, or gets a signal before it knows of the worker."""
    job = Job(1, tmp_path / "log", "trainer.bench", *options, "--worlds", "1", "--rounds", "999")
    try:
        while len(family := list(descendants(job.process.pid))) < 2:  # torchrun and its worker
            assert job.process.poll() is None, job.output()
            time.sleep(0.01)
        os.kill(family[0], signal.SIGKILL) if of_torchrun else job.process.terminate()
        assert job.process.wait(60) == (2 if of_torchrun else 143)
        assert all(state_of(pid) in "ZX" for pid in family)
        assert not of_torchrun or "error: --worlds: 1 process ended with exit code -9" in job.output()
    finally:
        job.kill()
