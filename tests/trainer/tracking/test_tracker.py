"""Every sink is read back by its own reader, and every fault is real: full disks, killed processes, dead servers."""

import http.server
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from torch import nn

from data_pipeline.common.errors import UserError
from tests.support.runs import checkpoint, descendants, dotted, settings_of
from tests.support.wandb_backend import inspect, train_here, wandb_cores
from trainer.config import load
from trainer.model.resnet import ModelConfig, build_resnet
from trainer.report.run_reader import read_run
from trainer.tracking.config import TrackingConfig, wandb_mode
from trainer.tracking.model_summary import Layer, layers
from trainer.tracking.row_file import RowFile
from trainer.tracking.tracker import Tracker

OFF = TrackingConfig(wandb="off", tensorboard=False)
TENSORBOARD = TrackingConfig(wandb="off")
OFFLINE = TrackingConfig(wandb="offline", tensorboard=False)
ONLINE = TrackingConfig(wandb="online", tensorboard=False)
AUTO = TrackingConfig(tensorboard=False)
KEY = "a" * 40
NOWHERE = "http://127.0.0.1:1"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_wandb_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, mode or settings of whoever runs the tests reaches them."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.chdir(home)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run it's 1"
    folder.mkdir()
    return folder


def open_tracker(folder: Path, cfg: TrackingConfig, resume_step: int = 0, primary: bool = True) -> Tracker:
    return Tracker(
        cfg,
        folder,
        name="resnet18",
        run_config={"optim": {"lr": 0.5}},
        total_steps=100,
        epochs=10,
        resume_step=resume_step,
        primary=primary,
    )


def log_steps(tracker: Tracker, steps: range, loss: float = 0.0) -> None:
    for step in steps:
        tracker.log({"train/loss": loss + step, "perf/images_per_s": 412.0}, step, step / 10)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "alert" not in line]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows(folder)]


def tensorboard_losses(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]


@contextmanager
def full_disk_under(name: str) -> Iterator[None]:
    """Put /dev/full in the place of this process's open file of that name: each write finds no space left."""
    (descriptor,) = [int(fd.name) for fd in Path("/proc/self/fd").iterdir() if name in os.path.realpath(fd)]
    own, full = os.dup(descriptor), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    try:
        yield
    finally:
        os.dup2(own, descriptor)
        os.close(own)
        os.close(full)


def test_every_row_is_on_disk_at_once_and_stays_json(folder: Path) -> None:
    with open_tracker(folder, OFF) as tracker:
        before = time.time()
        tracker.log({"train/loss": float("nan"), "train/grad_norm": float("-inf"), "train/lr": 0.1}, step=3, epoch=0.3)
        tracker.epoch({"val/top1_pct": 61.5}, step=10, epoch=1, best=True)
        first, second = rows(folder)
    assert before <= first.pop("time") <= second.pop("time") <= time.time()
    assert first == {"step": 3, "epoch": 0.3, "train/loss": None, "train/grad_norm": None, "train/lr": 0.1}
    assert second == {"step": 10, "epoch": 1, "val/top1_pct": 61.5}


def test_an_alert_is_a_line_at_its_step_and_not_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker(folder, OFF) as tracker:
        log_steps(tracker, range(1, 4))
        tracker.alert("slow rank", "rank 1 on gpu07", {"rank": 1, "node": "gpu07"})
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line.pop("time") <= time.time()
    assert line == {
        "step": 3,
        "epoch": 0.3,
        "alert": "slow rank",
        "text": "rank 1 on gpu07",
        "rank": 1,
        "node": "gpu07",
    }
    assert "slow rank: rank 1 on gpu07\n" in capsys.readouterr().out
    (folder / "config.yaml").write_text("run: {epochs: 1}\n")
    assert [row["step"] for row in read_run(folder).rows] == [1, 2, 3]


def test_resume_removes_later_rows_and_a_torn_line(folder: Path) -> None:
    with open_tracker(folder, OFF) as tracker:
        log_steps(tracker, range(1, 7))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "epo')
    with open_tracker(folder, OFF, resume_step=4) as tracker:
        assert losses(folder) == [(1, 1), (2, 2), (3, 3), (4, 4)]
        log_steps(tracker, range(5, 7), loss=100)
    assert losses(folder) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 105), (6, 106)]
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_start_without_a_checkpoint_begins_anew(folder: Path) -> None:
    for loss in (100, 200):
        with open_tracker(folder, TENSORBOARD) as tracker:
            log_steps(tracker, range(1, 3), loss)
    assert losses(folder) == tensorboard_losses(folder) == [(1, 201), (2, 202)]


def test_tensorboard_reads_back_without_doubled_steps(folder: Path) -> None:
    with open_tracker(folder, TENSORBOARD) as tracker:
        log_steps(tracker, range(1, 7))
    with open_tracker(folder, TENSORBOARD, resume_step=4) as tracker:
        log_steps(tracker, range(5, 7), loss=100)
        tracker.epoch({"val/loss": float("nan")}, step=6, epoch=1, best=False)
    assert tensorboard_losses(folder) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 105), (6, 106)]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "perf/images_per_s", "val/loss", "epoch"}


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_resnet(ModelConfig("resnet18"), 10).to(memory_format=torch.channels_last)


def small_graph() -> list[Layer]:
    with torch.device("meta"):
        return layers(build_resnet(ModelConfig("resnet18"), 10), torch.empty(1, 3, 64, 64))


def test_tensorboard_shows_weights_and_norms(folder: Path) -> None:
    module = network()
    with torch.no_grad():
        module.get_parameter("layer1.0.conv1.weight").fill_(math.nan)
    every_other = replace(TENSORBOARD, histograms_every=2)
    with open_tracker(folder, every_other) as tracker:
        for epoch in range(1, 5):
            tracker.weights(module.named_parameters(), step=epoch, epoch=epoch)
    with open_tracker(folder, every_other, resume_step=3) as tracker:
        tracker.weights(module.named_parameters(), step=5, epoch=6)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    named = {f"weights/{name}" for name, _ in module.named_parameters()} - {"weights/layer1.0.conv1.weight"}
    assert set(events.Tags()["histograms"]) == named
    for name in ("conv1.weight", "fc.bias", "bn1.weight"):
        values = module.get_parameter(name).detach().numpy().ravel()
        shown = events.Histograms(f"weights/{name}")
        assert [event.step for event in shown] == [2, 5]  # step 4 is purged by the resume at 3
        histogram = shown[0].histogram_value
        counts, edges = np.histogram(values, 64)
        if name != "bn1.weight":  # all ones: bins are half to either side
            np.testing.assert_allclose(histogram.bucket_limit, edges[1:], rtol=1e-5, atol=1e-7)
            assert np.abs(np.array(histogram.bucket) - counts).sum() <= 4  # values on an edge
        assert sum(histogram.bucket) == values.size == histogram.num
        assert events.Scalars(f"weight_norm/{name}")[0].value == pytest.approx(np.linalg.norm(values), rel=1e-4)


def test_tensorboard_shows_the_graph_and_nothing_is_drawn(folder: Path) -> None:
    before = torch.get_rng_state()
    with open_tracker(folder, TENSORBOARD) as tracker:
        tracker.graph(small_graph)
    assert torch.equal(before, torch.get_rng_state())
    graph = GraphDef.FromString(EventAccumulator(str(folder / "tensorboard")).Reload().Graph().SerializeToString())
    nodes = {node.name: node for node in graph.node}
    leaves = {name for name, part in network().named_modules() if not list(part.children())}
    assert {name.replace(".", "/") for name in leaves} < set(nodes)
    assert all(source in nodes for node in graph.node for source in node.input)
    assert set(nodes["layer2/0/add_"].input) == {"layer2/0/bn2", "layer2/0/downsample/1"}
    shapes: list[list[int]] = []
    module = network().eval()
    convolution = module.get_submodule("layer2.0.conv2")
    convolution.register_forward_hook(lambda _, __, output: shapes.append(list(output.shape)))
    module(torch.zeros(1, 3, 64, 64))
    (shape,) = nodes["layer2/0/conv2"].attr["_output_shapes"].list.shape
    assert [dim.size for dim in shape.dim] == shapes[0]


def test_pictures_leave_an_interrupted_training_as_it_is(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def trained(name: str, **options: str) -> Path:
        settings = settings_of(tmp_path_factory.getbasetemp(), tmp_path / name, epochs=2) | options
        train_here(load(dotted(settings)))
        return tmp_path / name

    plain = trained("plain")
    for steps in ({"run.max_steps": "7"}, {}):
        shown = trained("shown", **{"tracking.tensorboard": "true", "tracking.histograms_every": "1"}, **steps)
    assert checkpoint(shown) == checkpoint(plain)
    events = EventAccumulator(str(shown / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("weights/fc.weight")] == [5, 10]
    assert [event.step for event in events.Scalars("train/lr")] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert len(events.Graph().node) > 50


def test_a_graph_that_cannot_be_drawn_drops_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> list[Layer]:
        raise RuntimeError("too clever a network")

    with open_tracker(folder, TENSORBOARD) as tracker:
        tracker.graph(fail)
        log_steps(tracker, range(1, 3))
    assert "the graph of the network is left out: RuntimeError: too clever" in capsys.readouterr().out
    assert tensorboard_losses(folder) == [(1, 1), (2, 2)]


def test_pictures_that_nobody_shows_cost_nothing(folder: Path) -> None:
    def refuse() -> Any:
        raise AssertionError("was asked for")
        yield

    for cfg, epoch in (
        (OFF, 1),
        (replace(TENSORBOARD, histograms_every=0), 1),
        (replace(TENSORBOARD, histograms_every=3), 2),
    ):
        with open_tracker(folder, cfg) as tracker:
            tracker.weights(refuse(), step=1, epoch=epoch)
    with open_tracker(folder, OFF) as tracker:
        tracker.graph(refuse)
    with pytest.raises(UserError, match=r"tracking\.histograms_every: -1 is negative"):
        TrackingConfig(histograms_every=-1)


def test_wandb_shows_weights_and_the_graph(folder: Path) -> None:
    module = network()
    with open_tracker(folder, OFFLINE) as tracker:
        tracker.graph(small_graph)
        tracker.weights(module.named_parameters(), step=7, epoch=1)
    (segment,) = folder.glob("wandb/offline-run-*/*.wandb")
    (row,) = [record["history"]["item"] for record in inspect(segment) if record["type"] == "history"]
    assert row["train/step"] == 7
    assert row["weight_norm/conv1.weight"] == pytest.approx(
        module.get_parameter("conv1.weight").norm().item(), rel=1e-4
    )
    assert row["weights/conv1.weight._type"] == "histogram"
    assert sum(row["weights/conv1.weight.values"]) == module.get_parameter("conv1.weight").numel()
    (file,) = folder.glob("wandb/offline-run-*/files/media/graph/*.graph.json")
    names = {node["name"] for node in json.loads(file.read_text())["nodes"]}
    assert {"conv1", "layer4.1.conv2", "fc"} < names


def test_secondary_ranks_write_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker(folder, ONLINE, primary=False) as tracker:
        log_steps(tracker, range(3))
        tracker.epoch({"val/loss": 1.0}, step=3, epoch=1, best=True)
        tracker.note("hello")
        assert not tracker.stop_requested
    assert not list(folder.iterdir())
    assert capsys.readouterr() == ("", "")


# Faults


def test_a_disk_full_for_a_while_loses_no_row(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither of metrics.jsonl nor of TensorBoard; it is told once that they wait, and once that they are written."""
    with open_tracker(folder, TENSORBOARD) as tracker:
        log_steps(tracker, range(1, 3))
        with full_disk_under("metrics.jsonl"), full_disk_under("tfevents"):
            log_steps(tracker, range(3, 6))
            assert losses(folder) == [(1, 1), (2, 2)]
        log_steps(tracker, range(6, 8))
        assert losses(folder) == [(step, step) for step in range(1, 8)]
        with full_disk_under("tfevents"):
            log_steps(tracker, range(8, 9))
    assert tensorboard_losses(folder) == losses(folder) == [(step, step) for step in range(1, 9)]
    output, errors = capfd.readouterr()
    for name, times in (("metrics.jsonl", 1), ("tensorboard", 2)):
        waits = f"{name}: No space left on device; its rows wait in memory until they can be written\n"
        assert output.count(waits) == output.count(f"{name}: written again, with all rows that had waited\n") == times
    assert errors == ""


def test_rows_of_two_threads_meet_on_a_slow_disk() -> None:
    """The mirror's thread tells of a failure while a row is being written: none is lost, torn or written twice."""
    read, write = os.pipe()  # as slow as its reader
    told: list[str] = []
    rows = RowFile("rows", lambda: write, told.append)
    failures: list[BaseException] = []

    def add(row: bytes) -> None:
        try:
            rows.write(row)
            rows.flush()
        except BaseException as error:
            failures.append(error)

    first, second = (threading.Thread(target=add, args=(letter * 500_000,)) for letter in (b"a", b"b"))
    first.start()
    while not select.select([read], [], [], 1)[0]:
        pass
    second.start()
    second.join(0.2)  # it waits, or has failed
    got = b""
    while len(got) < 1_000_000 and select.select([read], [], [], 5)[0]:
        got += os.read(read, 1 << 20)
    first.join()
    second.join()
    rows.close()
    os.close(read)
    assert (failures, told) == ([], [])
    assert got == b"a" * 500_000 + b"b" * 500_000


def test_rows_that_are_lost_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the end, of a disk that stays full, and of what cannot be opened; training goes on."""
    (folder / "tensorboard").write_text("in the way")
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    with open_tracker(folder, TENSORBOARD) as tracker:
        log_steps(tracker, range(3))
    told = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("step")]
    assert told[0] == "tensorboard: File exists; its rows wait in memory until they can be written"
    assert told[1].startswith("metrics.jsonl: No space left on device; its rows wait")
    assert re.fullmatch(r"metrics.jsonl: \d+ bytes could not be written and are lost", told[-2])
    assert re.fullmatch(r"tensorboard: \d+ bytes could not be written and are lost", told[-1])


def test_a_sink_opens_when_it_can(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "metrics.jsonl").mkdir()
    with open_tracker(folder, OFF, resume_step=2) as tracker:
        log_steps(tracker, range(3, 5))
        (folder / "metrics.jsonl").rmdir()
        log_steps(tracker, range(5, 6))
    assert losses(folder) == [(3, 3), (4, 4), (5, 5)]


def test_rows_that_wait_are_bounded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.tracking.row_file.MOST_BYTES", 1000)
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    with open_tracker(folder, OFF) as tracker:
        log_steps(tracker, range(50))
    assert "metrics.jsonl failed and is dropped: MemoryError" in capsys.readouterr().out


def test_killed_wandb_process_is_dropped_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_tracker(folder, OFFLINE) as tracker:
        log_steps(tracker, range(1, 3))
        (core,) = wandb_cores()
        os.kill(core, signal.SIGKILL)
        while core in wandb_cores():
            time.sleep(0.01)
        log_steps(tracker, range(3, 9))
    assert losses(folder) == [(step, step) for step in range(1, 9)]
    output, errors = capfd.readouterr()
    assert output.count("wandb failed and is dropped: ") == output.count("dropped") == 1
    assert errors == ""


def test_signals_to_all_of_a_job_lose_no_row(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As SLURM sends them: to the process and its descendants; and, as for a service, to its process group."""
    own = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open_tracker(folder, OFFLINE) as tracker:
        log_steps(tracker, range(1, 4))
        (core,) = wandb_cores()
        for pid in (os.getpid(), *descendants(os.getpid())):
            os.kill(pid, signal.SIGTERM)
        assert os.getpgid(core) != os.getpgid(0)
        log_steps(tracker, range(4, 7))
    signal.signal(signal.SIGTERM, own)
    assert wandb_cores() == set()
    (segment,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert history(inspect(segment)) == [(step, step) for step in range(1, 7)]
    assert "dropped" not in capfd.readouterr().out


@pytest.mark.slow
def test_rows_of_a_killed_training_are_kept(folder: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from tests.trainer.tracking.test_tracker import OFFLINE, log_steps, open_tracker
with open_tracker(Path(sys.argv[1]), OFFLINE) as tracker:
    log_steps(tracker, range(1, 7))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, folder], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    (segment,) = folder.glob("wandb/offline-run-*/*.wandb")
    # wandb's process writes them when it leaves, half a minute later. Told to leave sooner, it lost them now and then.
    wanted, end_s = [(step, step) for step in range(1, 7)], time.monotonic() + 120
    while segment.stat().st_size < 100 or history(inspect(segment)) != wanted:
        assert time.monotonic() < end_s
        time.sleep(0.3)


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "auto"),
        ({"WANDB_MODE": ""}, "auto"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "Offline"}, "offline"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": "disabled"}, "off"),
        ({"WANDB_DISABLED": "true"}, "off"),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "off"),
        ({"WANDB_DISABLED": "false", "WANDB_MODE": "online"}, "online"),
    ],
)
def test_words_of_the_environment(environment: dict[str, str], mode: str) -> None:
    assert wandb_mode(environment) == mode


def test_run_of_a_wandb_sweep_has_the_id_of_the_agent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "wandb_id.txt").write_text("earlier\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "5weep")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    with open_tracker(folder, OFFLINE) as tracker:
        log_steps(tracker, range(1, 3))
    assert (folder / "wandb_id.txt").read_text() == "chosen\n"
    assert len(list(folder.glob("wandb/offline-run-*-chosen"))) == 1


def test_reader_of_the_console_may_leave(folder: Path) -> None:
    program = "import sys; sys.stdin.read(); log_steps(tracker, range(1, 4)); tracker.epoch({}, 4, 1, best=False)"
    process = subprocess.Popen(
        script(folder, program), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    process.stdout.close()
    process.communicate()
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]


# Console


def script(folder: Path, program: str) -> list[str]:
    """A command that runs `program` with a `tracker` for the folder, in a process of its own."""
    head = "import os, pathlib, sys; from tests.trainer.tracking.test_tracker import *"
    body = f"with open_tracker(pathlib.Path({str(folder)!r}), OFF) as tracker:\n    {program}\n"
    return [sys.executable, "-c", f"{head}\n{body}"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


EPOCH = {
    "train/loss": 1.234,
    "train/top1_pct": 61.2,
    "val/loss": 1.1009,
    "val/top1_pct": 68.3,
    "val/top5_pct": 95.1,
    "perf/images_per_s": 412.3,
    "perf/data_wait_pct": 0.8,
}
EPOCH_LINE = (
    "epoch  3/10  train  1.234 loss  61.2 % top-1  val  1.101 loss  68.3 % top-1  95.1 % top-5"
    "    412 img/s  data wait  0.8 %  best so far"
)


def test_piped_output_is_plain_lines(folder: Path) -> None:
    program = (
        "tracker.log({'perf/ckpt_save_s': 1.0}, 28, 2.8);"  # nothing to tell a person
        "log_steps(tracker, range(29, 30)); tracker.epoch(EPOCH, 30, 3, best=True); log_steps(tracker, range(31, 40));"
        "tracker.note('two\\nlines and \\x1b[2J \\udcff ' + 'x' * 200)"
    )
    env = {**environment(), "FORCE_COLOR": "1", "COLUMNS": "80"}
    output = subprocess.run(script(folder, program), capture_output=True, text=True, check=True, env=env).stdout
    progress, epoch, note = output.splitlines()  # one progress line: the others came within ten seconds
    assert re.fullmatch(r"step  29/100  epoch   2\.90/10  loss 29\.000    412 img/s  eta \d+:\d\d:\d\d", progress)
    assert epoch == EPOCH_LINE
    assert note == "two lines and \\x1b[2J \\udcff " + "x" * 200
    assert "\x1b" not in output and "\r" not in output


def test_terminal_has_a_bar_below_whole_lines(folder: Path) -> None:
    program = (
        "log_steps(tracker, range(29, 30)); tracker.log({'perf/ckpt_save_s': 1.0}, 29, 2.9);"
        "tracker.epoch(EPOCH, 30, 3, best=True); tracker.note('x' * 200)"
    )
    controller, terminal = pty.openpty()
    env = {**environment(), "COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen(script(folder, program), stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    output = b""
    while chunk := read_terminal(controller):
        output += chunk
    assert process.wait() == 0
    screen = output.decode()
    assert EPOCH_LINE in screen
    assert "x" * 200 in screen
    bars = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", bar) for bar in re.findall(r"epoch 3/10 .*", screen)]
    assert bars and all("29%" in bar and "loss 29.000    412 img/s" in bar and len(bar) <= 81 for bar in bars)


def read_terminal(controller: int) -> bytes:
    try:
        return os.read(controller, 65536)
    except OSError:  # Linux says EIO where the other end is closed
        return b""


def test_what_is_off_is_not_imported(folder: Path) -> None:
    program = "log_steps(tracker, range(3)); print('wandb' in sys.modules, 'rich' in sys.modules)"
    output = subprocess.run(script(folder, program), capture_output=True, text=True, check=True, env=environment())
    assert output.stdout.splitlines()[-1] == "False False"


# W&B


class Backend(http.server.BaseHTTPRequestHandler):
    """The few answers of a W&B server that a run needs; `history` collects the rows it was sent."""

    protocol_version = "HTTP/1.1"
    status = 200
    stopped = False
    history: ClassVar[list[dict[str, Any]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        reply = json.dumps(self.answer(body)).encode()
        self.send_response(self.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def answer(self, body: bytes) -> dict[str, Any]:
        if self.path.endswith("/file_stream"):
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                self.history.append(json.loads(line))
            return {"stopped": self.stopped}
        if self.path != "/graphql":
            return {}
        request = json.loads(body)
        bucket = {
            "id": "b",
            "name": request["variables"].get("name"),
            "displayName": request["variables"].get("displayName"),
            "project": {"name": "sluice", "entity": {"name": "me"}},
        }
        answers = {
            "RunResumeStatus": {"model": None},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
        }
        operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        return {"data": answers.get(operation[1] if operation else "", {})}

    def log_message(self, *args: Any) -> None: ...


class BackendServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: wandb's process leaves at the end without waiting for the answers to its telemetry."""


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Backend]]:
    handler = type("OneBackend", (Backend,), {"history": []})
    with BackendServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield handler
        server.shutdown()


def history(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [(item["train/step"], item["train/loss"]) for item in items]


def test_offline_run_reads_back_and_resumes_under_its_id(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_tracker(folder, OFFLINE) as tracker:
        log_steps(tracker, range(1, 7))
    with pytest.raises(RuntimeError), open_tracker(folder, OFFLINE, resume_step=4) as tracker:
        log_steps(tracker, range(5, 7), loss=100)
        raise RuntimeError("the training failed")
    output, errors = capfd.readouterr()
    assert errors == "" and all(line.startswith(("wandb: ", "step ")) for line in output.splitlines())

    segments = [inspect(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
    first, second = sorted(segments, key=len, reverse=True)
    assert history(first) == [(step, step) for step in range(1, 7)]
    assert history(second) == [(5, 105), (6, 106)]
    runs = [record["run"] for records in (first, second) for record in records if record["type"] == "run"]
    assert {run["run_id"] for run in runs} == {(folder / "wandb_id.txt").read_text().strip()}
    assert runs[0]["project"] == "sluice" and runs[0]["display_name"] == "resnet18"
    assert runs[0]["config"]["update"]["optim"] == {"lr": 0.5}
    assert {"train/step"} == {record["metric"]["step_metric"] for record in first if record["type"] == "metric"}
    exit_codes = [
        record["exit"].get("exit_code", 0) for records in (first, second) for record in records if "exit" in record
    ]
    assert exit_codes == [0, 1]

    command = output.splitlines()[-1].partition("to upload it: ")[2]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": NOWHERE}
    dry = subprocess.run(f"{command} --dry-run", shell=True, capture_output=True, text=True, check=True, env=env)
    assert "Would sync 2 run(s)" in dry.stdout + dry.stderr


def test_online_run_reaches_the_server(folder: Path, backend: type[Backend], capfd: pytest.CaptureFixture[str]) -> None:
    with open_tracker(folder, AUTO) as tracker:
        log_steps(tracker, range(1, 4))
    assert [(row["train/step"], row["train/loss"]) for row in backend.history] == [(1, 1), (2, 2), (3, 3)]
    output, errors = capfd.readouterr()
    said = [line for line in output.splitlines() if "wandb" in line]
    identity = (folder / "wandb_id.txt").read_text().strip()
    assert said == [f"wandb: {os.environ['WANDB_BASE_URL']}/me/sluice/runs/{identity}"]
    assert errors == "" and KEY not in output


@pytest.mark.slow  # wandb asks for a stop every 15 seconds
def test_stop_button_sets_a_flag(folder: Path, backend: type[Backend]) -> None:
    backend.stopped = True
    with open_tracker(folder, ONLINE) as tracker:
        log_steps(tracker, range(1, 3))
        end = time.monotonic() + 120
        while not tracker.stop_requested and time.monotonic() < end:
            time.sleep(0.1)
        assert tracker.stop_requested


def test_uploads_that_never_end_are_given_up(
    folder: Path, backend: type[Backend], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tracking.wandb_sink.FINISH_TIMEOUT_S", 2.0)
    with open_tracker(folder, ONLINE) as tracker:
        log_steps(tracker, range(1, 3))
        backend.status = 503
    assert losses(folder) == [(1, 1), (2, 2)]
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "dropped" in line]
    assert "uploads did not end in 2 s; for the rest: wandb sync --include-online" in said


def test_unreachable_server_leaves_the_run_offline(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tracking.wandb_sink.INIT_TIMEOUT_S", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = open_tracker(folder, ONLINE)
    (said,) = capfd.readouterr().out.splitlines()
    assert "connection refused, so the run stays offline; to upload it: wandb sync " in said
    log_steps(tracker, range(1, 3))
    tracker.close()
    assert capfd.readouterr().err == ""
    identity = (folder / "wandb_id.txt").read_text().strip()
    (segment,) = folder.glob(f"wandb/offline-run-*-{identity}/*.wandb")
    assert history(inspect(segment)) == [(1, 1), (2, 2)]


@pytest.mark.parametrize("key", [None, "too-short"])
def test_online_needs_a_key(folder: Path, monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    (folder / "metrics.jsonl").write_text("precious")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(UserError, match=r"tracking\.wandb: online, but .* --tracking.wandb offline") as raised:
        open_tracker(folder, ONLINE)
    assert len(str(raised.value).splitlines()) == 1
    assert (folder / "metrics.jsonl").read_text() == "precious"


@pytest.mark.parametrize("status", [401, 403])
def test_refused_key(folder: Path, backend: type[Backend], capsys: pytest.CaptureFixture[str], status: int) -> None:
    backend.status = status
    with pytest.raises(UserError, match=r"tracking\.wandb: the server refused the API key") as raised:
        open_tracker(folder, ONLINE)
    assert KEY not in str(raised.value)
    with open_tracker(folder, AUTO):
        assert "the run stays offline" in capsys.readouterr().out


def test_netrc_holds_a_key(folder: Path, backend: type[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    host = os.environ["WANDB_BASE_URL"].removeprefix("http://")
    Path(os.environ["NETRC"]).write_text(f"machine {host} login user password {KEY}\n")
    with open_tracker(folder, AUTO) as tracker:
        log_steps(tracker, range(1, 3))
    assert len(backend.history) == 2


def test_auto_obeys_the_environment_and_a_choice_beats_it(
    folder: Path, backend: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_tracker(folder, AUTO) as tracker:
        log_steps(tracker, range(1, 3))
    assert not (folder / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    for cfg, received in ((AUTO, 0), (ONLINE, 2)):
        with open_tracker(folder, cfg) as tracker:
            log_steps(tracker, range(1, 3))
        assert len(backend.history) == received
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE: 'sometimes' is unknown"):
        open_tracker(folder, AUTO)


@pytest.mark.parametrize("project", ["", "a/b", "x" * 129])
def test_project_name(project: str) -> None:
    with pytest.raises(UserError, match=r"tracking\.project: "):
        TrackingConfig(project=project)
