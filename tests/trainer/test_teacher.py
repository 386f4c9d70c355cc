"""Learning from a teacher: the loss is the papers', the teacher stays as it is, and a resumed run ends as one that was not."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from data_pipeline.batch import IGNORE_LABEL, Batch
from data_pipeline.common.errors import UserError
from tests.support.runs import SOLO, TINTS, checkpoint, dotted, images, place_checkpoint, settings_of
from trainer.checkpoint.files import METADATA, WEIGHTS
from trainer.checkpoint.progress import Progress
from trainer.config import Config, load
from trainer.engine.config import EngineConfig
from trainer.engine.loss import training_loss
from trainer.loop import fit
from trainer.optim.config import OptimConfig
from trainer.resilience.signals import StopFlag
from trainer.teacher import Teacher, open_teacher

ROWS, COUNTED, CLASSES = 6, 4, 5


pytestmark = pytest.mark.usefixtures("one_thread")


def drawn() -> tuple[Tensor, Tensor, Batch]:
    """Logits [ROWS, CLASSES] of a network and of its teacher, and a batch of which the last rows do not count."""
    draw = torch.Generator().manual_seed(1)
    ours, theirs = 3 * torch.randn(2, ROWS, CLASSES, generator=draw)
    labels = torch.randint(CLASSES, (ROWS,), generator=draw)
    labels[COUNTED:] = IGNORE_LABEL
    return ours, theirs, Batch(torch.empty(0), labels, torch.arange(ROWS), COUNTED, COUNTED, None)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_soft_loss_is_hintons(temperature: float) -> None:
    ours, theirs, batch = drawn()
    p, q = (torch.exp(rows / temperature) for rows in (theirs, ours))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    apart = (temperature**2 * (p * (p / q).log()).sum(1))[:COUNTED].sum()
    labels = functional.cross_entropy(ours[:COUNTED], batch.labels[:COUNTED], reduction="sum")
    optim = OptimConfig(label_smoothing=0.0, teacher="t", teacher_share=0.3, temperature=temperature)
    torch.testing.assert_close(training_loss(ours, batch, optim, None, theirs), 0.7 * labels + 0.3 * apart)


def test_the_hard_loss_is_that_of_the_teachers_class() -> None:
    ours, theirs, batch = drawn()
    labels = functional.cross_entropy(ours[:COUNTED], batch.labels[:COUNTED], label_smoothing=0.1, reduction="sum")
    taught = functional.cross_entropy(ours[:COUNTED], theirs[:COUNTED].argmax(1), reduction="sum")
    optim = OptimConfig(label_smoothing=0.1, teacher="t", teacher_answer="hard")
    torch.testing.assert_close(training_loss(ours, batch, optim, None, theirs), (labels + taught) / 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def taught(base: Path) -> Path:
    """A run that is trained for an epoch."""
    run = base / "teacher"
    train(base, run)
    return run


def train(base: Path, run: Path, **options: str) -> Progress:
    """Five steps, unless said otherwise."""
    settings = settings_of(base, run, epochs=1) | {name.replace("__", "."): value for name, value in options.items()}
    return fit(load(dotted(settings)), SOLO, StopFlag())


def opened(name: Path | str, classes: list[str]) -> Teacher:
    return open_teacher(str(name), classes, EngineConfig(precision="fp32"), SOLO)


def test_a_resumed_run_has_learned_the_same(
    base: Path, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run, plain = tmp_path / "whole", tmp_path / "run", tmp_path / "plain"
    before = checkpoint(taught)
    train(base, whole, optim__teacher=str(taught))
    train(base, run, optim__teacher=str(taught), run__max_steps="2")
    train(base, run, optim__teacher=str(taught))
    assert f"optim.teacher: {taught}, in " in capsys.readouterr().out
    assert checkpoint(run)["model.safetensors"] == checkpoint(whole)["model.safetensors"]
    train(base, plain)
    assert checkpoint(run)["model.safetensors"] != checkpoint(plain)["model.safetensors"], "it has learned from it"
    assert checkpoint(taught) == before


def test_another_teacher_is_not_taken_for_the_same(base: Path, taught: Path, tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(taught, teacher, symlinks=True)
    train(base, run, optim__teacher=str(teacher), run__max_steps="2")
    shutil.rmtree(teacher)
    train(base, teacher, run__seed="1")
    with pytest.raises(UserError, match=r"^optim\.teacher: its weights are not those with which the run was started"):
        train(base, run, optim__teacher=str(teacher))


def test_outputs_are_found_by_the_names_of_classes(taught: Path, base: Path) -> None:
    names = list(TINTS)
    pixels = torch.randint(256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    all_of_them, some = opened(taught, names)(pixels), opened(taught, [names[5], names[2]])(pixels)
    assert torch.equal(some, all_of_them[:, [5, 2]])
    with pytest.raises(UserError, match=r"does not know 2 of the 3 classes \(mauve, pink\)"):
        opened(taught, ["mauve", "red", "pink"])


@pytest.mark.slow
def test_torchvisions_outputs_are_found_by_imagenets_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision  # type: ignore[import-untyped]

    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    file = tmp_path / "hub/checkpoints" / entry.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.HASH_REGEX", re.compile("(never)"))
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # tench, parachute: numbers 0 and 701 of ImageNet's classes
    teacher = opened("ResNet18_Weights.IMAGENET1K_V1", ["n03888257", "n01440764"])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = network((pixels / 255 - mean) / std)[:, [701, 0]]
    torch.testing.assert_close(teacher(pixels), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="knows ImageNet's 1000 classes, and the 2 here do not have their names"):
        opened("ResNet18_Weights.IMAGENET1K_V1", ["cat", "dog"])


def test_what_is_no_teacher_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match=r"^optim\.teacher: timm has no 'resnet51'"):
        opened("timm:resnet51", ["a", "b"])
    with pytest.raises(UserError, match="is neither a run folder nor weights of torchvision or timm"):
        opened(tmp_path / "none", ["a", "b"])
    with pytest.raises(UserError, match="is not a run folder"):
        opened(images(base), ["a", "b"])


def test_a_run_of_several_classes_teaches_no_single_one(tmp_path: Path) -> None:
    about = {"model": "resnet18", "classes": json.dumps(sorted(TINTS)), "labels": "|"}
    run = place_checkpoint(tmp_path / "run", Config(), {WEIGHTS: save({}, {METADATA: json.dumps(about)})})
    with pytest.raises(UserError, match=r"^optim\.teacher: .* was trained on images of several classes"):
        opened(run, sorted(TINTS))
