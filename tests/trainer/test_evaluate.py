"""Scores are exact counts, whatever the number of ranks, and the command prints them."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from torchvision.transforms import functional as transforms  # type: ignore[import-untyped]

import trainer
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import open_catalog
from tests.support import warm
from tests.support.runs import (
    SOLO,
    TINTS,
    TRAIN,
    VAL,
    Job,
    dotted,
    images,
    reference,
    render_images,
    rows,
    settings_of,
    torchvision_network,
    tree,
)
from trainer.checkpoint.files import load_weights
from trainer.checkpoint.progress import read_progress
from trainer.checkpoint.store import Store
from trainer.config import load, load_run, to_yaml
from trainer.distributed import DistContext
from trainer.engine.config import EngineConfig
from trainer.engine.prediction import Predictor
from trainer.evaluate import main
from trainer.model.normalize import Normalise
from trainer.model.resnet import build_resnet
from trainer.scoring import Trained, evaluate, evaluate_classes, open_scored, scored_on, with_mirror
from trainer.tracking.meter import Scores


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def scored(run: Path, ctx: DistContext) -> Scores:
    cfg = load_run(run, [])
    checkpoint = Store(run).chosen()
    assert checkpoint is not None
    network = build_resnet(cfg.model, len(TINTS)).to(memory_format=torch.channels_last)
    load_weights(network, checkpoint)
    normalise = Normalise(cfg.data.mean, cfg.data.std, ctx.device)
    loader = Loader(cfg.data, open_catalog(cfg.data, "val", list(TINTS)), ctx, training=False)
    scores = evaluate(Predictor(network, normalise, EngineConfig(precision="fp32"), ctx.device), loader, ctx)
    assert isinstance(scores, Scores)
    return scores


def score_as_rank(rank: int, world: int, run: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save(list(scored(run, DistContext(torch.device("cpu"), rank, world, 1))), folder / f"rank {rank}")
    dist.destroy_process_group()


def by_torchvision(run: Path, folder: Path) -> Scores:
    """The scores of the run's chosen weights, one image at a time, by PIL and torchvision alone."""
    cfg = load_run(run, []).data
    network = torchvision_network(len(TINTS))
    network.load_state_dict(load_file(run / "checkpoints/best/model.safetensors"))
    network.eval()
    sums = [0.0, 0.0, 0.0, 0.0]
    for label, name in enumerate(sorted(TINTS)):
        for path in (folder / "val" / name).iterdir():
            image = Image.open(path).convert("RGB")
            image = transforms.resize(image, round(cfg.validation_px / cfg.eval_crop))
            image = transforms.center_crop(image, cfg.validation_px)
            tensor = transforms.normalize(transforms.to_tensor(image), cfg.mean, cfg.std)
            with torch.no_grad():
                logits = network(tensor[None])
            best = logits[0].argsort(descending=True)
            loss = functional.cross_entropy(logits, torch.tensor([label])).item()
            sums = [a + b for a, b in zip(sums, (loss, best[0] == label, label in best[:5], 1), strict=True)]
    return Scores.of([float(value) for value in sums])


def test_counts_are_exact_at_any_number_of_ranks(base: Path, tmp_path: Path) -> None:
    run = reference(base, 1)
    alone = scored(run, SOLO)
    assert alone.images == VAL
    assert all(VAL % number for number in (2, 3, *load_run(run, []).data.batches))

    theirs = by_torchvision(run, images(base))
    assert alone.images == theirs.images
    # The resampling filters differ by a unit of 255 here and there: room for one image on the fence.
    assert alone.top1_pct == pytest.approx(theirs.top1_pct, abs=100 / VAL + 1e-9)
    assert alone.top5_pct == pytest.approx(theirs.top5_pct, abs=100 / VAL + 1e-9)
    assert alone.loss == pytest.approx(theirs.loss, rel=0.05)

    for world in (2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        warm.start_ranks(score_as_rank, (world, run, folder), world)
        for rank in range(world):
            loss, *counts = torch.load(folder / f"rank {rank}")
            assert counts == list(alone[1:]), f"rank {rank} of {world}"
            assert loss == pytest.approx(alone.loss, abs=1e-6)


def test_scores_by_hand(tmp_path: Path) -> None:
    """A predictor that knows one class only, on images counted by hand; its loss is known too."""
    cfg = DataConfig(path=str(render_images(tmp_path)), batch=8, size_px=16)
    logits = torch.arange(7.0).flip(0)  # most for the first class, least for the last
    loader = Loader(cfg, open_catalog(cfg, "val", sorted(TINTS)), SOLO, training=False)
    scores = evaluate(lambda images: logits.expand(len(images), 7), loader, SOLO)
    counts = np.array([len(list((tmp_path / "val" / name).iterdir())) for name in sorted(TINTS)])
    losses = np.log(np.exp(logits.numpy()).sum()) - logits.numpy()
    assert scores == pytest.approx(
        ((counts * losses).sum() / VAL, 100 * counts[0] / VAL, 100 * counts[:5].sum() / VAL, VAL, 100 / 7), rel=1e-6
    )
    assert evaluate(lambda images: logits.expand(len(images), 7), loader, SOLO) == scores, "a second time"


def test_counts_by_class_are_those_of_sklearns_formulas(tmp_path: Path) -> None:
    """A predictor at random, on validation images of uneven classes, one of them without any."""
    folder = render_images(tmp_path)
    for number, name in enumerate(sorted(TINTS)):
        for file in sorted((folder / "val" / name).iterdir())[number:]:
            file.unlink()
    cfg = DataConfig(path=str(folder), batch=5, size_px=16)
    catalog = open_catalog(cfg, "val", sorted(TINTS))
    loader = Loader(cfg, catalog, SOLO, training=False)
    logits = torch.randn(len(catalog), 7, generator=torch.Generator().manual_seed(2))
    parts = iter(logits.split(5))

    def predict(images: torch.Tensor) -> torch.Tensor:
        rows = next(parts)
        return torch.cat([rows, torch.zeros(len(images) - len(rows), 7)])

    scores, counts = evaluate_classes(predict, loader, SOLO)
    labels, predicted = torch.from_numpy(catalog.labels), logits.argmax(dim=1)
    assert counts.images.tolist() == [int((labels == name).sum()) for name in range(7)] and 0 in counts.images
    assert counts.predicted.tolist() == [int((predicted == name).sum()) for name in range(7)]
    assert counts.hits.tolist() == [int(((predicted == name) & (labels == name)).sum()) for name in range(7)]
    recalls = [float((predicted == labels)[labels == name].float().mean()) for name in labels.unique()]
    assert scores.macro_recall_pct == pytest.approx(100 * np.mean(recalls))


@pytest.mark.parametrize("by", ["macro_recall", "loss"])
def test_the_best_weights_are_those_of_the_score_that_was_asked_for(by: str, base: Path, tmp_path: Path) -> None:
    """Also over a resume, before which another epoch's weights may have been the best."""
    settings = settings_of(base, tmp_path / "run") | {"run.best_by": by, "run.epochs": "2", "optim.ema_decay": "0"}
    for more in ({}, {"run.extend_to": "3"}):
        trainer.train(trainer.load(dotted(settings | more)))
        found = [row for row in rows(tmp_path / "run") if "val/loss" in row]
        score, best = ("val/loss", min) if by == "loss" else ("val/macro_recall_pct", max)
        chosen = best(row[score] for row in found)
        saved = read_progress(tmp_path / "run/checkpoints/best")
        assert saved.step == next(row["step"] for row in found if row[score] == chosen)
        assert (saved.best_by, saved.best_score) == (by, pytest.approx(chosen))
        last = Store(tmp_path / "run").progress()
        assert last.best_score == saved.best_score and last.best.startswith(f"val {by.replace('_', ' ')} ")


def test_command_prints_what_the_training_found(base: Path) -> None:
    run = reference(base, 1)
    before = tree(run)
    job = Job(2, base / "evaluate.log", "trainer.evaluate", str(run))
    assert job.wait() == 0, job.output()
    lines = [line for line in job.output().splitlines() if "top-1" in line]
    assert len(lines) == 1, "printed once, by rank 0"
    wanted = scored(run, SOLO)
    assert lines[0] == (
        f"{(run / 'checkpoints/best').resolve()} on 23 of 23 images in {images(base) / 'val'}: "
        f"loss {wanted.loss:.4f}  top-1 {wanted.top1_pct:.2f} %  top-5 {wanted.top5_pct:.2f} %  "
        f"macro recall {wanted.macro_recall_pct:.2f} %"
    )
    first = [line.partition(" ")[0] for line in job.output().splitlines()]
    assert [word for word in first if word in TINTS or word == "mean"] == [*sorted(TINTS), "mean"], "a row a class"
    assert f"{wanted.top1_pct:.2f}" == f"{Store(run).progress().best_top1_pct:.2f}"
    assert tree(run) == before, "evaluating writes nothing"


def test_command_on_other_images(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three classes of the seven keep their labels, mirrored or not."""
    other = tmp_path / "other images"
    for split in ("train", "val"):
        for name in ("cyan", "red", "yellow"):
            shutil.copytree(images(base) / split / name, other / split / name)
    kept = len(list((other / "val").rglob("*.jpg")))
    monkeypatch.setattr(sys, "argv", ["", str(reference(base, 1)), "--flip", "--data.path", str(other)])
    main()
    found = re.fullmatch(
        rf".*, with mirror images, on {kept} of {kept} images in {other}/val: loss \d+\.\d+  top-1 (.*) %  top-5 (.*) %  "
        r"macro recall (.*) %\n",
        capsys.readouterr().out.splitlines(keepends=True)[-1],
    )
    assert found and float(found[1]) > 50, "labels are those of the training"


def test_command_scores_the_whole_of_a_folder_that_is_not_the_runs_own(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(base) / "val"
    monkeypatch.setattr(sys, "argv", ["", str(reference(base, 1)), "--data.path", str(folder)])
    main()
    assert f" on {VAL} of {VAL} images in {folder}: loss" in capsys.readouterr().out


def test_only_the_held_out_part_of_the_runs_own_set_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the set was moved, or is named otherwise; a copy that has changed is another set."""
    own = render_images(tmp_path / "images") / "train"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    cfg = replace(load([]), data=DataConfig(path="images/train", val_share=0.3))
    (tmp_path / "run/config.yaml").write_text(to_yaml(cfg))
    seen = open_catalog(cfg.data, "train").fingerprint()
    trained = Trained(tmp_path, sorted(TINTS), seen, lambda images: images)  # type: ignore[arg-type]

    def scored(path: Path) -> str:
        catalog = open_scored(tmp_path / "run", replace(cfg.data, path=str(path)), trained)
        return scored_on(catalog, len(catalog) - 1).partition(" images in ")[0]

    held_out = len(open_catalog(cfg.data, "val"))
    assert 8 < held_out < 30
    text = f"{held_out - 1} of {held_out} held out of {TRAIN}"
    assert scored(Path("images/train")) == scored(own) == text
    assert capsys.readouterr().err == ""
    trained = trained._replace(data="of another division")
    assert scored(own) == text
    assert f"some of its {held_out} validation images may have been trained on" in capsys.readouterr().err
    trained = trained._replace(data=seen)
    moved = own.rename(tmp_path / "moved")
    assert scored(moved) == text
    (moved / open_catalog(replace(cfg.data, path=str(moved)), "train").paths[0]).unlink()
    assert scored(moved) == f"{TRAIN - 2} of {TRAIN - 1}"


def test_unreadable_images_are_left_out_and_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(images(base), tmp_path / "other images")
    next((other / "val" / "red").iterdir()).write_bytes(b"no image")
    monkeypatch.setattr(sys, "argv", ["", str(reference(base, 1)), "--data.path", str(other)])
    main()
    assert "on 22 of 23 images" in capsys.readouterr().out


def test_a_mirror_image_has_half_a_say(tmp_path: Path) -> None:
    """A predictor that goes by the brightness of the left half: with mirror images it is the mean of both halves' words."""
    cfg = DataConfig(path=str(render_images(tmp_path)), batch=8, size_px=16)
    loader = Loader(cfg, open_catalog(cfg, "val", sorted(TINTS)), SOLO, training=False)

    def by_half(images: torch.Tensor) -> torch.Tensor:
        left = images[..., :8].float().mean(dim=(1, 2, 3)) / 100
        return torch.stack([left] + [torch.zeros_like(left)] * (len(TINTS) - 1), dim=1)

    losses = []
    for batch in loader:
        shares = [by_half(images).softmax(1) for images in (batch.images, batch.images.flip(3))]
        rows = torch.arange(batch.num_real)
        losses += (-((shares[0] + shares[1]) / 2).log()[rows, batch.labels[rows]]).tolist()
    scores = evaluate(with_mirror(by_half), loader, SOLO)
    assert scores.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert scores.loss != evaluate(by_half, loader, SOLO).loss
