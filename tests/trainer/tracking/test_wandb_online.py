"""Real trainings, with the real client, against a server on this machine that lives, refuses, falls silent or dies."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import wandb

from data_pipeline.common.errors import UserError
from tests.support.runs import EPOCHS, STEPS, dotted, rows, settings_of
from tests.support.wandb_backend import KEY, Backend, isolate, serving, train_here, wandb_cores
from trainer.config import Config, load
from trainer.tracking.alerts import Alarms
from trainer.tracking.config import TrackingConfig
from trainer.tracking.tracker import Tracker


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    isolate(tmp_path, monkeypatch)
    monkeypatch.setattr("trainer.tracking.wandb_sink.INIT_TIMEOUT_S", 5.0)
    monkeypatch.setattr("trainer.tracking.wandb_sink.FINISH_TIMEOUT_S", 3.0)
    yield
    wandb.teardown()  # one that met a dead client keeps its key, and forgets it only now


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        assert server.faults == []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run it's 1"


def configured(base: Path, run: Path, **changed: str) -> Config:
    """The configuration of the training QUICK with W&B; `run__epochs="2"` is --run.epochs 2."""
    options = {name.replace("__", "."): value for name, value in changed.items()}
    return load(dotted(settings_of(base, run) | {"tracking.wandb": "online", "run.name": "1st <run>"} | options))


def at_step(run: Path, step: int, act: Callable[[], object]) -> threading.Thread:
    """Act once the run has reported `step`; to be joined."""

    def wait() -> None:
        while not any(row["step"] >= step for row in rows(run)):
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def sent(backend: Backend) -> list[dict[str, Any]]:
    """The history that the server has, as rows of metrics.jsonl without the time."""
    history = [dict(backend.run.history[number]) for number in range(len(backend.run.history))]
    return [{"step": row.pop("train/step"), **row} for row in history]


def written(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "time"} for row in rows(run)]


def assert_complete(run: Path, epochs: int = EPOCHS) -> None:
    """Every step has its row in metrics.jsonl, and the last checkpoint is that of a finished run."""
    steps = STEPS // EPOCHS * epochs
    assert [row["step"] for row in rows(run) if "val/loss" not in row] == [n for n in range(1, steps + 1) if n % 5]
    assert [row["step"] for row in rows(run) if "val/loss" in row] == list(range(5, steps + 1, 5))
    assert json.loads((run / "checkpoints/last/progress.json").read_text())["finished"]


def test_interrupted_run_is_one_run_on_the_server(
    base: Path, run: Path, backend: Backend, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = configured(base, run)
    train_here(configured(base, run, run__max_steps="7"))
    assert backend.artifacts == [] and backend.run.exit_code == 0
    train_here(cfg)
    assert [row["step"] for row in rows(run)] == sorted([*range(1, STEPS + 1), 7])  # 7 has the scores of the pause too
    assert sent(backend) == written(run)

    assert list(backend.runs) == [(run / "wandb_id.txt").read_text().strip()]
    assert backend.run.starts >= 2 and backend.run.exit_code == 0 and backend.run.display_name == "1st <run>"
    assert backend.run.config == json.loads(json.dumps(asdict(cfg))) | {"world_size": 1}
    last = written(run)[-1]
    assert {name: backend.run.summary[name] for name in last if name != "step"} == {
        name: value for name, value in last.items() if name != "step"
    }
    assert KEY not in "".join(capfd.readouterr())

    (artifact,) = backend.artifacts
    assert artifact["committed"] and artifact["artifactTypeName"] == "model"
    best = json.loads((run / "checkpoints/best/progress.json").read_text())["best_top1_pct"]
    assert json.loads(artifact["metadata"]) == {"best_top1_pct": best}
    assert {alias["alias"] for alias in artifact["aliases"]} == {"latest", "best"}
    uploaded = backend.uploads["artifact-0/model.safetensors"]
    assert uploaded == (run / "checkpoints/best/model.safetensors").read_bytes()


def test_stop_button_ends_the_run_between_two_steps(base: Path, run: Path, backend: Backend) -> None:
    backend.stopped = True
    progress = train_here(configured(base, run, run__epochs="400"))
    assert 0 < progress.step < 2000 and not progress.finished
    assert rows(run)[-1]["step"] == progress.step
    assert json.loads((run / "checkpoints/last/progress.json").read_text())["step"] == progress.step
    assert backend.run.exit_code == 0 and sent(backend) == written(run)

    backend.stopped = False
    assert (
        train_here(configured(base, run, run__epochs="400", run__max_steps=str(progress.step + 2))).step
        == progress.step + 2
    )
    assert sent(backend) == written(run)


def test_loss_that_is_not_finite_raises_one_alert(base: Path, run: Path, backend: Backend) -> None:
    with pytest.raises(UserError, match="the loss of step 2 is not finite"):
        train_here(configured(base, run, optim__lr="1e20", run__epochs="1", optim__warmup="0"))
    assert backend.run.alerts == [("bad step", "the loss of step 2 is not finite")]
    assert backend.run.exit_code == 1 and [row["step"] for row in rows(run)] == [1]


def test_alerts_reach_the_server(tmp_path: Path, backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = TrackingConfig(wandb="online", tensorboard=False)
    with Tracker(
        cfg, tmp_path, name="r", run_config={}, total_steps=9, epochs=1, resume_step=0, primary=True
    ) as tracker:
        for step in range(1, 21):
            tracker.log({"perf/images_per_s": 100.0 if step <= 15 else 20.0}, step, step / 20)
        tracker.alert("asked to stop", "saved step 20")
    alerts = [("throughput fell", "from 100 to 20 images/s at step 17"), ("asked to stop", "saved step 20")]
    assert backend.run.alerts == alerts
    assert [line for line in capsys.readouterr().out.splitlines() if ": " in line][1:] == [
        f"{title}: {text}" for title, text in alerts
    ]


def tracked(folder: Path) -> Tracker:
    cfg = TrackingConfig(wandb="online", tensorboard=False)
    return Tracker(cfg, folder, name="r", run_config={}, total_steps=9, epochs=1, resume_step=0, primary=True)


def test_stop_and_return_of_a_run_are_marked(tmp_path: Path, backend: Backend) -> None:
    """W&B hands on a run of a sweep that is preempting and ends with an error."""
    with tracked(tmp_path) as tracker:
        tracker.stopped(comes_back=True)
    assert (backend.run.preempting, backend.run.exit_code, backend.run.summary.get("stopped")) == (True, 1, None)
    with tracked(tmp_path) as tracker:
        tracker.stopped(comes_back=False)
    assert (backend.run.exit_code, backend.run.summary["stopped"]) == (0, True)
    with tracked(tmp_path):
        pass
    assert (backend.run.starts, backend.run.exit_code, backend.run.summary["stopped"]) == (3, 0, False)


@pytest.mark.parametrize("by_agent", [False, True])
def test_variables_of_wandb_are_heeded(
    tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch, by_agent: bool
) -> None:
    """And nothing is left elsewhere. An agent sets WANDB_DIR to its own folder, if nobody has set it."""
    run = tmp_path / "run"
    run.mkdir()
    variables = {
        "TAGS": "a,b c",
        "NOTES": "why",
        "RUN_GROUP": "group",
        "DIR": str(Path.cwd() if by_agent else tmp_path),
    }
    variables |= {"SWEEP_ID": "5weep", "RUN_ID": "chosen"} if by_agent else {}
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with tracked(run):
        pass
    sent = backend.run
    assert (sent.tags, sent.notes, sent.group) == (["a", "b c"], "why", "group")
    assert (run / "wandb").exists() == by_agent and (tmp_path / "wandb").exists() != by_agent
    assert not (Path.cwd() / "wandb").exists()


def test_alarms_are_raised_once_each_and_never_for_an_epoch_of_larger_images() -> None:
    def raised(speeds: list[int]) -> list[int]:
        return [step for step, speed in enumerate(speeds) for _ in alarms.row({"perf/images_per_s": speed}, step)]

    alarms = Alarms()
    assert raised([100] * 12 + [20] * 6 + [100] * 6 + [20] * 6) == [13, 25]
    alarms.new_epoch()
    assert raised([20] * 20 + [5] + [20] * 5 + [11] * 9) == []


@pytest.mark.parametrize("silent", [False, True])
def test_unreachable_server_leaves_the_run_offline(
    base: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], silent: bool
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        if silent:
            nobody.listen()  # connections are made, and nothing answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        train_here(configured(base, run, run__epochs="1"))
    assert_complete(run, epochs=1)
    said = capfd.readouterr().out
    assert said.count("so the run stays offline; to upload it: wandb sync ") == 1 and "dropped" not in said
    identity = (run / "wandb_id.txt").read_text().strip()
    assert len(list(run.glob(f"wandb/offline-run-*-{identity}/*.wandb"))) == 1


@pytest.mark.parametrize("how", ["errors", "refuses"])
def test_server_that_dies_midway(
    base: Path, run: Path, backend: Backend, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    def die() -> None:
        if how == "refuses":
            backend.shutdown()
            backend.server_close()
        backend.status = 503

    death = at_step(run, 3, die)
    train_here(configured(base, run, run__epochs="2"))
    death.join()
    assert_complete(run, epochs=2)
    (said,) = [line for line in capfd.readouterr().out.splitlines() if "dropped" in line]
    assert "uploads did not end in 3 s; for the rest: wandb sync" in said


def test_killed_client_is_dropped(base: Path, run: Path, backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    def kill() -> None:
        cores = wandb_cores()
        assert cores
        for pid in cores:
            os.kill(pid, signal.SIGKILL)

    death = at_step(run, 3, kill)
    train_here(configured(base, run, run__epochs="2"))
    death.join()
    assert_complete(run, epochs=2)
    assert sum("wandb failed and is dropped" in line for line in capfd.readouterr().out.splitlines()) == 1
    assert wandb.run is None, "else another run in this process, or one that steps back, would find no key"
