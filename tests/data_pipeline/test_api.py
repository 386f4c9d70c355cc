"""The data pipeline from Python, without the trainer: what its README and its docstring show, run as it stands there."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import data_pipeline
from data_pipeline import AugmentConfig, Batch, DataConfig, Loader, RankInfo, open_catalog
from tests.conftest import ROOT, in_order, take


def test_the_readmes_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "data_pipeline/README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example.replace('"/data/imagenette", batch=64', f"{str(folder)!r}, batch=16"), names)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6 and said[-1].startswith("Cursor(epoch=1, seen=48) torch.Size([16, 3, 128, 128]) [")


def test_the_docstrings_example(folder: Path) -> None:
    (example,) = doctest.DocTestFinder().find(data_pipeline, "data_pipeline", data_pipeline)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    names: dict[str, object] = {"train": lambda images, labels: seen.append((images, labels))}
    for step in example.examples:
        exec(step.source.replace('"/data/imagenette", batch=64', f"{str(folder)!r}, batch=16"), names)
    assert len(seen) == 6
    for images, labels in seen:
        assert images.shape == (16, 3, 128, 128) and images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_loader_finds_its_images_itself(folder: Path) -> None:
    cfg = DataConfig(str(folder), batch=12, size_px=32, threads=2, augment=AugmentConfig(min_area=0.2))
    for training, split in ((True, "train"), (False, "val")):
        found = in_order([take(Loader(cfg, training=training))])
        ranks = [RankInfo(rank=rank, world=2, cores=1) for rank in range(2)]
        shared = in_order([take(Loader(cfg, open_catalog(cfg, split), one, training=training)) for one in ranks])
        assert all(map(torch.equal, found, shared))


def test_names_are_imported_when_they_are_used() -> None:
    for name in data_pipeline.__all__:
        assert getattr(data_pipeline, name) is not None
    assert data_pipeline.Batch is Batch
    with pytest.raises(AttributeError, match="module 'data_pipeline' has no attribute 'Lader'"):
        _ = data_pipeline.Lader
