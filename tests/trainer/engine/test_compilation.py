"""Parts that torch.compile needs of a machine, and the refusals where they are not there."""

import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipeline.common.errors import UserError
from tests.support.runs import SOLO
from trainer.distributed import DistContext
from trainer.engine.compilation import check_device, check_graphs, choose_compile, compiled, lacking
from trainer.engine.compile_cache import VARIABLE
from trainer.engine.config import EngineConfig
from trainer.model.normalize import Normalise

GPU = DistContext(torch.device("cuda", 0), rank=0, world=1, cores=1)
TWO_GPUS = DistContext(torch.device("cuda", 0), rank=0, world=2, cores=1)


@pytest.fixture(autouse=True)
def looked_for_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    lacking.cache_clear()
    yield
    lacking.cache_clear()


def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})


def without_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that finds no headers of C, as gcc without libc6-dev."""
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\necho 'fatal error: stdio.h: No such file or directory' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


LACKING = [
    (without_compiler, "Triton needs a C compiler, and there is none here; install gcc"),
    (without_headers, r"Triton needs Python's headers, and there is no \S+/Python.h; install python3.\d+-dev"),
    (without_c, r"Triton needs a C compiler, and \S+/gcc cannot build a library here; install gcc and libc6-dev"),
]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="it takes a compiler")
def test_a_whole_machine_lacks_nothing() -> None:
    assert lacking("cuda") is None
    assert choose_compile(EngineConfig(), GPU).compile == "on"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="it takes a compiler")
@pytest.mark.parametrize(("take", "line"), LACKING)
def test_on_a_gpu_auto_goes_without(
    take: object, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take(monkeypatch, tmp_path)  # type: ignore[operator]
    assert choose_compile(EngineConfig(), GPU).compile == "off"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and re.fullmatch(f"engine.compile: auto is off here, as {line}", said[0])
    network = nn.Linear(2, 2)
    assert compiled(network, EngineConfig(), GPU.device) is network
    with pytest.raises(UserError, match=f"engine.compile: on, but {line}, or give off"):
        check_device(EngineConfig(compile="on"), GPU.device)


def test_on_a_cpu_it_needs_another_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch, tmp_path)
    assert choose_compile(EngineConfig(), SOLO).compile == "off"
    with pytest.raises(UserError, match=r"engine.compile: on, but there is no C\+\+ compiler here; install g\+\+"):
        check_device(EngineConfig(compile="on"), SOLO.device)


def test_what_is_asked_for_stays() -> None:
    for asked in (EngineConfig(compile="on"), EngineConfig(compile="off")):
        assert choose_compile(asked, GPU) == asked
    divided = EngineConfig(name="deepspeed", zero_stage=3)
    assert choose_compile(divided, GPU).compile == "off", "which collects weights layer by layer"


class Block(nn.Module):
    """A first convolution and one with a shortcut, as a ResNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalise([0.5] * 3, [0.2] * 3, torch.device("cpu"))
        self.first, self.second = (
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shortcut = torch.relu(self.norms[0](self.first(self.normalise(images))))
        return torch.relu(self.norms[1](self.second(shortcut)) + shortcut)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="it takes a compiler")
def test_norms_and_their_neighbours_are_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the convolutions: normalisation with the cast to bf16, BN with ReLU, BN with the shortcut and ReLU."""
    from torch._inductor.utils import run_and_get_code  # here, for it takes seconds

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    network = Block().to(memory_format=torch.channels_last)
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8).to(memory_format=torch.channels_last)
    forward = compiled(network, EngineConfig(compile="on"), SOLO.device)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(images)

    _, (code,) = run_and_get_code(run)
    kernels = sorted(set(re.findall(r"cpp_fused\w*_\d+", code)), key=lambda name: int(name.rpartition("_")[2]))
    assert len(kernels) == 3, kernels
    fused = (["to_copy", "addcmul"], ["batch_norm", "relu"], ["batch_norm", "add", "relu"])
    for kernel, parts in zip(kernels, fused, strict=True):
        assert all(part in kernel for part in parts), kernels


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graphs_that_would_train_wrongly_are_refused(mode: str) -> None:
    cfg = EngineConfig(compile_mode=mode)  # type: ignore[arg-type]
    check_graphs(cfg, GPU, accumulate=1)
    with pytest.raises(UserError, match=f"engine.compile_mode: {mode} adds up .*169545.*; set it to default"):
        check_graphs(cfg, GPU, accumulate=2)
    with pytest.raises(UserError, match="169545"):
        check_graphs(EngineConfig(compile_mode=mode, fit_memory=True), GPU, accumulate=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"engine.compile_mode: {mode} .*139207 and 140395.*; set it to default"):
        check_graphs(cfg, TWO_GPUS, accumulate=1)
    for harmless in (EngineConfig(), EngineConfig(compile="off", compile_mode=mode)):  # type: ignore[arg-type]
        check_graphs(harmless, TWO_GPUS, accumulate=2)
    check_graphs(cfg, SOLO, accumulate=2)
