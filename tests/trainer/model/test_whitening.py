"""A whitened stem: answers of unit variance that are not alike, by NumPy's covariance; the same wherever it is computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.sources.catalog import open_catalog
from tests.support.runs import QUICK, SOLO, Job, dotted, render_images
from trainer.checkpoint.files import load_weights
from trainer.checkpoint.store import Store
from trainer.model.resnet import ModelConfig, Stem, build_resnet
from trainer.model.whitening import set_filters, whiten_stem

QUICK_NETWORK = ModelConfig(width=float(QUICK["model.width"]))


def noise(images: int = 64, side: int = 32) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are alike."""
    plain = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    return functional.avg_pool2d(plain, 3, 1, padding=1) + 0.1 * plain.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(("stem", "width"), [("conv", 1.0), ("deep", 1.0), ("patch", 0.5)])
def test_filters_answer_with_unit_variance_and_apart(stem: Stem, width: float) -> None:
    network = build_resnet(ModelConfig(stem=stem, width=width), 10)
    images = noise()
    set_filters(network, images)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    half = first.out_channels // 2
    with torch.no_grad():
        answers = functional.conv2d(images, first.weight, stride=first.stride).double()
    seen = answers.transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(seen[half:], -seen[:half], rtol=1e-4, atol=1e-4)
    second = seen[:half] @ seen[:half].T / seen.shape[1]
    # A floor keeps directions of little variance below one.
    assert np.diag(second).max() <= 1.001 and np.diag(second)[-1] > 0.999
    np.testing.assert_allclose(second, np.diag(np.diag(second)), atol=1e-3)
    assert second.trace() > 0.9 * half


def test_filters_beyond_the_directions_stay_as_they_are() -> None:
    torch.manual_seed(0)
    wide = build_resnet(ModelConfig(stem="patch", width=2.0), 10)  # 128 filters of 3 * 4 * 4 numbers
    before = wide.get_parameter("conv1.weight").detach().clone()
    set_filters(wide, noise())
    assert torch.equal(wide.get_parameter("conv1.weight")[96:], before[96:])
    assert not torch.equal(wide.get_parameter("conv1.weight")[:96], before[:96])


def test_a_run_starts_so_on_every_rank(tmp_path: Path) -> None:
    """From the same filters at one rank and at two."""
    data = render_images(tmp_path / "data")
    options = QUICK | {"data.path": str(data), "model.whiten": "true", "optim.lr": "1e-30", "optim.weight_decay": "0"}
    stems = []
    for ranks in (1, 2):
        run = tmp_path / f"run{ranks}"
        job = Job(
            ranks, tmp_path / f"{ranks}.log", "trainer", *dotted(options | {"run.dir": str(run), "run.max_steps": "1"})
        )
        assert job.wait() == 0, job.output()
        newest = Store(run).newest()
        assert newest
        network = build_resnet(QUICK_NETWORK, 7)
        load_weights(network, newest)
        stems.append(network.get_parameter("conv1.weight").detach())
    cfg = DataConfig(path=str(data))
    expected = build_resnet(QUICK_NETWORK, 7)
    whiten_stem(expected, open_catalog(cfg, "train"), cfg, int(QUICK["data.size_px"]), SOLO)
    for stem in stems:
        torch.testing.assert_close(stem, expected.get_parameter("conv1.weight").detach())


def test_without_a_readable_image_it_ends_in_one_line(tmp_path: Path) -> None:
    cfg = DataConfig(path=str(render_images(tmp_path)))
    catalog = open_catalog(cfg, "train")
    for path in catalog.paths:
        (catalog.root / path).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^model\.whiten: none of \d+ images in .* could be read; leave it out$"):
        whiten_stem(build_resnet(ModelConfig(), 7), catalog, cfg, 32, SOLO)
