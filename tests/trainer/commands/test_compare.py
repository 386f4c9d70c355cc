"""Comparisons are read back from their files and compared with scipy's tests, pandas and hand-made runs."""

import html
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats  # type: ignore[import-untyped]
from PIL import Image

from data_pipeline.common.errors import UserError
from tests.support import warm
from tests.support.runs import environment
from trainer.compare import cli as compare
from trainer.compare import page as compare_report
from trainer.compare.mcnemar import ALL, PREDICTIONS, holm, mcnemar, per_class
from trainer.report.run_reader import read_run

START_S = 1_800_000_000.0
HOSTILE = 'it\'s <b>"bold"</b> $x^2$ & <script>alert(1)</script> 猫'


def made(folder: Path, top1_pct: list[float], seed: int = 0, name: str | None = None, **optim: Any) -> Path:
    """A run folder: two minutes an epoch, a row in the middle of each and one with these accuracies at its end."""
    folder.mkdir(parents=True)
    run = {"name": name or folder.name, "seed": seed, "dir": str(folder)}
    (folder / "config.yaml").write_text(json.dumps({"run": run, "optim": {"lr": 0.1, **optim}}))
    rows: list[dict[str, float]] = []
    for epoch, top1 in enumerate(top1_pct, start=1):
        middle, end = 60 * (2 * epoch - 1), 60 * 2 * epoch
        minutes = {"perf/train_min": 2.0 * epoch - 1}
        rows.append(
            {"epoch": epoch - 0.5, "time": START_S + middle, "train/loss": 9.0, "train/lr": 0.1 / epoch, **minutes}
        )
        scores = {"train/loss": 1 / epoch, "train/top1_pct": top1 + 1, "val/loss": 2 / epoch, "val/top1_pct": top1}
        rows.append(
            {
                "epoch": epoch,
                "time": START_S + end,
                **scores,
                "perf/images_per_s": 100.0 * epoch,
                "perf/train_min": 2.0 * epoch,
            }
        )
    lines = [json.dumps({"step": number, **row}) + "\n" for number, row in enumerate(rows, start=1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if rows:
        (folder / "checkpoints/last").mkdir(parents=True)
        (folder / "checkpoints/last/progress.json").write_text(json.dumps({"step": len(rows), "finished": True}))
    return folder


def predict(run: Path, labels: np.ndarray, right: np.ndarray) -> None:
    (run / PREDICTIONS).parent.mkdir()
    predicted = np.where(right, labels, "other")
    images = [f"val/{number}.jpg" for number in range(len(labels))]
    table = pd.DataFrame({"image": images, "label": labels, "predicted": predicted, "confidence": 0.5})
    table.to_csv(run / PREDICTIONS, index=False)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    compare.main()


@pytest.fixture
def study(tmp_path: Path) -> list[Path]:
    """Two seeds from scratch, two fine-tuned."""
    scratch = [made(tmp_path / f"scratch-seed{n}", [40.0 + n, 70.0 + n, 80.0 + 2 * n], seed=n) for n in range(2)]
    tuned = [made(tmp_path / f"tuned-seed{n}", [81.0 + n, 90.0], seed=n, lr=0.01) for n in range(2)]
    return [*scratch, *tuned]


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (3, 3), (10, 2), (7, 30), (400, 520), (0, 3000)])
def test_mcnemar_is_scipys_binomial_test(first: int, second: int) -> None:
    expected = scipy.stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_holm_by_its_definition() -> None:
    p = np.random.default_rng(0).uniform(0, 0.2, 20)
    for alpha in (0.01, 0.05, 0.3, 0.9):
        rejected, left = set(), len(p)
        for number in np.argsort(p):  # step down until the first that stays
            if p[number] * left > alpha:
                break
            rejected.add(int(number))
            left -= 1
        assert set(np.flatnonzero(holm(p) <= alpha).tolist()) == rejected
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


def test_classes_are_counted_image_by_image() -> None:
    draw = np.random.default_rng(1)
    labels = np.array(["null", "NA", "a b"])[draw.integers(0, 3, 300)]
    tables = []
    for share in (0.6, 0.8):
        predicted = np.where(draw.random(300) < share, labels, "x")
        images = [f"{number}.jpg" for number in range(300)]
        tables.append(pd.DataFrame({"image": images, "label": labels, "predicted": predicted}))
    right = [(table.predicted == table.label).to_numpy() for table in tables]
    found = per_class(tables[0], tables[1].sample(frac=1, random_state=0)).set_index("class")
    assert set(found.index) == {"null", "NA", "a b", ALL} and found.index[0] == ALL
    for name, row in found.iterrows():
        chosen = np.ones(300, bool) if name == ALL else labels == name
        counts = [int((right[0] & ~right[1] & chosen).sum()), int((right[1] & ~right[0] & chosen).sum())]
        assert [row.only_first, row.only_second] == counts and row.images == chosen.sum()
        assert row.difference == pytest.approx(100 * (right[1][chosen].mean() - right[0][chosen].mean()))
        assert row.p == pytest.approx(scipy.stats.binomtest(counts[0], sum(counts)).pvalue)
    assert per_class(tables[0], tables[1].assign(image="elsewhere.jpg").head(1)).empty


def test_tables_of_a_study(study: list[Path]) -> None:
    settings = compare.settings_of([read_run(folder) for folder in study])
    assert [(setting.name, len(setting.runs)) for setting in settings] == [("scratch", 2), ("tuned", 2)]
    runs = compare.run_table(settings).set_index("run")
    last = runs.loc["scratch-seed1"]
    assert [last[name] for name in compare.FIGURES] == pytest.approx([3, 82, 2 / 3, 1 / 3, 83, 200, 6])
    spread = compare.setting_table(runs.reset_index()).set_index("setting")
    assert spread.loc["scratch", "best_top1_pct_mean"] == 81 and spread.loc["tuned", "runs"] == 2
    assert spread.loc["scratch", "best_top1_pct_std"] == pytest.approx(math.sqrt(2))
    targets = compare.target_table(settings, [70.0, 81.5]).set_index(["run", "target_pct"])
    assert list(targets.loc[("scratch-seed0", 70.0), ["epoch", "minutes"]]) == [2, 4]
    assert list(targets.loc[("tuned-seed0", 81.5), ["epoch", "minutes"]]) == [2, 4]
    assert targets.loc[("scratch-seed0", 81.5), ["epoch", "minutes"]].isna().all()
    assert compare.usual_targets(runs) == [75, 80, 85, 90]
    assert compare.option_table(settings).to_numpy().tolist() == [["optim.lr", "0.1", "0.01"]]


def test_epochs_without_validation_are_on_the_curves_of_training(tmp_path: Path) -> None:
    run = made(tmp_path / "run", [40.0, 70.0, 80.0, 85.0])
    rows = [json.loads(line) | {"perf/epoch_s": 1.0} for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if row["epoch"] in (1, 3) or not k.startswith("val/")} for row in rows]
    for row in kept[::2]:
        del row["perf/epoch_s"]  # the middle of an epoch
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    settings = compare.settings_of([read_run(run)])
    epochs = compare._stacked(settings, compare.epoch_table)
    drawn = {panel.metric: compare_report.lines(panel, epochs, epochs, "epoch") for panel in compare_report.PANELS}
    assert drawn["val/top1_pct"][0].points == [(1, 40), (3, 80)]
    assert drawn["train/top1_pct"][0].points == [(1, 41), (2, 71), (3, 81), (4, 86)]
    assert compare.run_table(settings)[["val_loss", "train_loss"]].to_numpy().tolist() == [[2 / 3, 1 / 4]]


def test_names_tell_settings_apart(tmp_path: Path) -> None:
    folders = [
        made(tmp_path / f"{kind}/{n}", [50.0], seed=n, lr=lr) for kind, lr in (("a", 0.1), ("b", 0.2)) for n in (0, 1)
    ]
    names = [setting.name for setting in compare.settings_of([read_run(folder) for folder in folders])]
    assert names == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_report_holds_everything(
    study: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    labels = np.array(["cat", HOSTILE])[draw.integers(0, 2, 200)]
    predict(study[1], labels, draw.random(200) < 0.5)
    out = tmp_path / "out"
    run_command(monkeypatch, *study, "--out", out)
    said = capsys.readouterr().out
    note = f"tuned has no {PREDICTIONS}; to compare classes: python -m trainer.report {study[2]}"
    assert note in said and "81.00 ± 1.41" in said
    assert not (out / "classes.png").exists()

    predict(study[2], labels, draw.random(200) < 0.9)
    contents = []
    for _ in range(2):
        run_command(monkeypatch, *study, "--out", out, "--force", "--targets", "75,84.2,90")
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] and set(contents[0]) == set(compare_report.FILES)
    assert note not in capsys.readouterr().out
    page = contents[0]["report.html"].decode()
    assert page.count('<svg class="chart"') == 2 * len(compare_report.PANELS) + 1
    assert not re.search(r"https?:|url\((?!#)|<script|<link|<img|@import|<b>", page)
    assert "prefers-color-scheme:dark" in page and "max-width:600px" in page
    assert not {*re.findall(r"#[0-9a-f]{6}\b", page.split("</style>")[1])}, "all colours are the page's own variables"
    assert f"<title>{html.escape(str(study[0]))}</title>" in page, "each run's line says whose it is"
    assert "84.2 %" in page and "–" in page and "optim.lr" in page
    assert set(pd.read_csv(out / "targets.csv").target_pct) == {75, 84.2, 90}
    classes = pd.read_csv(out / "classes.csv")
    assert set(classes["class"]) == {ALL, "cat", HOSTILE} and (classes.difference > 20).all()
    for name in compare_report.PICTURES:
        with Image.open(out / name) as image:
            grey = np.asarray(image.convert("L"))
        assert grey.min() < 64 and grey[-3:].min() == 255  # dark lines on paper, nothing cut at the edge


def test_runs_without_figures_and_names_that_are_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [made(tmp_path / "one", [], name=HOSTILE), made(tmp_path / "two", [50.0], name="_two $", lr=0.5)]
    run_command(monkeypatch, *runs, "--out", tmp_path / "out")
    assert "<b>" not in (tmp_path / "out/report.html").read_text()
    run_command(monkeypatch, runs[0], made(tmp_path / "three", []), "--out", tmp_path / "none")
    assert not list((tmp_path / "none").glob("*.png"))
    assert f"has no {PREDICTIONS}, and no checkpoint to make it from" in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(study: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    for arguments, message in (
        ([], "required: RUN; see"),
        ([study[0], study[0]], "is the only one; give two"),
        ([study[0], tmp_path / "none"], "none is no run folder"),
        (
            [*study, shutil.copytree(study[1], tmp_path / "b")],
            "b is a copy of .*seed1, by their metrics.jsonl, .*; leave",
        ),
        ([*study, "--targets", "75,much"], "--targets: 75,much are no percentages"),
        ([*study, "--targets", "175"], "--targets: 175 are no percentages"),
        ([*study, "--out", mine, "--force"], "mine exists; give another folder$"),
        ([*study, "--out", mine / "thesis.txt"], "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            run_command(monkeypatch, *arguments)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    predict(study[0], np.array(["a", "a"]), np.array([True, False]))
    (study[0] / PREDICTIONS).write_text("image,label\na,b\n")
    with pytest.raises(UserError, match=r"predictions\.csv: cannot be read .* make it anew"):
        run_command(monkeypatch, *study, "--out", tmp_path / "out")
    (study[0] / PREDICTIONS).write_text("image,label,predicted\na,b,b\na,b,c\n")
    with pytest.raises(UserError, match="an image is in it twice"):
        run_command(monkeypatch, *study, "--out", tmp_path / "out")


def test_command_overwrites_nothing_unasked(study: list[Path], tmp_path: Path) -> None:
    arguments = [*map(str, study), "--out", str(tmp_path / "out")]
    told = [warm.run("trainer.compare", *arguments, environment=environment()) for _ in range(2)]
    assert [result.returncode for result in told] == [0, 2], told[0].stderr
    assert told[0].stdout.splitlines()[-1].startswith(f"written to {tmp_path / 'out'}: runs.csv, settings.csv")
    assert told[1].stderr == f"error: --out: {tmp_path / 'out'} exists; give another folder, or --force\n"


def test_images_of_several_classes_are_compared_by_map(
    study: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in study[1:]:
        rows = (run / "metrics.jsonl").read_text()
        several = rows.replace("val/top1_pct", "val/map_pct").replace("train/top1_pct", "val/macro_f1_pct")
        (run / "metrics.jsonl").write_text(several)
    with pytest.raises(UserError, match="images of some have several classes, those of others one; compare each"):
        run_command(monkeypatch, *study, "--out", tmp_path / "out")
    run_command(monkeypatch, *study[1:], "--out", tmp_path / "out", "--targets", "80")
    table = pd.read_csv(tmp_path / "out/runs.csv")
    assert table.best_map_pct.tolist() == [82, 90, 90] and table.val_macro_f1_pct.tolist() == [83, 91, 91]
    assert table.filter(like="top1").empty and len(pd.read_csv(tmp_path / "out/targets.csv").dropna()) == 3
    said = capsys.readouterr().out
    assert "best mAP, %" in said and "McNemar's test is for images of one class each" in said
    text = (tmp_path / "out/report.html").read_text()
    assert "validation mAP first" in text and "Validation mAP" in text and "top-1" not in text
