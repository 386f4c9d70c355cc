"""The comparison of loaders: all of them run, in turns, on a small sample; what is counted; what is written."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from data_pipeline.bench import cli as bench
from data_pipeline.bench import peers, results
from data_pipeline.bench import runner as processes
from data_pipeline.bench.__main__ import main
from data_pipeline.bench.options import sizes_of
from data_pipeline.bench.sources import SOURCES
from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from tests.conftest import encode, picture

IMAGES = 80


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of JPEGs and a PNG that the comparison cannot use."""
    root = tmp_path_factory.mktemp("some images")
    for number in range(IMAGES):
        path = root / f"train/a class {number % 2}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(40 + number % 7, 50, seed=number).save(path)
    (root / "train/a class 0/other.png").write_bytes(encode(picture(40, 50), "PNG"))
    return root


@pytest.fixture(scope="module")
def turns(images: Path) -> pd.DataFrame:
    rows: list[results.Row] = []
    bench.measure(DataConfig(path=str(images)), [24], rows, rounds=2, images=2 * peers.BATCH)
    return results.turns_of(rows)


def test_every_loader_delivers_what_is_asked_of_it(turns: pd.DataFrame) -> None:
    installed = [
        name
        for name, contestant in peers.CONTESTANTS.items()
        if not contestant.needs or importlib.util.find_spec(contestant.needs)
    ]
    assert turns.groupby("round").loader.agg(list).to_list() == [installed, installed]
    # Ours counts no padding, so its batches are not all of the same size.
    assert turns.images.between(2 * peers.BATCH, 3 * peers.BATCH, inclusive="left").all()
    assert (turns.size_px == 24).all() and (turns.wall_s > 0).all() and (turns.cpu_s > 0).all()


@pytest.mark.slow
def test_our_loader_delivers_from_every_source(images: Path) -> None:
    rows: list[results.Row] = []
    bench.measure(DataConfig(path=str(images)), [24], rows, rounds=1, images=peers.BATCH, sources=True)
    turns = results.turns_of(rows)
    installed = [name for name, source in SOURCES.items() if not source.needs or importlib.util.find_spec(source.needs)]
    assert turns.loader.to_list() == installed
    assert (turns.cpu_s > 0).all() and "CPU over class folders" in results.table(results.summary(turns))


def test_what_is_written(turns: pd.DataFrame, tmp_path: Path) -> None:
    results.write(turns, tmp_path / "new/folder")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "new/folder/bench.csv"), turns.reset_index(drop=True), check_dtype=False
    )
    lines = results.table(results.summary(turns)).splitlines()
    assert len(lines) == 1 + turns.loader.nunique() and len({len(line) for line in lines}) == 1
    with Image.open(tmp_path / "new/folder/bench.png") as plot:
        assert plot.format == "PNG" and plot.width > 800
        assert len(plot.convert("RGB").getcolors(1 << 24) or ()) > turns.loader.nunique()


def test_the_summary_compares_round_by_round() -> None:
    """By hand: the ratios 2, 1 and 3 have the median 2, though the medians 4 and 2 have moved in between."""
    rows = [(64, peers.OURS, cpu_ms, 100.0, n) for n, cpu_ms in enumerate((1.0, 2.0, 4.0))]
    rows += [(64, "other", cpu_ms, 50.0 + n, n) for n, cpu_ms in enumerate((2.0, 2.0, 12.0))]
    turns = pd.DataFrame(rows, columns=["size_px", "loader", "cpu_ms", "images_per_s", "round"])
    ours, other = results.summary(turns).to_dict("records")
    assert (ours["loader"], ours["cpu_ms_median"], ours["ratio_min"], ours["ratio_max"]) == (peers.OURS, 2, 1, 1)
    assert (other["ratio_median"], other["ratio_min"], other["ratio_max"]) == (2, 1, 3)
    assert (other["images_per_s_median"], other["images_per_s_min"], other["images_per_s_max"]) == (51, 50, 52)


def test_the_sample_is_the_same_images_twice(images: Path, tmp_path: Path) -> None:
    peers.copy_sample(DataConfig(path=str(images)), tmp_path, 70)
    files = {path.stem: path.read_bytes() for path in (tmp_path / "train").rglob("*.jpg")}
    originals = {path.read_bytes() for path in images.rglob("*.jpg")}
    assert 68 < len(files) <= 70 and set(files.values()) <= originals
    packed: dict[str, bytes] = {}
    for shard in tmp_path.glob("*.tar"):
        with tarfile.open(shard) as tar:
            packed |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert {name.removesuffix(".jpg"): data for name, data in packed.items() if name.endswith(".jpg")} == files
    assert {data for name, data in packed.items() if name.endswith(".cls")} == {b"0", b"1"}


def test_cpu_time_counts_children_and_their_threads() -> None:
    spin = """
import threading, time
def burn():
    while time.thread_time() < 0.2: pass
thread = threading.Thread(target=burn); thread.start(); thread.join(); burn()
print(time.process_time(), flush=True); input()
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        burnt_s = float(process.stdout.readline())
        pids = list(processes._family(process.pid))
        own_s, child_s = (processes._cpu_s(pid) for pid in pids)
        process.stdin.close()
    assert burnt_s > 0.4 and child_s == pytest.approx(burnt_s, abs=0.05) and 0 < own_s < burnt_s
    assert processes._cpu_s(pids[1]) == 0  # gone


def test_cpu_time_counts_children_that_have_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        assert list(processes._family(process.pid)) == [process.pid] and 0.28 < processes._cpu_s(process.pid) < 2
        process.stdin.close()


def is_stopped(pid: int) -> bool:
    """True where the signal has arrived at all threads: on a busy machine each has to get a processor for that first."""
    threads = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(text.rpartition(")")[2].split()[0] == "T" for text in threads)


def test_a_loader_rests_between_its_turns(images: Path, tmp_path: Path) -> None:
    peers.copy_sample(DataConfig(path=str(images)), tmp_path, IMAGES)
    with processes.Runner("torchvision, PIL", peers.Task(tmp_path, 24, 2)) as runner:
        runner.wait_until_ready()
        pids = list(processes._family(runner._process.pid or 0))
        while not all(map(is_stopped, pids)):
            time.sleep(0.01)
        before = [processes._cpu_s(pid) for pid in pids]
        time.sleep(0.3)
        assert len(pids) > 2 and [processes._cpu_s(pid) for pid in pids] == before
        assert runner.turn(64).images == 64
    until = time.monotonic() + 60
    while time.monotonic() < until and any(processes._cpu_s(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(processes._cpu_s(pid) for pid in pids)  # it has ended, and its workers with it


def test_a_loader_that_fails_says_why(tmp_path: Path) -> None:
    with (
        processes.Runner("torchvision, PIL", peers.Task(tmp_path / "absent", 24, 1)) as runner,
        pytest.raises(UserError, match=r"^torchvision, PIL: FileNotFoundError: .*absent"),
    ):
        runner.wait_until_ready()


def _broken(task: peers.Task) -> peers.Delivery:
    yield peers.BATCH
    raise OSError("no more of them")


def _killed(task: peers.Task) -> peers.Delivery:
    yield peers.BATCH
    os.kill(os.getpid(), signal.SIGKILL)


def _steady(task: peers.Task) -> peers.Delivery:
    while True:
        yield peers.BATCH


def test_a_loader_that_fails_in_its_turn_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, deliver in {"a": _steady, "b": _broken, "c": _killed, "d": _steady}.items():
        monkeypatch.setitem(peers.CONTESTANTS, name, peers.Contestant(deliver))
    # In this process's forks, where the contestants of this test are known; the benchmark's own come from a bare process.
    monkeypatch.setattr(processes, "get_context", lambda _: get_context("fork"))
    monkeypatch.setattr(processes, "_END_S", 0.1)  # a fork keeps its pipe open, so it does not end by itself
    with ExitStack() as stack:
        runners = [stack.enter_context(processes.Runner(name, peers.Task(tmp_path, 24, 1))) for name in "abcd"]
        for runner in runners:
            runner.wait_until_ready()
        images = dict.fromkeys("abcd", 1)
        rounds = [[name for name, _ in bench._take_turns(runners, images)] for _ in range(2)]
        assert rounds == [["a", "d"], ["a", "d"]]
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            "left out from here on: b: OSError: no more of them",
            "left out from here on: c: its process ended with exit code -9",
        ]
        # The others are compared with the first, so without it there is nothing to go on for.
        runners[0]._process.kill()
        with pytest.raises(UserError, match=r"^a: its process ended with exit code -9"):
            list(bench._take_turns(runners, images))


@pytest.mark.parametrize("text", ["", "64,", "big", "64,64", "4", "64,5000", "-64"])
def test_sizes_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--sizes: "):
        sizes_of(text)


def test_mistakes_are_found_at_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench.csv").write_text("precious")
    few = tmp_path / "few/train/class"
    few.mkdir(parents=True)
    picture(20, 20).save(few / "one.jpg")
    for arguments, message in (
        (["--data.path", str(images), "--out", str(tmp_path)], f"--out: {tmp_path}/bench.csv exists"),
        (["--data.path", str(tmp_path / "few")], f"data.path: {tmp_path}/few has 1 JPEGs for training"),
        (["--data.path", str(tmp_path / "absent")], f"data.path: {tmp_path}/absent"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            main()
    assert (tmp_path / "bench.csv").read_text() == "precious"
