"""The page is read back by an HTML parser, its figures by pandas, its curves through the labels of their own axes."""

import json
import math
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data_pipeline.common.errors import UserError
from launch.pages.overview import CHARTS, main, page
from tests.support import warm
from tests.support.runs import EPOCHS, environment, reference, train, tree
from trainer.report.charts import SPEED, VAL_LOSS, VAL_TOP1, Curve, Panel, chart, limits, thinned
from trainer.report.run_reader import RUNNING_S, find_runs, read_run

NOW_S = 1_800_000_000.0
HOSTILE = 'it\'s <b>"bold"</b> & <script>alert(1)</script> 猫'


class Reader(HTMLParser):
    """Cells of the table, row by row, and the name of every element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.elements: list[str] = []
        self._within = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._within = tag in ("td", "th") or self._within
        if self._within and tag in ("small", "code"):
            self.rows[-1][-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        self._within = self._within and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._within:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()  # shared, so that its runs are trained once


def made(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """A run folder as a training leaves it, without checkpoints."""
    folder.mkdir(parents=True)
    tree = {"run": {"name": options.pop("name", folder.name), "epochs": 2}, "optim": {"lr": 0.1, **options}}
    (folder / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    lines = [json.dumps({"step": 1 + n, "epoch": (1 + n) / 10, "time": NOW_S, **row}) for n, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def test_table_tells_what_real_runs_did(base: Path) -> None:
    finished, short = reference(base, 1), base / "short"
    assert train(1, base, short, epochs=EPOCHS, max_steps=4).wait() == 0
    runs = [read_run(folder) for folder in (finished, short)]
    before = tree(finished)
    text = page(runs, NOW_S)
    assert text == page(runs[::-1], NOW_S) and tree(finished) == before

    head, *rows = Reader(text).rows
    assert head[:4] == ["run", "state", "epoch", "best top-1, %"]
    shown = {row[0].split("\n")[1]: row[1:] for row in rows}
    assert shown[str(finished)][:2] == ["finished", f"{EPOCHS} / {EPOCHS}"]
    assert shown[str(short)][0] == "stopped at run.max_steps 4"
    assert "run.max_steps null" in shown[str(finished)][-1] and "run.max_steps 4" in shown[str(short)][-1]
    for folder in (finished, short):
        metrics = pd.read_json(folder / "metrics.jsonl", lines=True)
        steps = metrics[metrics["train/lr"].notna()]
        expected = [
            f"{metrics['val/top1_pct'].max():.2f}",
            f"{steps['perf/images_per_s'].median():.0f}",
            f"{steps['perf/data_wait_pct'].median():.1f}",
        ]
        assert shown[str(folder)][2:5] == expected
    assert all(np.isfinite([y for _, y in runs[0].curve(metric)]).all() for _, _, metric, _ in CHARTS)
    assert len(runs[0].curve("val/top1_pct")) == EPOCHS and len(runs[0].curve("train/loss")) > EPOCHS


def test_images_of_several_classes_have_map_for_top1(tmp_path: Path) -> None:
    several = read_run(made(tmp_path / "several", [{"val/map_pct": 51.25, "val/loss": 0.3}, {"val/map_pct": 50.0}]))
    single = read_run(made(tmp_path / "single", [{"val/top1_pct": 60.0}]))
    for runs, title, cells, charts in (
        ([several], "best mAP, %", ["51.25 mAP"], ("Validation mAP", "Validation loss")),
        ([single, several], "best top-1 or mAP, %", ["60.00", "51.25 mAP"], ("Validation mAP", "Validation top-1")),
    ):
        text = page(runs, NOW_S)
        head, *rows = Reader(text).rows
        assert head[3] == title and [row[3] for row in rows] == cells
        assert all(chart in text for chart in charts) and ("Validation top-1" in text) == (single in runs)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = made(tmp_path / "<i>folder</i> \udcff", [{"val/top1_pct": 50.0}], name=HOSTILE, note="<b>bold</b>")
    other = made(tmp_path / "other", [], note="plain")
    text = page([read_run(folder), read_run(other)], NOW_S)
    text.encode()  # no lone surrogates
    reader = Reader(text)
    assert not {"b", "i", "script"} & set(reader.elements)
    names = [row[0] for row in reader.rows[1:]]
    assert names[0] == f"{HOSTILE}\n{tmp_path}/<i>folder</i> \\udcff" and names[1].startswith("other\n")
    assert reader.rows[1][-1] == '\noptim.note "<b>bold</b>"'


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nrun: {name: *b}\n"),
        ("config.yaml", "run: &r\n  name: *r\n"),
        ("config.yaml", "".join(" " * depth + "a:\n" for depth in range(1500))),
        ("config.yaml", "[1, 2]\n"),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
        ("metrics.jsonl", '{"step": 1' + "0" * 400 + ', "epoch": 1, "time": 1}\n'),
        ("checkpoints/last/progress.json", "[1]"),
        ("checkpoints/last/progress.json", "fifo"),
    ],
)
def test_hostile_run_is_left_out(
    file: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "runs/good", [{"val/top1_pct": 50.0}])
    hostile = made(tmp_path / "runs/\x1b[31mbad", [{"val/top1_pct": 50.0}]) / file
    hostile.parent.mkdir(parents=True, exist_ok=True)
    if content == "fifo":
        os.mkfifo(hostile)
    else:
        hostile.write_text(content)
    main(["runs"])
    output, errors = capsys.readouterr()
    assert output == "overview.html: 1 run\n"
    assert errors.startswith(f"left out: RUNS: runs/\\x1b[31mbad/{file} cannot be read (") and errors.count("\n") == 1


def test_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    text = page([read_run(made(tmp_path / "run", [{"train/loss": 1.0}]))], NOW_S)
    assert "prefers-color-scheme:dark" in text and "default-src 'none'" in text
    assert not re.search(r"https?:|url\((?!#)|<script|<img|<link|@import", text)


def test_states(tmp_path: Path) -> None:
    begun = read_run(made(tmp_path / "begun", []))
    killed = made(tmp_path / "killed", [{"train/loss": 2.0}, {"train/loss": 3.0}])
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    run = read_run(killed)
    assert [row["step"] for row in run.rows] == [1, 2]
    assert begun.state(NOW_S) == "no figures yet" and math.isnan(begun.best_pct)
    assert run.state(NOW_S + RUNNING_S - 1) == "running"
    assert run.state(NOW_S + RUNNING_S + 1) == "stopped, nothing saved"
    rows = Reader(page([begun, run], NOW_S)).rows
    assert [row[3] for row in rows[1:]] == ["–", "–"]
    assert [row[1] for row in rows[1:]] == ["no figures yet", "running"]


def test_finds_runs_below_a_folder_once(tmp_path: Path) -> None:
    runs = [made(tmp_path / "runs" / name, []) for name in ("b", "a", "sweep/0", "sweep/1")]
    (runs[0] / "wandb/run-1/files").mkdir(parents=True)
    (runs[0] / "wandb/run-1/files/config.yaml").write_text("{}")
    (tmp_path / "runs/latest").symlink_to("a")
    assert find_runs([tmp_path / "runs", runs[0]]) == [runs[1], runs[0], *runs[2:]]


def drawn_by(markup: str) -> tuple[ET.Element, list[np.ndarray]]:
    """An SVG of ours, and its curves' pieces [N, 2] in its own coordinates."""
    root = ET.fromstring(str(markup).replace("<svg ", '<svg xmlns:xlink="x" ', 1))
    curves = [node for node in root.iter("g") if node.find("title") is not None]
    paths = [re.split("M", node.find("path").get("d", ""))[1:] for node in curves]  # type: ignore[union-attr]
    pieces = [[re.findall(r"(-?[\d.]+) (-?[\d.]+)", piece) for piece in path] for path in paths]
    return root, [np.array(piece, float) for path in pieces for piece in path]


def ticks_of(root: ET.Element, anchor: str) -> np.ndarray:
    """[N, 2] where the numbers of an axis stand, and what they say."""
    labels = [node for node in root.iter("text") if re.fullmatch(r"[-+\u2212.\de]+", node.text or "")]
    wanted = [node for node in labels if f"text-anchor: {anchor}" in node.get("style", "")]
    at = {"middle": "x", "end": "y"}[anchor]
    return np.array(
        sorted((float(node.get(at, 0)), float((node.text or "").replace("\u2212", "-"))) for node in wanted)
    )


def test_curve_lies_where_the_axes_say() -> None:
    points = [(x / 7, 3 + math.sin(x)) for x in range(40)]
    points[20] = (20 / 7, math.nan)
    root, pieces = drawn_by(chart(VAL_TOP1, [Curve("<run>", points, 8, 1)]))
    assert [len(piece) for piece in pieces] == [20, 19]
    drawn = np.concatenate(pieces)
    expected = np.array([point for point in points if math.isfinite(point[1])])
    across, up = ticks_of(root, "middle"), ticks_of(root, "end")
    assert across[:, 1].tolist() == [0, 1, 2, 3, 4, 5, 6], "whole epochs, to the end of the last"
    np.testing.assert_allclose(
        np.polyval(np.polyfit(across[:, 0], across[:, 1], 1), drawn[:, 0]), expected[:, 0], atol=0.01
    )
    middle = 0.38 * 9  # a number stands on its line by its middle, and is placed by its foot
    up[:, 0] -= middle
    np.testing.assert_allclose(np.polyval(np.polyfit(up[:, 0], up[:, 1], 1), drawn[:, 1]), expected[:, 1], atol=0.02)
    text = ET.tostring(root).decode()
    assert "<title>&lt;run&gt;" in text and "stroke: var(--c0)" in text
    assert "stroke-dasharray" in text  # the ninth run and those after it are dashed


def test_an_outlier_does_not_flatten_the_rest() -> None:
    """Short runs whose first validation is far off, one that diverges, and a rate whose first row waits for everything."""
    near = np.array([2.0, 1.5, 1.2, 1.0])
    assert limits(near, "loss") == (-math.inf, math.inf, False, "")
    assert limits(np.array([112.0, 1.9, 1.2, 1.0]), "loss") == (1.0, math.inf, True, ", log")
    assert limits(np.array([1e16, 1.0, 1.0, 0.0]), "loss") == (1.0, 100.0, True, ", log; peaks cut")
    waits = np.array([60.0, *[1.0] * 99])
    assert limits(waits, "rate") == (-math.inf, 3.0, False, "; peaks cut")
    assert limits(np.array([5.0, *[0.0] * 99]), "rate")[3] == "" == limits(waits, "share")[3]

    root, (piece,) = drawn_by(chart(VAL_LOSS, [Curve("a", [(1.0, 112.0), (2.0, 1.9), (3.0, 1.2), (4.0, 1.0)], 0)]))
    heights = piece[:, 1]
    assert (heights[2] - heights[1]) > 0.05 * (heights[3] - heights[0]), "what is near the rest is told apart"
    assert "nats, log" in ET.tostring(root).decode()
    assert {1.0, 2.0, 50.0, 100.0} <= {*ticks_of(root, "end")[:, 1]}


@pytest.mark.parametrize(
    "points", [[], [(0.5, math.nan)], [(0.0, 0.0)], [(1.0, 5.0)], [(n / 9, -1.0) for n in range(999)]]
)
@pytest.mark.parametrize("panel", [VAL_TOP1, VAL_LOSS, SPEED])
def test_whatever_there_is_can_be_drawn(points: list[tuple[float, float]], panel: Panel) -> None:
    root, pieces = drawn_by(chart(panel, [Curve("a", points, 0)]))
    assert sum(map(len, pieces)) <= 200 and list(root.iter("text"))


def test_long_curves_become_means() -> None:
    draw = np.random.default_rng(0)
    x, y = np.sort(draw.uniform(0, 30, 5000)), draw.normal(size=5000)
    found = np.array(thinned(list(zip(x.tolist(), y.tolist(), strict=True))))
    stretch = pd.cut(pd.Series(x), 200, labels=False)
    expected = pd.DataFrame({"x": x, "y": y}).groupby(stretch).mean()
    np.testing.assert_allclose(found, expected.to_numpy(), rtol=1e-9, atol=1e-12)


def test_command_writes_once_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = made(tmp_path / "run", [{"train/loss": 1.0}]), tmp_path / "o.html"
    arguments = ["overview", str(run), "--out", str(out)]
    told = [warm.run("launch", *arguments, environment=environment()) for _ in range(2)]
    assert [(result.returncode, result.stdout) for result in told] == [(0, f"{out}: 1 run\n"), (2, "")]
    assert told[1].stderr == f"error: --out: {out} exists; give another file, or --force to replace it\n"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["o.html", "run"]
    main([str(run), "--out", str(out), "--force"])
    assert Reader(out.read_text()).rows[1][0] == f"run\n{run}"

    (tmp_path / "empty").mkdir()
    torn = made(tmp_path / "torn", [])
    for arguments, message in (
        ([], "required: RUNS; see"),
        ([str(tmp_path / "none")], "none is not a folder"),
        ([str(tmp_path / "empty")], "holds no run"),
        ([str(run), "--out", str(tmp_path / "no/o.html")], "no is not a folder"),
        ([str(torn)], r"metrics\.jsonl cannot be read .* leave this run out"),
    ):
        (torn / "metrics.jsonl").write_text("[1]\n")
        with pytest.raises(UserError, match=message):
            main([*arguments, *(() if "--out" in arguments else ("--out", str(tmp_path / "new.html")))])
        assert not (tmp_path / "new.html").exists()
