"""Commands on a run whose images have several classes: each form is written as it came in, by the thresholds that were found."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from data_pipeline.common.errors import UserError
from data_pipeline.sources.catalog import open_catalog
from tests.support.runs import LIGHTS, QUICK, SOLO, Job, checkpoint, dotted, place_checkpoint, render_lights, rows
from trainer import load_run
from trainer.checkpoint.files import METADATA, WEIGHTS, read_metadata
from trainer.config import load
from trainer.config import load_run as read_config
from trainer.engine.prediction import Predictor
from trainer.evaluate import main as evaluate
from trainer.model.resnet import build_resnet
from trainer.predict import several_classes
from trainer.predict.__main__ import main as predict
from trainer.predict.class_columns import with_classes
from trainer.report.__main__ import main as report
from trainer.scoring import open_trained

CLASSES = sorted(LIGHTS)
COUNT = 48


def placed(run: Path, table: Path, written: str) -> Path:
    """A run with a drawn network, and for each class a threshold that about half of the images reach."""
    options = {name: value for name, value in QUICK.items() if not name.startswith("run.")}
    cfg = load(["--data.path", str(table), "--run.dir", str(run), *dotted(options)])
    torch.manual_seed(0)
    network = build_resnet(cfg.model, 3)
    torch.nn.init.normal_(network.fc.weight)
    about = {"model": cfg.model.name, "classes": json.dumps(CLASSES), "labels": written}
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}

    for _ in range(2):  # without thresholds, then with them
        place_checkpoint(run, cfg, {WEIGHTS: safetensors.torch.save(weights, {METADATA: json.dumps(about)})})
        found = load_run(run).predict([str(path) for path in sorted(table.parent.rglob("*.jpg"))])
        about["thresholds"] = json.dumps(np.median(found.probabilities.astype(np.float64), axis=0).tolist())
    return run


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on lists that a bar divides; its images are beside it, in set/images."""
    folder = tmp_path_factory.mktemp("lists")
    return placed(folder / "run", render_lights(folder / "set", COUNT, "|"), "|")


def call(monkeypatch: pytest.MonkeyPatch, command: object, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    command()  # type: ignore[operator]


def text(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def said(run: Path) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Name, classes and probabilities of each image, from Python."""
    paths = sorted((run.parent / "set/images").glob("*.jpg"))
    labels, probabilities = load_run(run).predict([str(path) for path in paths])
    return [path.stem for path in paths], labels, probabilities  # type: ignore[return-value]


def test_predictions_are_lists_as_in_the_table_or_columns(
    lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = lists.parent / "set/images", tmp_path / "out.csv"
    names, labels, probabilities = said(lists)
    thresholds = np.array(json.loads(read_metadata(lists / "checkpoints/best")["thresholds"]))
    assert labels == [[CLASSES[c] for c in np.flatnonzero(row)] for row in probabilities >= thresholds]
    assert len({len(row) for row in labels}) > 2, "images of one class, of several"

    call(monkeypatch, predict, lists, images, "--out", out)
    assert text(out).to_dict("list") == {
        "image": [f"{name}.jpg" for name in names],
        "predicted": ["|".join(row) for row in labels],
    }
    call(monkeypatch, predict, lists, images, "--out", out, "--force", "--probabilities")
    assert np.allclose(pd.read_csv(out)[CLASSES], probabilities, atol=1e-6)

    # Samples: lists of names or of numbers, columns of marks or of probabilities.
    backwards = names[::-1]
    sample = tmp_path / "sample.csv"
    for column, cells, wanted, meaning in (
        ("lights", ["red|blue", "blue"], ["|".join(row) for row in labels], "lists classes, separated by '|'"),
        ("lights", ["red;blue", "blue"], [";".join(row) for row in labels], "separated by ';'"),
        (
            "n",
            ["0 2", "1"],
            [" ".join(str(CLASSES.index(name)) for name in row) for row in labels],
            "by their numbers: 0 blue",
        ),
    ):
        pd.DataFrame({"id": backwards, column: (cells * COUNT)[:COUNT]}).to_csv(sample, index=False)
        call(monkeypatch, predict, lists, images, "--out", out, "--force", "--sample", sample)
        assert text(out).to_dict("list") == {"id": backwards, column: wanted[::-1]}
        assert meaning in capsys.readouterr().out
    for marks, values, meaning in (
        ([0, 1], (probabilities >= thresholds).astype(float), "0 or 1, as in the sample"),
        ([0, 0], probabilities, "probabilities"),
    ):
        columns = dict.fromkeys(LIGHTS, (marks * COUNT)[:COUNT])
        pd.DataFrame({"id": backwards, **columns}).to_csv(sample, index=False)
        call(monkeypatch, predict, lists, images, "--out", out, "--force", "--sample", sample)
        filled = pd.read_csv(out, dtype={"id": str})
        assert filled.id.tolist() == backwards and list(filled)[1:] == list(LIGHTS)
        assert np.allclose(filled[CLASSES], values[::-1], atol=1e-6)
        assert meaning in capsys.readouterr().out


def test_columns_of_marks_come_back_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = placed(tmp_path / "run", render_lights(tmp_path / "set", COUNT, "columns"), "columns")
    names, labels, _ = said(run)
    call(
        monkeypatch, predict, run, run, tmp_path / "set/images", "--out", tmp_path / "out.csv"
    )  # an ensemble of itself
    table = text(tmp_path / "out.csv")
    assert list(table) == ["image", *CLASSES] and table.image.tolist() == [f"{name}.jpg" for name in names]
    assert [[name for name in CLASSES if row[name] == "1"] for _, row in table.iterrows()] == labels
    assert {*table[CLASSES].to_numpy().ravel()} == {"0", "1"}


NAMED: list[tuple[list[str], str, list[str], str, str]] = [
    (["cat", "hot dog"], "columns", ["hot dog|cat", "cat"], "|", "cat|hot dog"),
    (["cat", "hot dog"], "columns", ["hot dog", "cat"], "|", "cat|hot dog"),
    (["cat", "dog"], "columns", ["dog", "cat"], " ", "cat dog"),
    (["cat", "cat dog", "dog"], "columns", ["cat dog", "dog"], "|", "cat|cat dog"),
    (["a b", "c|d", "e;f"], "columns", ["a b", "c|d"], ",", "a b,c|d"),
    (["cat", "hot dog"], ";", ["cat", "cat"], ";", "cat;hot dog"),
    (["cat", "hot dog"], "columns", ["0 1", "1"], " ", "0 1"),
]


@pytest.mark.parametrize(("classes", "written", "cells", "mark", "filled"), NAMED)
def test_no_name_is_cut_by_what_divides_a_list(
    classes: list[str], written: str, cells: list[str], mark: str, filled: str, tmp_path: Path
) -> None:
    pd.DataFrame({"id": ["a", "b"], "label": cells}).to_csv(tmp_path / "sample.csv", index=False)
    form = several_classes.read(tmp_path / "sample.csv", ["a.jpg", "b.jpg"], classes, written)
    assert (form.shows, form.mark) == ("lists", mark)
    said = np.array([[True, True, False][: len(classes)], [False] * len(classes)])
    assert form.fill(said.astype(np.float32), said).label.tolist() == [filled, ""]


def test_a_separator_that_a_name_holds_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"id": ["a"], "label": ["hot dog cat"]}).to_csv(tmp_path / "sample.csv", index=False)
    with pytest.raises(
        UserError, match=r"which are no lists of classes .* divided by a character that no class's name"
    ):
        several_classes.read(tmp_path / "sample.csv", ["a.jpg"], ["cat", "hot dog"], "columns")
    with pytest.raises(UserError, match="have every character that could stand between two"):
        several_classes.separator_of("columns", [" |;", ",/", "\t"])


def test_a_class_named_like_a_column_has_another(capsys: pytest.CaptureFixture[str]) -> None:
    classes = ["class predicted", "image", "predicted", "red"]
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    table = with_classes(pd.DataFrame({"image": ["a", "b"], "predicted": ["red", "image"]}), values, classes)
    own = ["class predicted", "class image", "class class predicted", "red"]
    assert list(table) == ["image", "predicted", *own] and table.image.tolist() == ["a", "b"]
    assert np.array_equal(table[own].to_numpy(), values)
    assert capsys.readouterr().err.splitlines() == [
        "image: the column of this class is 'class image'",
        "predicted: the column of this class is 'class class predicted'",
    ]


def test_evaluation_and_report_use_the_thresholds(
    lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = open_catalog(read_config(lists, []).data, "val")
    names, labels, _ = said(lists)
    places = [names.index(Path(path).stem) for path in catalog.paths]
    truth = [catalog.names_of(row) for row in range(len(catalog))]
    f1 = []
    for name in CLASSES:
        own, found = (
            {r for r, its in enumerate(truth) if name in its},
            {r for r, p in enumerate(places) if name in labels[p]},
        )
        f1.append(200 * len(own & found) / (len(own) + len(found)))

    call(monkeypatch, report, lists, "--out", tmp_path / "report")
    scores = json.loads((tmp_path / "report/scores.json").read_text())
    assert scores["images"] == len(catalog) and scores["macro_f1_pct"] == pytest.approx(np.mean(f1))
    by_class = pd.read_csv(tmp_path / "report/classes.csv")
    assert by_class.f1_pct.tolist() == pytest.approx(f1) and scores["map_pct"] == pytest.approx(by_class.ap_pct.mean())
    table = text(tmp_path / "report/predictions.csv")
    assert table.label.tolist() == ["|".join(row) for row in truth]
    assert table.predicted.tolist() == ["|".join(labels[place]) for place in places]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        *("classes.csv", "predictions.csv", "probabilities.csv", "scores.json")
    }
    capsys.readouterr()
    for flags in ([], ["--flip"]):
        call(monkeypatch, evaluate, lists, *flags)
        line = capsys.readouterr().out.splitlines()[-1]
        assert "mAP" in line and (flags or f"macro F1 {np.mean(f1):.2f} %" in line)


def test_what_does_not_fit_is_refused(lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, sample = lists.parent / "set/images", tmp_path / "sample.csv"
    for says, options in (
        ("--topk: 2 likeliest are for images of one class each", ["--topk", "2", "--out", tmp_path / "a.csv"]),
        ("--sample: column light of .* shows amber, which are no", ["--sample", sample, "--out", tmp_path / "a.csv"]),
    ):
        pd.DataFrame({"id": said(lists)[0], "light": "amber"}).to_csv(sample, index=False)
        with pytest.raises(UserError, match=f"^{says}"):
            call(monkeypatch, predict, lists, images, *options)
    with pytest.raises(UserError, match=r"^--oof: its table has one class for an image, and those of"):
        call(monkeypatch, predict, lists, "--oof", tmp_path / "oof.csv")


def test_images_of_one_class_each_are_scored_as_such(
    lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, other = lists.parent / "set/images", tmp_path / "folders"
    for name in LIGHTS:
        for number in range(4):
            (other / name).mkdir(parents=True, exist_ok=True)
            (other / name / f"{number}.jpg").write_bytes((images / f"{number:03}.jpg").read_bytes())
    call(monkeypatch, evaluate, lists, "--data.path", other)
    said = capsys.readouterr()
    assert "have one class each: each is scored as of that class and of no other" in said.err + said.out
    assert "on 12 of 12 images" in said.out and "mAP" in said.out


def test_the_best_thresholds_are_those_of_the_saved_weights(lists: Path) -> None:
    trained = open_trained(lists, read_config(lists, []), SOLO)
    assert isinstance(trained.predict, Predictor) and trained.multi_label and trained.labels == "|"
    assert trained.thresholds.dtype == np.float64 and len(trained.thresholds) == 3


def test_weights_that_were_never_validated_say_that_they_have_no_thresholds(
    lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, saved = read_config(lists, []), lists / "checkpoints/best"
    about = {name: value for name, value in read_metadata(saved).items() if name != "thresholds"}
    weights = safetensors.torch.load_file(saved / WEIGHTS)
    place_checkpoint(tmp_path, cfg, {WEIGHTS: safetensors.torch.save(weights, {METADATA: json.dumps(about)})})
    assert open_trained(tmp_path, cfg, SOLO).thresholds.tolist() == [0.5, 0.5, 0.5]
    assert "no threshold was found yet: 0.5 for each class" in capsys.readouterr().err
    open_trained(lists, cfg, SOLO)
    assert "no threshold" not in capsys.readouterr().err


@pytest.mark.slow
def test_runs_resume_exactly_and_two_ranks_count_alike(tmp_path: Path) -> None:
    table = render_lights(tmp_path / "set", 60)
    settings = {**QUICK, "data.path": str(table), "data.val_share": "0.3", "optim.class_weights": "balanced"}

    def trained(name: str, ranks: int, **more: str) -> Path:
        run = tmp_path / name
        job = Job(
            ranks,
            tmp_path / f"{name}.log",
            "trainer",
            *dotted({**settings, "run.dir": str(run), "run.epochs": "2", **more}),
        )
        assert job.wait() == 0, job.output()
        return run

    whole, parts = trained("whole", 1), trained("parts", 1, **{"run.max_steps": "2"})
    trained("parts", 1)
    assert checkpoint(whole) == checkpoint(parts), "after a stop in the first epoch"
    for run in (whole, trained("two", 2)):
        best = max(rows(run), key=lambda row: row.get("val/map_pct", -1))
        for ranks in (1, 2):
            job = Job(ranks, tmp_path / "evaluate.log", "trainer.evaluate", str(run), "--engine.precision", "fp32")
            assert job.wait() == 0, job.output()
            if ranks == 1:
                alone = job.output().splitlines()[-1]
        assert job.output().splitlines()[-1] == alone
        assert abs(float(alone.split("mAP ")[1].split()[0]) - best["val/map_pct"]) < 3, "but for bf16 in training"
        assert "top1" not in json.dumps(rows(run)[-1])
