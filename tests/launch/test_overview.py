"""The page is read back by an HTML parser, its figures by pandas, its curves through the labels of their own axes."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data_pipeline.common.errors import UserError
from launch.pages.curves import Curve, chart, thinned, ticks
from launch.pages.overview import CHARTS, main, page
from tests.support.runs import EPOCHS, ROOT, environment, reference, train, tree
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


def test_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    text = page([read_run(made(tmp_path / "run", [{"train/loss": 1.0}]))], NOW_S)
    assert "prefers-color-scheme:dark" in text and "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|<script|<img|<link|@import", text)


def test_states(tmp_path: Path) -> None:
    begun = read_run(made(tmp_path / "begun", []))
    killed = made(tmp_path / "killed", [{"train/loss": 2.0}, {"train/loss": 3.0}])
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    run = read_run(killed)
    assert [row["step"] for row in run.rows] == [1, 2]
    assert begun.state(NOW_S) == "no figures yet" and math.isnan(begun.best_top1_pct)
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


def test_curve_lies_where_the_axes_say() -> None:
    points = [(x / 7, 3 + math.sin(x)) for x in range(40)]
    points[20] = (20 / 7, math.nan)
    root = ET.fromstring(chart("A & B", "%", [Curve(9, "<run>", points)], from_zero=False))
    labels = [node for node in root.iter("text") if re.fullmatch(r"[-+.\de]+", node.text or "")]
    up = sorted((float(n.get("y", 0)) - 4, float(n.text or 0)) for n in labels if n.get("text-anchor") == "end")
    across = sorted((float(n.get("x", 0)), float(n.text or 0)) for n in labels if n.get("text-anchor") == "middle")
    pieces = [
        [tuple(map(float, pair.split(","))) for pair in node.get("points", "").split()]
        for node in root.iter("polyline")
    ]
    assert [len(piece) for piece in pieces] == [20, 19]
    drawn = np.array([point for piece in pieces for point in piece])
    expected = np.array([point for point in points if math.isfinite(point[1])])
    np.testing.assert_allclose(np.interp(drawn[:, 0], *np.array(across).T), expected[:, 0], atol=0.01)
    np.testing.assert_allclose(np.interp(drawn[:, 1], *np.array(up).T), expected[:, 1], atol=0.01)
    (line,) = {node.get("stroke-dasharray") for node in root.iter("polyline")}
    assert line  # the ninth run and those after it are dashed
    assert root.find("g/title") is not None and "<title>&lt;run&gt;" in ET.tostring(root).decode()


def test_peaks_are_cut_and_said_to_be() -> None:
    points = [(x / 100, 1.0) for x in range(100)]
    flat = chart("t", "s", [Curve(0, "a", points)], from_zero=True)
    peaked = chart("t", "s", [Curve(0, "a", [(0.0, 1e16), *points[1:]])], from_zero=True)
    labels = [[float(text) for text in re.findall(r'end">([-+.\de]+)<', drawing)] for drawing in (flat, peaked)]
    assert max(labels[0]) == 1 and max(labels[1]) == 3
    assert "peaks cut" in peaked and "peaks cut" not in flat
    assert "peaks cut" not in chart("t", "s", [Curve(0, "a", [(0.0, 0.0)] * 99 + [(1.0, 5.0)])], from_zero=True)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 100), (0.0031, 0.0032), (-3, 7), (5, 5), (0, 0), (1e-9, 3e9), (99.2, 100), (-1e-3, -1e-3), (1e6, 1e6 + 1)],
)
def test_ticks_enclose_and_are_round(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8 and found == sorted(set(found))
    assert found[0] <= low + 1e-9 * abs(low) and found[-1] >= high - 1e-9 * abs(high)
    size = (found[-1] - found[0]) / (len(found) - 1)
    np.testing.assert_allclose(np.diff(found), size, rtol=1e-4)
    assert f"{size:.0e}"[0] in "125"


def test_long_curves_become_means() -> None:
    draw = np.random.default_rng(0)
    x, y = np.sort(draw.uniform(0, 30, 5000)), draw.normal(size=5000)
    found = np.array(thinned(list(zip(x.tolist(), y.tolist(), strict=True))))
    stretch = pd.cut(pd.Series(x), 200, labels=False)
    expected = pd.DataFrame({"x": x, "y": y}).groupby(stretch).mean()
    np.testing.assert_allclose(found, expected.to_numpy(), rtol=1e-9, atol=1e-12)


def test_command_writes_once_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = made(tmp_path / "run", [{"train/loss": 1.0}]), tmp_path / "o.html"
    command = [sys.executable, "-m", "launch", "overview", str(run), "--out", str(out)]
    told = [
        subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
        for _ in range(2)
    ]
    assert [(result.returncode, result.stdout) for result in told] == [(0, f"{out}: 1 run\n"), (2, "")]
    assert told[1].stderr == f"error: --out: {out} exists; give another file, or --force to replace it\n"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["o.html", "run"]
    main([str(run), "--out", str(out), "--force"])
    assert Reader(out.read_text()).rows[1][0] == f"run\n{run}"

    (tmp_path / "empty").mkdir()
    torn = made(tmp_path / "torn", [])
    for arguments, message in (
        ([], "required: runs; see"),
        ([str(tmp_path / "none")], "none is not a folder"),
        ([str(tmp_path / "empty")], "holds no run"),
        ([str(run), "--out", str(tmp_path / "no/o.html")], "no is not a folder"),
        ([str(torn)], r"metrics\.jsonl cannot be read .* leave this run out"),
    ):
        (torn / "metrics.jsonl").write_text("[1]\n")
        with pytest.raises(UserError, match=message):
            main([*arguments, *(() if "--out" in arguments else ("--out", str(tmp_path / "new.html")))])
        assert not (tmp_path / "new.html").exists()
