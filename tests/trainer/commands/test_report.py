"""The evaluation report: figures computed by hand and by plain loops, pictures that open, and no file overwritten."""

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_pipeline.common.errors import UserError
from tests.conftest import HOSTILE_NAMES
from tests.support.runs import SOLO, TINTS, VAL, Job, images, reference, tree
from tests.trainer.test_evaluate import scored
from trainer.report import cli as report
from trainer.report import plots
from trainer.report.__main__ import main

CLASSES = sorted(TINTS)
FILES = {
    *("predictions.csv", "probabilities.csv", "classes.csv", "confusion.csv", "calibration.csv"),
    *("scores.json", "confusion.png", "reliability.png"),
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def test_scores_of_classes_by_hand() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    matrix = report.confusion(labels, predicted, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    scores = report.class_scores(np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0), ["a", "b", "c", "d"])
    a, b, c, d = scores.drop(columns="class").to_numpy(float).tolist()
    assert a == pytest.approx([200 / 3, 200 / 3, 200 / 3, 3, 3])
    assert b == pytest.approx([200 / 3, 100, 80, 2, 3])
    assert math.isnan(c[0]) and c[1:] == [0, 0, 1, 0]
    assert [math.isnan(value) for value in d] == [True, True, True, False, False]


def test_calibration_by_hand_and_by_a_loop() -> None:
    """Four images in two bins: |1/2 - .95| and |1 - .5|, each of half of the images; and 500 at random, one by one."""
    bins = report.calibration(np.array([0.94, 0.96, 0.5, 0.5], np.float32), np.array([True, False, True, True]))
    assert bins.images.tolist() == [0] * 7 + [2] + [0] * 6 + [2]
    assert report.calibration_error_pct(bins) == pytest.approx(100 * (0.45 / 2 + 0.5 / 2), abs=1e-4)

    draw = np.random.default_rng(0)
    confidence = np.append(draw.uniform(0.1, 1, 498), [1.0, 1 / 15]).astype(np.float32)
    right = draw.random(500) < confidence**2
    error = 0.0
    for number in range(15):
        inside = [row for row in range(500) if number / 15 < float(confidence[row]) <= (number + 1) / 15]
        if inside:
            sure, accurate = confidence[inside].mean(dtype=np.float64), right[inside].mean()
            error += len(inside) / 500 * abs(accurate - sure)
    assert report.calibration_error_pct(report.calibration(confidence, right)) == pytest.approx(100 * error, abs=1e-9)


def test_mistakes_begin_with_the_surest() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]], np.float32)
    found = report.Report(["w", "x", "y", "z"], np.array([0, 0, 0, 1]), np.log(probabilities), ["cat", "dog"])
    assert found.surest_mistakes(9).tolist() == [2, 1] and found.surest_mistakes(1).tolist() == [2]
    scores = found.scores()
    assert scores["loss"] == pytest.approx(-np.log([0.9, 0.4, 0.2, 0.7]).mean())
    assert (scores["top1_pct"], scores["images"]) == (50, 4)
    assert "top5_pct" not in scores, "of five classes and fewer it is always 100"
    certain = report.Report(["w"], np.array([1]), np.array([[0, -150]], np.float32), ["cat", "dog"])
    assert certain.scores()["loss"] == 150, "as trainer.evaluate has it, though float32 has such a probability as 0"


def test_command_reports_what_evaluation_finds(base: Path, tmp_path: Path) -> None:
    run = reference(base, 1)
    before = tree(run)
    for ranks, out in ((1, tmp_path / "alone"), (2, tmp_path / "by two")):
        job = Job(ranks, tmp_path / "log", "trainer.report", str(run), "--out", str(out))
        assert job.wait() == 0, job.output()
        wanted = scored(run, SOLO)
        assert job.output().count(f"top-1 {wanted.top1_pct:.2f} %  top-5 {wanted.top5_pct:.2f} %") == 1
    alone = tree(tmp_path / "alone")
    assert alone == tree(tmp_path / "by two")
    assert tree(run) == before
    assert set(alone) - {"mistakes.png"} == FILES

    folder = tmp_path / "alone"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["loss"] == pytest.approx(wanted.loss, abs=1e-5) and scores["images"] == VAL
    table = pd.read_csv(folder / "predictions.csv")
    assert list(table) == ["image", "label", "predicted", "confidence"]
    paths = {str(path.relative_to(images(base) / "val")) for path in (images(base) / "val").rglob("*.jpg")}
    assert set(table.image) == paths and len(table) == VAL
    assert (table.image.str.split("/").str[0] == table.label).all()
    assert 100 * (table.label == table.predicted).mean() == pytest.approx(wanted.top1_pct)
    probabilities = pd.read_csv(folder / "probabilities.csv").set_index("image")
    assert probabilities.idxmax(axis=1).tolist() == table.predicted.tolist()
    assert np.allclose(probabilities.sum(axis=1), 1)
    matrix = pd.read_csv(folder / "confusion.csv").set_index("label")
    pairs = table.groupby(["label", "predicted"]).size()
    assert all(matrix.loc[a, b] == pairs.get((a, b), 0) for a in CLASSES for b in CLASSES)
    mistaken = (table.label != table.predicted).any()
    assert (folder / "mistakes.png").exists() == mistaken


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    main()


def test_a_report_is_replaced_only_when_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = reference(base, 1), tmp_path / "a report"
    call(monkeypatch, run, "--out", out)
    assert "mean of the classes" in capsys.readouterr().out
    first = tree(out)
    with pytest.raises(UserError, match=r"--out: .* is not empty; give --force to replace"):
        call(monkeypatch, run, "--out", out)
    call(monkeypatch, run, "--out", out, "--force")
    assert tree(out) == first, "the same to the last byte"
    (tmp_path / "something.txt").write_text("mine")
    for options in ([], ["--force"]):
        with pytest.raises(UserError, match=r"--out: .* is not empty; give another folder"):
            call(monkeypatch, run, "--out", tmp_path, *options)
    with pytest.raises(UserError, match="--outt: no such option"):
        call(monkeypatch, run, "--outt", tmp_path / "other")


@pytest.mark.parametrize("count", [2, 7, 200])
def test_pictures_take_any_number_of_classes_of_any_name(count: int) -> None:
    names = [*HOSTILE_NAMES, "$a^{2$ and $b_{$", "a name that is much too long for an axis", *map(str, range(count))]
    draw = np.random.default_rng(0)
    matrix = draw.integers(0, 30, (count, count))
    matrix[0] = 0
    content = plots.confusion_matrix(matrix, names[:count][::-1], "a run, 9 validation images")
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG" and min(picture.size) > 600
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10
    bins = report.calibration(np.array([0.3, 0.9], np.float32), np.array([True, False]))
    assert Image.open(io.BytesIO(plots.reliability(bins, 12.5, names[-1]))).format == "PNG"
