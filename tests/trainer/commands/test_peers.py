"""Other trainers, as many as are installed: they train, take turns, rest in between, and end."""

import copy
import importlib.util
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from tests.conftest import picture
from tests.support.runs import ROOT, SOLO, state_of
from trainer.bench import peer_turns, peers
from trainer.bench.peer_turns import Peer, open_peers
from trainer.bench.peers import CONTESTANTS, Contestant, Race
from trainer.config import Config

BATCH, CLASSES = 4, 3
INSTALLED = [name for name, one in CONTESTANTS.items() if not one.needs or importlib.util.find_spec(one.needs)]


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Race:
    folder = tmp_path_factory.mktemp("some images")
    for number in range(12):
        path = folder / f"train/{number % CLASSES:05}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(40, 50, seed=number).save(path)
    return Race(folder, Config(data=DataConfig(batch=BATCH, size_px=32)), CLASSES, SOLO)


pytestmark = pytest.mark.usefixtures("one_thread")


def wait_until_gone(workers: list[int]) -> bool:
    until = time.monotonic() + 60
    while time.monotonic() < until and any(state_of(pid) not in "ZX" for pid in workers):
        time.sleep(0.02)
    return all(state_of(pid) in "ZX" for pid in workers)


@pytest.mark.parametrize("name", INSTALLED)
def test_each_trains_in_its_turns_and_rests_in_between(name: str, race: Race) -> None:
    peer = Peer(name, race)
    workers = peer._workers
    assert len(workers) == (0 if name == peers.PLAIN_STEP else SOLO.cores)
    for _ in range(2):
        with peer.turn() as update:
            assert [update() for _ in range(5)] == [BATCH] * 5  # more than the folder holds
        burnt_s, end_s = [-1.0], time.monotonic() + 60
        while (now_s := [peer_turns._cpu_s(pid) for pid in workers]) != pytest.approx(burnt_s, abs=0.02):
            assert time.monotonic() < end_s
            burnt_s = now_s
            time.sleep(0.2)
    assert peer.ahead == 2 * len(workers) and (peer.ahead == 0 or min(burnt_s) > 0)
    peer.close()
    assert wait_until_gone(workers)


def test_the_loop_trains_as_by_hand() -> None:
    """SGD with momentum, two batches, written out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    weight, bias = (parameter.detach().clone() for parameter in model.parameters())
    batches = [(torch.randn(5, 3, 2, 2), torch.randint(CLASSES, (5,))) for _ in range(2)]
    optimizer = peers._sgd(model, Config())
    assert list(peers._updates(model, optimizer, copy.deepcopy(batches), SOLO)) == [5, 5]
    cfg, (speed, bias_speed) = Config().optim, (torch.zeros_like(weight), torch.zeros_like(bias))
    for images, labels in batches:
        errors = functional.linear(images.flatten(1), weight, bias).softmax(dim=1) - functional.one_hot(labels, CLASSES)
        speed = cfg.momentum * speed + errors.T @ images.flatten(1) / 5 + cfg.weight_decay * weight
        bias_speed = cfg.momentum * bias_speed + errors.mean(dim=0) + cfg.weight_decay * bias
        weight, bias = weight - 1e-3 * speed, bias - 1e-3 * bias_speed
    torch.testing.assert_close(model[1].weight, weight)
    torch.testing.assert_close(model[1].bias, bias)


def test_images_are_cut_and_normalised_as_the_recipe_says(race: Race) -> None:
    images, labels = next(iter(peers._folder_loader(race)))
    assert images.shape == (BATCH, 3, 32, 32) and images.dtype == torch.float32 and images.is_contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (race.cfg.data.mean, race.cfg.data.std))
    pixels = (images * std + mean) * 255
    assert pixels.min() > -0.01 and pixels.max() < 255.01 and torch.allclose(pixels, pixels.round(), atol=1e-2)
    assert set(labels.tolist()) <= set(range(CLASSES))


def test_a_function_is_made_to_take_turns() -> None:
    baton = peers._Baton()
    done: list[int] = []

    def run() -> None:
        while not baton.over:
            done.append(len(done))
            baton.pass_back()

    training = baton.turns(run, 7)
    assert done == []
    for updates in (1, 2, 3):
        assert next(training) == 7
        assert len(done) == updates
    training.close()  # type: ignore[attr-defined] # a generator
    assert len(done) <= 4


def test_a_failure_in_its_thread_is_raised() -> None:
    baton = peers._Baton()

    def run() -> None:
        baton.pass_back()
        raise ZeroDivisionError("as expected")

    training = baton.turns(run, 7)
    next(training)
    with pytest.raises(ZeroDivisionError, match="as expected"):
        next(training)


def test_those_that_cannot_compete_are_named(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(race: Race) -> peers.Training:
        raise ZeroDivisionError("as\nexpected")

    monkeypatch.setattr(
        peer_turns,
        "CONTESTANTS",
        {
            "absent": Contestant(fail, "no_such_package"),
            "failing": Contestant(fail),
            peers.PLAIN_STEP: CONTESTANTS[peers.PLAIN_STEP],
        },
    )
    there, left_out = open_peers(race)
    assert list(there) == [peers.PLAIN_STEP]
    assert left_out == [
        "absent: no_such_package is not installed; pip install no_such_package",
        "failing: ZeroDivisionError: as expected",
    ]


def test_a_folder_without_images_is_a_reason_to_be_left_out(race: Race, tmp_path: Path) -> None:
    before = set(active_children())
    with pytest.raises(UserError, match=r"^torchvision, end to end: FileNotFoundError"):
        Peer(peers.PLAIN_LOOP, race._replace(folder=tmp_path))
    assert set(active_children()) == before


def test_workers_end_with_a_process_that_is_killed(race: Race, tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from tests.trainer.commands.test_peers import Config, DataConfig, SOLO
from trainer.bench import peer_turns, peers
cfg = Config(data=DataConfig(batch={BATCH}, size_px=32))
peer = peer_turns.Peer(peers.PLAIN_LOOP, peers.Race(Path({str(race.folder)!r}), cfg, {CLASSES}, SOLO))
print(*peer._workers, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT).stdout
    workers = [int(pid) for pid in output.split()]
    assert len(workers) == SOLO.cores and wait_until_gone(workers)
