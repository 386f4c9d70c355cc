"""Starts and resumptions of a run in this process: small networks' first steps, of one rank."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.common.errors import UserError
from tests.support.runs import SOLO, checkpoint, dotted, rows, settings_of, tree
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import Store
from trainer.config import load
from trainer.engine.config import EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.loop import fit
from trainer.optim.optimizer import lr_at
from trainer.resilience.signals import StopFlag
from trainer.setup.parts import loaded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def train(base: Path, run: Path, **options: str) -> Progress:
    """Of five steps an epoch, one epoch if not said otherwise."""
    settings = settings_of(base, run, epochs=1) | {name.replace("__", "."): value for name, value in options.items()}
    return fit(load(dotted(settings)), SOLO, StopFlag())


def weights(run: Path) -> tuple[bytes, bytes]:
    files = checkpoint(run)
    return files["model.safetensors"], files["training.pt"]


def test_a_resumed_run_keeps_its_threads(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They decide how sums round: with others some bits would differ."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, run, other = tmp_path / "whole", tmp_path / "run", tmp_path / "other"
    torch.set_num_threads(2)
    train(base, whole)
    train(base, run, run__max_steps="2")
    shutil.copytree(run, other)
    torch.set_num_threads(1)
    assert "OMP_NUM_THREADS is 1, but this run computes with 2" in capsys.readouterr().out
    train(base, run)
    said = capsys.readouterr().out
    assert (
        "keeps 2 threads a process, for the same bits as before; there are cores for 1, which --engine.threads 1"
        in said
    )
    assert "will differ" not in said
    assert torch.get_num_threads() == 1, "what it was before"
    assert weights(run) == weights(whole)

    train(base, other, engine__threads="1")
    said = capsys.readouterr().out
    line = "its bits will differ from those of a run that was not interrupted: threads was 2, now 1\n"
    assert line in said and "keeps 2 threads" not in said


def test_a_deterministic_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses what has no such kernel while it trains, and only then; one decoder takes all images."""
    asked = []

    def look(self: DdpEngine, *given: Any) -> Any:
        asked.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )
        assert not torch.backends.cudnn.benchmark
        return step(self, *given)

    step = DdpEngine.step
    monkeypatch.setattr(DdpEngine, "step", look)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as on a GPU
    plain, deterministic = tmp_path / "plain", tmp_path / "deterministic"
    train(base, deterministic, engine__deterministic="true", run__max_steps="3")
    assert set(asked) == {(True, False)}
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    monkeypatch.setattr(DdpEngine, "step", step)
    train(base, plain, run__max_steps="3")
    assert weights(plain) == weights(deterministic), "on a CPU nothing changes"
    cfg = load(dotted(settings_of(base, plain)))
    assert loaded(cfg).hw_decoder_load == 0.75
    assert loaded(replace(cfg, engine=EngineConfig(deterministic=True))).hw_decoder_load == 0


def test_a_failing_validation_loses_no_step(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one builds a pipeline of its own; what was trained until then is saved, and it is done again."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(base, whole)

    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("no memory for the validation images")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.session.evaluate", fail)
        with pytest.raises(torch.OutOfMemoryError):
            train(base, run)
    assert Store(run).progress().step == 5
    with monkeypatch.context() as patch:
        patch.setattr(DdpEngine, "step", fail)
        assert train(base, run).finished
    assert weights(run) == weights(whole)


def with_memory_for(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a forward pass over more images fail, as on a GPU whose memory is full."""

    def logits(self: DdpEngine, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > images:
            raise torch.OutOfMemoryError(f"no memory for {len(batch)} images")
        return plainly(self, batch)

    plainly = DdpEngine._logits
    monkeypatch.setattr(DdpEngine, "_logits", logits)


def test_batches_are_cut_to_what_memory_holds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each size of batch that the run has, before its first step; a resumed run cuts as before, for the same bits.

    The size is that which the network sees: ColOut makes images smaller.
    """
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = {"engine__fit_memory": "true", "data__size_px": "[32,40]", "run__epochs": "2"}
    options |= {"data__augment__colout": "0.1"}
    with monkeypatch.context() as patch:
        with_memory_for(4, patch)
        train(base, whole, **options)
        said = capsys.readouterr().out
        train(base, run, **options, run__max_steps="2")
    for size_px in (32, 40):
        assert f"engine.fit_memory: 12 images of {size_px} px on each rank, in 4 pieces" in said
    train(base, run, **options)
    assert "12 images of 32 px on each rank, in 4 pieces" in capsys.readouterr().out
    assert weights(run) == weights(whole)

    monkeypatch.undo()
    with_memory_for(0, monkeypatch)
    with pytest.raises(UserError, match=r"data.size_px: there is no memory for one image of 28 px; give a lower one"):
        train(base, tmp_path / "none", **options)


def test_a_finished_run_is_trained_on(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the schedule of all its epochs, and exactly, if it is interrupted in them."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(base, run)
    said = capsys.readouterr().out
    file = run / "checkpoints/best/model.safetensors"
    assert said.splitlines()[-1].startswith("trained 1 epoch: best val top-1 ") and file.is_file()
    assert said.endswith(f"%, weights in {file}; next: python -m trainer.report {run}\n")
    train(base, run)
    assert (
        "is finished: best val top-1" in (said := capsys.readouterr().out) and "give --run.extend_to with more" in said
    )
    before = tree(run)
    with pytest.raises(
        UserError, match=r"run\.epochs was 1, now 2\); to resume it: .*; to train it on: .*--run\.extend_to 2; "
    ):
        train(base, run, run__epochs="2")
    assert tree(run) == before

    shutil.copytree(run, whole)
    assert train(base, whole, run__extend_to="2").finished
    cfg = load(dotted(settings_of(base, run, epochs=2)))
    lr = lr_at(5, cfg.optim, 10)
    said = capsys.readouterr().out
    assert f"it goes on to 2 epochs: the learning rate is that of their schedule; it is {lr:.3g} now" in said
    assert [row["train/lr"] for row in rows(whole) if row["step"] in (6, 9)] == [lr, lr_at(8, cfg.optim, 10)]
    assert {row["step"] for row in rows(whole)} == set(range(1, 11))

    assert train(base, run, run__extend_to="2", run__max_steps="7").step == 7
    assert train(base, run, run__extend_to="2").finished
    assert weights(run) == weights(whole)
    with pytest.raises(UserError, match=r"run\.epochs was 2, now 1"):
        train(base, run)


def test_batches_that_would_have_come_in_another_order(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    batches = {"data__batch": "[12,24]", "run__epochs": "2"}
    train(base, run, **batches)
    before = tree(run)
    with pytest.raises(
        UserError, match=r"run\.extend_to: in 4 epochs data\.batch \[12, 24\] would have come in another"
    ):
        train(base, run, **batches, run__extend_to="4")
    assert tree(run) == before


@pytest.mark.parametrize("option", ["model__weights", "optim__teacher"])
def test_a_start_that_is_refused_late_leaves_no_run(base: Path, tmp_path: Path, option: str) -> None:
    """The networks that a run begins with are read when its folder has been claimed."""
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"nothing (does not exist|is neither)"):
        train(base, run, **{option: str(tmp_path / "nothing")})
    assert not run.exists()


def test_one_value_a_channel_is_refused(base: Path, tmp_path: Path) -> None:
    """And nothing is begun; one image of more pixels is enough."""
    with pytest.raises(UserError, match=r"data\.batch: 1 is one image of 32 px for each rank .* give 2 or more"):
        train(base, tmp_path / "run", data__batch="1", data__size_px="32")
    assert not (tmp_path / "run").exists()
    assert train(base, tmp_path / "run", data__batch="1", data__size_px="40", run__max_steps="1").step == 1


def test_a_wrong_path_is_told_before_other_options(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(base, run, run__max_steps="1")
    before = tree(run)
    with pytest.raises(UserError, match=r"data\.path: .*nowhere"):
        train(base, run, data__path=str(tmp_path / "nowhere"), optim__lr="0.7")
    assert tree(run) == before


def test_a_run_from_before_its_arithmetic_was_kept(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(base, run, run__max_steps="1")
    progress = Store(run).progress()
    assert progress.arithmetic is not None and progress.arithmetic.threads == [1]
    assert progress.arithmetic.differences(progress.arithmetic) == ""
