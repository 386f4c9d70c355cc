"""Sluice from Python: train, open the run, predict; torchvision's network and transforms are the reference."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import v2  # type: ignore[import-untyped]

import trainer
from data_pipeline.common.errors import UserError
from tests.support.runs import ROOT, dotted, images, settings_of, torchvision_network
from trainer import TrainedRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    base = tmp_path_factory.getbasetemp()
    settings = settings_of(base, base / "from Python") | {"run.max_steps": "2", "optim.ema_decay": "0"}
    folder = trainer.train(trainer.load(dotted(settings)))
    assert folder == base / "from Python"
    return trainer.load_run(folder)


def test_predictions_are_those_of_torchvision(run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = sorted((images(tmp_path_factory.getbasetemp()) / "val").rglob("*.jpg"))[:9]
    labels, probabilities = run.predict(files)
    assert labels == [run.classes[row] for row in probabilities.argmax(axis=1)]
    network = torchvision_network(len(run.classes)).eval()
    network.load_state_dict(load_file(run.folder / "checkpoints/last/model.safetensors"))
    cfg = run.config.data
    transform = v2.Compose(
        [
            v2.Resize(round(cfg.validation_px / cfg.eval_crop)),
            v2.CenterCrop(cfg.validation_px),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(cfg.mean, cfg.std),
        ]
    )
    with torch.inference_mode():
        expected = network(torch.stack([transform(Image.open(file)) for file in files])).softmax(dim=1)
    np.testing.assert_allclose(probabilities, expected, atol=0.01)


def test_pixels_are_as_good_as_a_file(run: TrainedRun, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (file, array), probabilities = run.predict([tmp_path / "a.png", pixels])
    assert file == array and (probabilities[0] == probabilities[1]).all()
    assert run.predict([]).probabilities.shape == (0, len(run.classes))


def test_mistakes_are_named(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^images: .*/no\.jpg cannot be read; "):
        run.predict([tmp_path / "no.jpg"])
    with pytest.raises(UserError, match=r"^images: number 0 is float64 \[3, 4\]; give RGB pixels"):
        run.predict([np.zeros((3, 4))])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"is not a run folder"):
        trainer.load_run(tmp_path)


def test_importing_takes_no_torch() -> None:
    program = "import sys, trainer, data_pipeline; assert 'Config' in trainer.__all__; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"
