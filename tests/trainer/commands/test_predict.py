"""Predictions: each image once and in order at any number of ranks, and a sample submission filled in to the letter."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import functional as transforms  # type: ignore[import-untyped]

import trainer
from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.loader import IGNORE_LABEL
from data_pipeline.sources.catalog import open_catalog, open_images
from data_pipeline.sources.listing import UNLABELLED
from tests.conftest import encode, picture
from tests.support.runs import (
    QUICK,
    SOLO,
    TINTS,
    Job,
    dotted,
    images,
    reference,
    settings_of,
    torchvision_network,
    tree,
)
from trainer.config import load_run
from trainer.predict import cli as predict
from trainer.predict import kaggle_submission as sample
from trainer.predict.__main__ import main
from trainer.predict.cli import View, predict_all

CLASSES = sorted(TINTS)
TESTED = 70  # images: two batches, of which the second is not full


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def kaggle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv of ids and labels, train/ID.jpg, test/ID.jpg, and sample_submission.csv in another order."""
    root = tmp_path_factory.mktemp("a 'Kaggle' set")
    for name in ("train", "test"):
        (root / name).mkdir()
    rows = []
    for number, path in enumerate(sorted((images(base) / "train").rglob("*.jpg"))):
        shutil.copy(path, root / "train" / f"{number:04}.jpg")
        rows.append((f"{number:04}", path.parent.name))
    pd.DataFrame(rows, columns=["id", "label"]).to_csv(root / "train.csv", index=False)
    ids = []
    for number, path in enumerate(sorted(images(base).rglob("*.jpg"))[-TESTED:]):
        shutil.copy(path, root / "test" / f"{number:03}.jpg")
        ids.append(f"{number:03}")
    pd.DataFrame({"id": ids[::-1], "label": "black"}).to_csv(root / "sample_submission.csv", index=False)
    return root


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    main()


def text(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def by_torchvision(run: Path, file: Path) -> torch.Tensor:
    """Probabilities [C] of one image, by PIL and torchvision alone."""
    cfg = load_run(run, []).data
    network = torchvision_network(len(CLASSES))
    network.load_state_dict(load_file(run / "checkpoints/best/model.safetensors"))
    image = transforms.resize(Image.open(file).convert("RGB"), round(cfg.validation_px / cfg.eval_crop))
    tensor = transforms.normalize(
        transforms.to_tensor(transforms.center_crop(image, cfg.validation_px)), cfg.mean, cfg.std
    )
    with torch.no_grad():
        probabilities: torch.Tensor = network.eval()(tensor[None]).softmax(dim=1)[0]
        return probabilities


def test_from_files_to_a_submission_in_two_commands(kaggle: Path, tmp_path: Path) -> None:
    run, submission = tmp_path / "run", tmp_path / "submission.csv"
    data = {"data.path": str(kaggle / "train.csv"), "data.images": str(kaggle / "train"), "data.val_share": "0.2"}
    settings = {**QUICK, **data, "run.dir": str(run), "run.epochs": "2"}
    job = Job(1, tmp_path / "train.log", "trainer", *dotted(settings))
    assert job.wait() == 0, job.output()
    before = tree(run)

    given = [str(run), str(kaggle / "test"), "--sample", str(kaggle / "sample_submission.csv")]
    for ranks, out in ((1, submission), (2, tmp_path / "by two ranks.csv")):
        job = Job(ranks, tmp_path / "predict.log", "trainer.predict", *given, "--out", str(out))
        assert job.wait() == 0, job.output()
        assert job.output().count(f"{TESTED} images of") == 1, "said once"
    assert submission.read_bytes() == (tmp_path / "by two ranks.csv").read_bytes()
    assert tree(run) == before, "predicting leaves the run as it is"

    wanted, found = text(kaggle / "sample_submission.csv"), text(submission)
    assert list(found) == list(wanted) and found.id.tolist() == wanted.id.tolist()
    for name, label in found[::5].itertuples(index=False):
        probabilities = by_torchvision(run, kaggle / "test" / f"{name}.jpg")
        assert probabilities.max() - probabilities[CLASSES.index(label)] < 0.02, "at most one on the fence"


def test_probabilities_are_those_of_the_weights_at_any_number_of_ranks(base: Path, tmp_path: Path) -> None:
    run, folder = reference(base, 1), images(base)
    views = ["--flip", "--crops", "5", "--topk", "2", "--probabilities"]
    outs = [tmp_path / f"{number}.csv" for number in range(3)]
    for ranks, out, options in ((1, outs[0], []), (1, outs[1], views), (2, outs[2], views)):
        out_options = ["--out", str(out), *(options or ["--probabilities"])]
        job = Job(ranks, tmp_path / "log", "trainer.predict", str(run), str(folder), *out_options)
        assert job.wait() == 0, job.output()
    assert outs[1].read_bytes() == outs[2].read_bytes()

    table = pd.read_csv(outs[0])
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    assert table.image.tolist() == paths, "nested folders, in the order of their paths"
    assert table.predicted.tolist() == table[CLASSES].idxmax(axis=1).tolist()
    assert np.allclose(table.confidence, table[CLASSES].max(axis=1))
    for row in (0, 7, 63, 64, 79):
        theirs = by_torchvision(run, folder / paths[row]).numpy()
        assert np.allclose(table.loc[row, CLASSES].to_numpy(float), theirs, atol=0.03)

    averaged = pd.read_csv(outs[1])
    ranked = averaged[CLASSES].to_numpy().argsort(axis=1)[:, ::-1]
    assert averaged.predicted_1.tolist() == [CLASSES[place] for place in ranked[:, 0]]
    assert averaged.predicted_2.tolist() == [CLASSES[place] for place in ranked[:, 1]]
    assert not np.allclose(averaged[CLASSES], table[CLASSES], atol=1e-4)


def test_views_by_hand(tmp_path: Path) -> None:
    """Images of exactly the side that is cropped, and a linear model: their means are computed with NumPy."""
    side, crop = 40, 35
    for number in range(3):
        Image.fromarray(np.asarray(picture(side, side, number))).save(tmp_path / f"{number}.png")
    cfg = DataConfig(path=str(tmp_path), size_px=crop, eval_crop=crop / side)
    weights = np.random.default_rng(0).normal(0, 1e-4, (3 * crop * crop, 4))

    def model(pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.double().flatten(1) @ torch.from_numpy(weights)).float().softmax(dim=1)

    found = predict_all(model, 4, open_images(cfg), cfg, SOLO, View(crops=5, flip=True))
    for number in range(3):
        pixels = np.asarray(Image.open(tmp_path / f"{number}.png")).transpose(2, 0, 1)
        corners = [pixels[:, y : y + crop, x : x + crop] for y, x in ((0, 0), (0, 5), (5, 0), (5, 5), (2, 2))]
        logits = np.stack([view.reshape(-1) @ weights for crop_ in corners for view in (crop_, crop_[:, :, ::-1])])
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        wanted = (exponents / exponents.sum(axis=1, keepdims=True)).mean(axis=0)
        assert np.allclose(found.probabilities[number], wanted, atol=1e-5)
    again = predict_all(model, 4, open_images(cfg), cfg, SOLO, View(crops=5, flip=True))
    assert np.array_equal(found.probabilities, again.probabilities)


def test_unlabelled_images_keep_the_order_and_the_names_of_their_table(tmp_path: Path) -> None:
    assert UNLABELLED == IGNORE_LABEL
    (tmp_path / "sub folder").mkdir()
    for name in ("007.jpg", "10.jpg", "sub folder/ü.png"):
        picture(20, 20).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert open_images(DataConfig(path=str(tmp_path))).paths == ["007.jpg", "10.jpg", "sub folder/ü.png"]

    (tmp_path / "table.csv").write_text("id\n10\n007\n")
    catalog = open_images(DataConfig(path=str(tmp_path / "table.csv")))
    assert catalog.paths == ["10.jpg", "007.jpg"] and catalog.labels.tolist() == [IGNORE_LABEL] * 2
    (tmp_path / "table.csv").write_text("id\n10\n7\n")
    with pytest.raises(UserError, match=r"1 of the 2 images that .* are not in .*: 7;"):
        open_images(DataConfig(path=str(tmp_path / "table.csv")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        open_images(DataConfig(path=str(tmp_path / "empty")))


PATHS = ["a/1.jpg", "a/2.jpg", "b/3.png"]
PROBABILITIES = np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.25, 0.5, 0.25]], np.float32)
NAMES = ["cat", "dog", "fish"]


@pytest.mark.parametrize(
    ("content", "topk", "wanted"),
    [
        ("id,label\n3,dog\n1,dog\n2,dog\n", 1, "id,label\n3,dog\n1,cat\n2,fish\n"),
        ("file,species\n3.png,0\n2.jpg,0\n1.jpg,2\n", 1, "file,species\n3.png,1\n2.jpg,2\n1.jpg,0\n"),
        ("Id,x\nb/3,\na/1,\na/2,\n", 1, "Id,x\nb/3,dog\na/1,cat\na/2,fish\n"),
        ("id,label\n3,cat dog\n1,cat\n2,cat\n", 2, "id,label\n3,dog cat\n1,cat dog\n2,fish cat\n"),
        (
            "img,fish,cat,dog\n2,.3,.3,.3\na,0,0,0\n3,0,0,0\n".replace("a,", "1,"),
            1,
            "img,fish,cat,dog\n2,0.75,0.125,0.125\n1,0.25,0.5,0.25\n3,0.25,0.25,0.5\n",
        ),
    ],
)
def test_a_sample_is_filled_in(content: str, topk: int, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text(content)
    form = sample.read(tmp_path / "sample.csv", PATHS, NAMES, topk)
    ranked = np.argsort(-PROBABILITIES, axis=1, kind="stable")[:, :topk]
    assert predict.csv(form.fill(PROBABILITIES, ranked)).decode() == wanted


@pytest.mark.parametrize(
    ("content", "classes", "wanted", "meaning"),
    [
        ("id,label\n3,0\n1,0\n2,0\n", ["1", "2", "3"], "id,label\n3,2\n1,1\n2,3\n", ""),
        ("id,label\n3,0\n1,0\n2,0\n", ["001", "02", "10"], "id,label\n3,02\n1,001\n2,10\n", ""),
        ("id,label\n3,1\n1,2\n2,1\n", ["0", "1", "2"], "id,label\n3,1\n1,0\n2,2\n", ""),
        ("id,x\n3,0\n1,0\n2,0\n", NAMES, "id,x\n3,1\n1,0\n2,2\n", "x is the class's number: 0 cat, 1 dog, 2 fish"),
        ("id;label\n3;dog\n1;dog\n2;dog\n", NAMES, "id,label\n3,dog\n1,cat\n2,fish\n", ""),
        (
            "id,x\n3,\n1,\n2,\n",
            NAMES,
            "id,x\n3,dog\n1,cat\n2,fish\n",
            "x is empty in the sample, and has the classes' names",
        ),
        (
            "id,label\n3,.5\n1,.5\n2,.5\n",
            ["cat", "dog"],
            "id,label\n3,0.5\n1,0.25\n2,0.75\n",
            "label is the probability of dog",
        ),
        (
            "id,label\n3,0.5\n1,0\n2,1\n",
            ["0", "1"],
            "id,label\n3,0.5\n1,0.25\n2,0.75\n",
            "label is the probability of 1",
        ),
        (
            "id,cat\n3,.5\n1,.5\n2,.5\n",
            ["cat", "dog"],
            "id,cat\n3,0.5\n1,0.75\n2,0.25\n",
            "cat is the probability of cat",
        ),
        (
            "id,Is_Cat\n3,.5\n1,.5\n2,.5\n",
            ["cat", "dog"],
            "id,Is_Cat\n3,0.5\n1,0.75\n2,0.25\n",
            "Is_Cat is the probability of cat",
        ),
        (
            "id,no_cactus\n3,.5\n1,.5\n2,.5\n",
            ["cactus", "no cactus"],
            "id,no_cactus\n3,0.5\n1,0.25\n2,0.75\n",
            "no_cactus is the probability of no cactus",
        ),
        ("id,cat\n3,0\n1,0\n2,0\n", ["cat", "dog"], "id,cat\n3,1\n1,1\n2,0\n", "cat is 1 for cat, else 0"),
        (
            "id,cat,dog\n3,.5,.5\n1,.5,.5\n2,.5,.5\n",
            ["cat", "dog"],
            "id,cat,dog\n3,0.5,0.5\n1,0.75,0.25\n2,0.25,0.75\n",
            "",
        ),
    ],
)
def test_a_sample_filled_with_a_constant(
    content: str, classes: list[str], wanted: str, meaning: str, tmp_path: Path
) -> None:
    """Numbers are classes where classes are numbers; one column of .5 is a probability; what is a guess is said."""
    (tmp_path / "sample.csv").write_text(content)
    shares = PROBABILITIES if len(classes) == 3 else np.array([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]], np.float32)
    form = sample.read(tmp_path / "sample.csv", PATHS, classes, 1)
    ranked = np.argsort(-shares, axis=1, kind="stable")[:, :1]
    assert predict.csv(form.fill(shares, ranked)).decode() == wanted
    assert form.meaning == meaning


@pytest.mark.parametrize(
    ("content", "topk", "says"),
    [
        ("id,label\n1,cat\n2,cat\n4,cat\n", 1, "1 of its 3 ids have no image: 4; 1 of the 3 images are not in it: 3;"),
        ("id,label\n1,cat\n2,cat\n", 1, "1 of the 3 images are not in it: 3;"),
        ("id,label\n1,cat\n2,cat\n3,cat\n3,cat\n", 1, "1 ids more than once: 3;"),
        ("id,label\n1,cow\n2,cat\n3,cat\n", 1, "column label of .* shows cow"),
        ("id,label\n1,3\n2,0\n3,0\n", 1, "nor a number below 3"),
        ("id,cat,dog\n1,0,0\n2,0,0\n3,0,0\n", 1, "are not the 3 classes of the run, which fish tell apart"),
        ("id,cat,dog,fish\n1,0,0,0\n2,0,0,0\n3,0,0,0\n", 2, "--topk"),
        ("id\n1\n2\n3\n", 1, "no column beside its ids"),
        ("", 1, "is empty"),
        ("id,label\n1,.5\n2,.5\n3,.5\n", 1, "column label of .* shows .5, neither a class"),
    ],
)
def test_a_sample_of_something_else_is_refused(content: str, topk: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        sample.read(tmp_path / "sample.csv", PATHS, NAMES, topk)
    assert "\n" not in str(error.value).strip()


def test_several_classes_whose_names_have_spaces(tmp_path: Path) -> None:
    """Spaces part the classes of a row: names with spaces are refused, numbers are not."""
    names, file = ["cat", "golf ball", "chain saw"], tmp_path / "sample.csv"
    for shown in ("cat", "", "golf ball"):
        file.write_text(f"id,label\n1,{shown}\n2,{shown}\n3,{shown}\n")
        with pytest.raises(UserError, match=r"^--topk: .*some names have spaces themselves \(golf ball, chain saw\)"):
            sample.read(file, PATHS, names, 2)
    file.write_text("id,label\n1,0 1\n2,0 1\n3,0 1\n")
    filled = sample.read(file, PATHS, names, 2).fill(PROBABILITIES, np.array([[0, 1], [2, 0], [1, 0]]))
    assert filled.label.to_list() == ["0 1", "2 0", "1 0"]


def test_unreadable_images_are_named_and_refused_or_given_the_fallback(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder, out = reference(base, 1), tmp_path / "images", tmp_path / "out.csv"
    folder.mkdir()
    good = encode(picture(60, 80), "PNG")
    damaged = good[:60] + bytes(2000) + good[2060:]
    for name, data in (("good.png", good), ("no image.jpg", b"no image"), ("damaged.png", damaged)):
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=r"2 of the 3 images cannot be read, as damaged.png; .*--fallback"):
        call(monkeypatch, run, folder, "--out", out)
    said = capsys.readouterr().err
    assert said.count("no image.jpg: not a JPEG") == 1 and said.count("damaged.png: its image data are damaged") == 1
    assert not out.exists()

    call(monkeypatch, run, folder, "--out", out, "--fallback", "red", "--probabilities")
    assert "2 cannot be read and are given red" in capsys.readouterr().out
    table = pd.read_csv(out).set_index("image")
    assert table.predicted["no image.jpg"] == table.predicted["damaged.png"] == "red"
    assert np.allclose(table.loc["damaged.png", CLASSES].to_numpy(float), 1 / 7)
    assert table.loc["good.png", CLASSES].to_numpy(float).max() > 1 / 7


def test_nothing_is_overwritten_unasked(
    base: Path, tmp_path: Path, kaggle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    out.write_text("mine")
    given = [reference(base, 1), kaggle / "sample_submission.csv", "--data.images", kaggle / "test", "--out", out]
    with pytest.raises(UserError, match=r"--out: .* exists; .*--force"):
        call(monkeypatch, *given)
    assert out.read_text() == "mine"
    call(monkeypatch, *given, "--force")
    assert text(out).image.tolist() == text(kaggle / "sample_submission.csv").id.tolist(), "as the table names them"
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture(scope="module")
def folds(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of two steps, each trained on one half of the images and validated on the other."""
    root = tmp_path_factory.mktemp("folds")
    for number in (1, 2):
        settings = settings_of(base, root / str(number)) | {"optim.ema_decay": "0", "run.max_steps": "2"}
        settings |= {"data.path": str(images(base) / "train"), "data.fold": f"{number}/2", "run.seed": str(number)}
        trainer.train(trainer.load(dotted(settings)))
    return [root / "1", root / "2"]


def test_several_runs_are_averaged(
    folds: list[Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = images(base) / "val"
    alone = []
    for run in folds:
        call(monkeypatch, run, folder, "--out", tmp_path / "one.csv", "--probabilities", "--force")
        alone.append(pd.read_csv(tmp_path / "one.csv"))
    call(monkeypatch, *folds, folder, "--out", tmp_path / "mean.csv", "--probabilities")
    mean = pd.read_csv(tmp_path / "mean.csv")
    assert list(mean.columns) == list(alone[0].columns) and (mean.image == alone[0].image).all()
    np.testing.assert_allclose(mean[CLASSES], (alone[0][CLASSES] + alone[1][CLASSES]) / 2, atol=1e-6)
    assert not np.allclose(alone[0][CLASSES], alone[1][CLASSES], atol=1e-3), "the runs must differ"
    assert (mean.predicted == mean[CLASSES].idxmax(axis=1)).all()


def test_the_out_of_fold_table_has_every_image_once_by_the_run_that_held_it_out(
    folds: list[Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, *folds, "--oof", tmp_path / "oof.csv")
    table = pd.read_csv(tmp_path / "oof.csv")
    root = images(base) / "train"
    assert sorted(table.image) == sorted(map(str, root.rglob("*.jpg")))
    assert (table.label == table.image.map(lambda name: Path(name).parent.name)).all()
    right = table.predicted == table.label
    recall = 100 * right.groupby(table.label).mean().mean()
    assert capsys.readouterr().out.endswith(
        f"{len(table)} images held out by 2 runs: top-1 {100 * right.mean():.2f} %  macro recall {recall:.2f} %\n"
    )
    # The second run's rows are those that it predicts of a folder.
    call(monkeypatch, folds[1], root, "--out", tmp_path / "second.csv", "--probabilities")
    second = pd.read_csv(tmp_path / "second.csv").assign(image=lambda rows: [f"{root}/{name}" for name in rows.image])
    cfg = load_run(folds[1], []).data
    held = [f"{root}/{name}" for name in open_catalog(cfg, "val").paths]
    ours, theirs = (rows.set_index("image").loc[held, CLASSES] for rows in (table, second))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # An image that both runs held out has their mean.
    call(monkeypatch, folds[1], folds[1], "--oof", tmp_path / "oof.csv", "--force")
    twice = pd.read_csv(tmp_path / "oof.csv").set_index("image")
    np.testing.assert_allclose(twice.loc[held, CLASSES], theirs, atol=1e-5)
    assert len(twice) == len(held)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["no such folder", "--out", "x.csv"], "IMAGES: no such folder is neither"),
        (["--out", "x.csv"], "IMAGES: they are missing"),
        (["FOLDER", "FOLDER", "--out", "x.csv"], "FOLDER is not a run folder"),
        (["--oof", "nowhere/x.csv"], "--oof: nowhere is not a folder"),
        (["FOLDER", "--oof", "x.csv", "--out", "./x.csv"], "--oof: x.csv is the file of --out, too"),
        (["FOLDER"], "--out: it is missing"),
        (["FOLDER", "--out", "no such folder/x.csv"], "--out: no such folder is not"),
        (["FOLDER", "--out", "x.csv", "--topk", "0"], "--topk: 0"),
        (["FOLDER", "--out", "x.csv", "--topk", "8"], "--topk: 8"),
        (["FOLDER", "--out", "x.csv", "--crops", "3"], "--crops: invalid choice: 3"),
        (["FOLDER", "--out", "x.csv", "--crops", "5", "--data.eval_crop", "1"], "--crops: 5"),
        (["FOLDER", "--out", "x.csv", "--fallback", "cow"], "--fallback: cow"),
        (["FOLDER", "--out", "x.csv", "--sample", "x", "--probabilities"], "--probabilities: "),
        (
            ["FOLDER", "--out", "x.csv", "--sample", "no such file"],
            "--sample: no such file is no table that can be read (No such file or directory)",
        ),
        (["FOLDER", "--out", "x.csv", "--smaple", "x"], "--smaple: no such option"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], says: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = reference(base, 1), str(images(base) / "val" / "red")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        call(monkeypatch, run, *(folder if option == "FOLDER" else option for option in options))
    assert str(error.value).startswith(says.replace("FOLDER", folder)) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
