"""The plain average of the last epochs' weights: torch's own, in a run that is stopped or not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from tests.support.runs import SOLO, dotted, images, settings_of
from tests.trainer.engine.test_engine import CLASSES, batch, build, normalised
from tests.trainer.model.test_finetune import assert_same_end
from trainer.checkpoint.files import STATE, WEIGHTS
from trainer.checkpoint.store import Store
from trainer.config import load
from trainer.loop import fit
from trainer.model.resnet import ModelConfig, build_resnet
from trainer.optim.config import OptimConfig
from trainer.optim.swa import Swa, averaged_before
from trainer.resilience.signals import StopFlag


def network() -> nn.Module:
    torch.manual_seed(3)
    return build_resnet(ModelConfig("resnet18", width=0.25), CLASSES)


@pytest.mark.parametrize(
    ("swa", "epochs", "expected"),
    [
        (0.5, 6, [0, 0, 0, 0, 1, 2]),
        (1.0, 4, [0, 1, 2, 3]),
        (0.25, 8, [0] * 7 + [1]),
        (0.01, 3, [0, 0, 0]),
    ],
)
def test_the_last_epochs_count(swa: float, epochs: int, expected: list[int]) -> None:
    assert [averaged_before(epoch, OptimConfig(swa=swa), epochs) for epoch in range(epochs)] == expected


@pytest.mark.parametrize(
    ("lengths", "averaged"),
    [((4, 5), [2, 3, 4]), ((4, 5, 6), [2, 3, 4, 5]), ((4, 8), [4, 5, 6, 7]), ((4, 12), [*range(6, 12)])],
)
def test_the_mean_is_plain_in_a_run_trained_on(lengths: tuple[int, ...], averaged: list[int]) -> None:
    """Of all epochs since the average last began: in the last half, or in that of the length before."""
    mean, held, begun = nn.Linear(1, 1), 0, 0
    swa = Swa(mean)
    for length in lengths:
        for epoch in range(begun, length):
            nn.init.constant_(mean.weight, 2.0**epoch)
            count = averaged_before(epoch, OptimConfig(swa=0.5), length, held)
            swa.update(mean, count)
            held = count + 1
        begun = length
    assert held == len(averaged)
    weight = next(swa.module.parameters()).item()
    assert weight == pytest.approx(sum(2.0**epoch for epoch in averaged) / len(averaged))


@pytest.mark.slow
def test_a_run_trained_on_averages_plainly(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    base, run = tmp_path_factory.getbasetemp(), tmp_path / "run"
    images(base)
    more = {"optim.ema_decay": "0", "optim.swa": "0.5", "run.keep_every": "1", "engine.precision": "fp32"}
    lengths: list[dict[str, str]] = [{}, {"run.extend_to": "5"}]
    for length in lengths:
        assert fit(load(dotted({**settings_of(base, run, epochs=4), **more, **length})), SOLO, StopFlag()).finished
    ends = [max(run.glob(f"checkpoints/step-{step:08d}*")) for step in (15, 20, 25)]
    trained = [torch.load(folder / STATE, weights_only=True)["module"] for folder in ends]
    saved = load_file(ends[-1] / WEIGHTS)
    for name, _ in network().named_parameters():
        torch.testing.assert_close(saved[name], sum(one[name] for one in trained) / 3)


def test_the_average_is_torchs() -> None:
    """Weights and, from the same batches, statistics; those of a frozen norm stay."""
    engine = build(network(), OptimConfig(lr=0.05, swa=0.5, label_smoothing=0.0))
    theirs: AveragedModel | None = None
    batches = [batch(8, seed=100 + number) for number in range(3)]
    for epoch in range(3):
        for number in range(2):
            engine.step([batch(8, seed=10 * epoch + number)], lr=0.05)
        theirs = theirs or AveragedModel(engine.module)
        theirs.update_parameters(engine.module)
        engine.average(epoch, iter(batches))
        state = engine.eval_model.state_dict()
        if epoch == 0:
            torch.testing.assert_close(state, engine.module.state_dict(), rtol=0, atol=0)
    assert theirs
    update_bn([normalised(one.images) for one in batches], theirs)
    ours, wanted = engine.eval_model.state_dict(), theirs.module.state_dict()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert not any(layer.training for layer in engine.eval_model.modules())
    assert {layer.momentum for layer in engine.eval_model.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.1}
    theirs.eval()
    images = batch(4, seed=7).images
    torch.testing.assert_close(engine.predict(images), theirs(normalised(images)).detach(), rtol=1e-4, atol=1e-5)

    norm = engine.module.get_submodule("bn1").eval()
    engine.average(3, iter(batches))
    assert torch.equal(engine.eval_model.state_dict()["bn1.running_mean"], norm.state_dict()["running_mean"])


@pytest.mark.slow
def test_a_stopped_run_averages_the_same(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Bit for bit, stopped within an epoch and at its end; the mean is that of the weights with which epochs ended."""
    base = tmp_path_factory.getbasetemp()
    images(base)
    more = {"optim.ema_decay": "0", "optim.swa": "0.6", "run.keep_every": "1", "engine.precision": "fp32"}
    whole, run = (load(dotted({**settings_of(base, tmp_path / name), **more})) for name in ("whole", "stopped"))
    assert fit(whole, SOLO, StopFlag()).finished
    for stop in (3, 8, 10, 12):
        fit(replace(run, run=replace(run.run, max_steps=stop)), SOLO, StopFlag())
        assert Store(run.folder).progress().step == stop
    assert fit(run, SOLO, StopFlag()).finished
    assert_same_end(run.folder, whole.folder)

    ends = [max(whole.folder.glob(f"checkpoints/step-{step:08d}*")) for step in (5, 10, 15)]
    trained = [torch.load(folder / STATE, weights_only=True)["module"] for folder in ends]
    saved = [load_file(folder / WEIGHTS) for folder in ends]
    for name, _ in network().named_parameters():
        assert torch.equal(saved[0][name], trained[0][name]) and torch.equal(saved[1][name], trained[1][name])
        torch.testing.assert_close(saved[2][name], (trained[1][name] + trained[2][name]) / 2)
    assert not torch.equal(saved[2]["bn1.running_var"], trained[2]["bn1.running_var"])
