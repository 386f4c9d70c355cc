"""A resumed run computes as it did before, or says that it does not."""

from dataclasses import replace

import pytest
import torch

from tests.support.runs import SOLO
from trainer.checkpoint.progress import Arithmetic
from trainer.engine.arithmetic import choose_arithmetic
from trainer.engine.config import EngineConfig, Precision

BEFORE = Arithmetic("fp32", [1], "AVX2")
DIFFER = "its bits will differ from those of a run that was not interrupted: "


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one thread, good at bf16."""
    monkeypatch.setattr("trainer.engine.arithmetic.processor", lambda device: "AVX2")
    good_at(monkeypatch, "bf16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def good_at(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    monkeypatch.setattr(
        "trainer.engine.arithmetic.resolve_precision", lambda wanted, device: precision if wanted == "auto" else wanted
    )


@pytest.mark.parametrize(
    ("options", "before", "precision", "lines"),
    [
        (EngineConfig(), None, "bf16", []),
        (EngineConfig(), BEFORE, "fp32", []),
        (EngineConfig(precision="bf16"), BEFORE, "bf16", [DIFFER + "precision was fp32, now bf16"]),
        (EngineConfig(), replace(BEFORE, processor="AVX512"), "fp32", [DIFFER + "processor was AVX512, now AVX2"]),
        (EngineConfig(), replace(BEFORE, threads=[1, 1]), "fp32", [DIFFER + "it had 2 processes, now 1"]),
        (EngineConfig(threads=3), BEFORE, "fp32", [DIFFER + "threads was 1, now 3"]),
    ],
)
def test_what_is_kept(options: EngineConfig, before: Arithmetic | None, precision: str, lines: list[str]) -> None:
    engine, now, told = choose_arithmetic(options, SOLO, before)
    assert engine.precision == now.precision == precision
    assert (now.threads, now.processor, told) == ([options.threads or 1], "AVX2", lines)


def test_a_precision_that_is_slow_here_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    good_at(monkeypatch, "fp32")
    engine, _, told = choose_arithmetic(EngineConfig(), SOLO, replace(BEFORE, precision="bf16"))
    assert engine.precision == "fp32" and told == [DIFFER + "precision was bf16, now fp32"]


@pytest.mark.parametrize(
    ("wanted", "options", "before", "told"),
    [
        ("3", EngineConfig(), None, True),
        ("1", EngineConfig(), None, False),
        ("3", EngineConfig(threads=2), None, False),
        ("3", EngineConfig(precision="fp32"), BEFORE, False),
        ("cores", EngineConfig(), None, False),
    ],
)
def test_another_number_of_threads_than_the_environment_wants_is_said(
    wanted: str, options: EngineConfig, before: Arithmetic | None, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    lines = choose_arithmetic(options, SOLO, before)[2]
    line = "OMP_NUM_THREADS is 3, but this run computes with 1, one for each core; --engine.threads 3 obeys it"
    assert lines == ([line] if told else [])
