"""The command that kills training runs: a few kills, and whether it would notice what it looks for."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import sampling
from tests.stress.chaos import BATCH
from tests.support.recorded import EPOCHS, IMAGES, faults_of_order, faults_of_weights, read_order, starts
from tests.support.runs import ROOT, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tormented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two kills in each series: the files that they leave behind, and the lines about them."""
    out = tmp_path_factory.mktemp("chaos") / "out"
    command = [sys.executable, "-m", "tests.stress.chaos", "--kills", "2", "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return out, ended.stdout


def test_killed_runs_lose_nothing(tormented: tuple[Path, str]) -> None:
    out, said = tormented
    for name in ("same ranks", "other ranks"):
        assert len(list(out.glob(f"{name} * starts/*"))) >= 3, "each kill is followed by a start"
    totals = re.findall(r"^(2 ranks|1 to 3 ranks) +2 .* (\d+) +(\d+) +(\d+) of (\d+)", said, re.MULTILINE)
    assert [name for name, *_ in totals] == ["2 ranks", "1 to 3 ranks"], said
    assert all(runs == whole == of and int(made) == 2 + int(runs) for _, runs, made, whole, of in totals), said


def test_what_is_written_down_is_the_order_of_the_epochs(tormented: tuple[Path, str]) -> None:
    order = read_order(tormented[0] / "undisturbed")
    for epoch in range(EPOCHS):
        updates = [order[update] for update in sorted(order) if update[0] == epoch]
        assert [len(rows) for rows in updates] == [BATCH] * 10 + [10]
        assert [image for rows in updates for image, _ in rows] == sampling.order(0, epoch, IMAGES).tolist()


def skip_an_update(record: list[list[Any]]) -> None:
    del record[5]


def repeat_an_image(record: list[list[Any]]) -> None:
    record[5][3][0] = record[5][3][1]


def turn_images(record: list[list[Any]]) -> None:
    record[5][3].reverse()


def draw_anew(record: list[list[Any]]) -> None:
    record[5][3][0][1] = "0" * 16


@pytest.mark.parametrize("lose", [skip_an_update, repeat_an_image, turn_images, draw_anew])
def test_a_loss_is_noticed(
    lose: Callable[[list[list[Any]]], None], tormented: tuple[Path, str], tmp_path: Path
) -> None:
    whole, run = tormented[0] / "undisturbed", tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    shutil.copytree(whole.with_name("undisturbed starts"), tmp_path / "run starts")
    assert faults_of_order(run, whole) == faults_of_weights(run, whole) == []
    for file in starts(run)[0].glob("?.jsonl"):
        record = [json.loads(line) for line in file.read_text().splitlines()]
        lose(record)
        file.write_text("".join(json.dumps(row) + "\n" for row in record))
    faults = faults_of_order(run, whole)
    assert faults[0] == f"update (0, {6 * BATCH}) differs"
    assert [fault.partition(":")[0] for fault in faults[1:]] == ["epoch 0"] * (
        lose in (skip_an_update, repeat_an_image)
    )


def test_other_weights_are_noticed(tormented: tuple[Path, str], tmp_path: Path) -> None:
    whole, run = tormented[0] / "undisturbed", tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    file = (run / "checkpoints/last").resolve() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert faults_of_weights(run, whole) == ["model.safetensors differs"]
