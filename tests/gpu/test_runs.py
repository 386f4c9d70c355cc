"""Whole runs on a GPU; nobody has run them yet. `pytest -m gpu` on a machine that has one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import QUICK, Job, dotted, images
from trainer.checkpoint.files import WEIGHTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def trained(base: Path, run: Path, **options: str) -> dict[str, torch.Tensor]:
    settings = {**QUICK, "data.path": str(images(base)), "run.dir": str(run), "run.epochs": "2", **options}
    job = Job(1, run.with_suffix(".log"), "trainer", *dotted(settings), cold=True)
    assert job.wait() == 0, job.output()
    return load_file(run / "checkpoints/last" / WEIGHTS)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_in_each_precision(base: Path, tmp_path: Path, precision: str) -> None:
    weights = trained(base, tmp_path / "run", **{"engine.precision": precision})
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_an_interrupted_run_ends_with_the_same_weights(base: Path, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "whole", **{"engine.compile": "off"})
    trained(base, tmp_path / "parts", **{"engine.compile": "off", "run.max_steps": "7"})
    parts = trained(base, tmp_path / "parts", **{"engine.compile": "off"})
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile", ["off", "auto"])
def test_a_deterministic_run_ends_with_the_same_bits(base: Path, tmp_path: Path, compile: str) -> None:
    options = {"engine.deterministic": "true", "engine.compile": compile}
    whole = trained(base, tmp_path / "whole", **options)
    trained(base, tmp_path / "parts", **options, **{"run.max_steps": "7"})
    parts = trained(base, tmp_path / "parts", **options)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_decoding_on_either_processor(base: Path, tmp_path: Path) -> None:
    for decode in ("gpu", "cpu"):
        weights = trained(base, tmp_path / decode, **{"data.decode": decode})
        assert all(torch.isfinite(value).all() for value in weights.values())
