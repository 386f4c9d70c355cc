"""The contact sheet: its cells are the pixels of training, and the command treats files with care."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import Cursor, Loader
from data_pipeline.sampling import order
from data_pipeline.sharding import RankInfo
from data_pipeline.show import cli as show
from data_pipeline.show.__main__ import main
from data_pipeline.sources.catalog import open_catalog
from tests.conftest import take

SIDE = 144  # as large as a cell, so that nothing is enlarged
MIXED = {"policy": "trivialaugment", "mixup": 0.4, "cutmix": 1.0, "erase": 0.3, "rotate_deg": 10.0}


def window(sheet: NDArray[np.uint8], x: int, y: int, lines: int) -> NDArray[np.uint8]:
    """Pixels [144, 144, 3] of the cell in column `x` and row `y`, whose captions have so many lines."""
    left, top = 4 + 148 * x, 4 + (152 + 15 * lines) * y
    return sheet[top : top + SIDE, left : left + SIDE]


@pytest.mark.parametrize(("options", "lines"), [({}, 1), ({"repeats": 2, "vertical_flip": 0.5}, 1), (MIXED, 2)])
def test_cells_are_what_training_sees(
    options: dict[str, object], lines: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixel by pixel those of a loader with whole batches, in its third and later epochs."""
    monkeypatch.setattr(show, "COLUMNS", 3)
    cfg = DataConfig(str(folder), batch=16, size_px=SIDE, augment=AugmentConfig(**options))  # type: ignore[arg-type]
    picture = show.sheet(cfg, epoch=2, seed=5, epochs=4)
    assert picture.size == (4 + 148 * 4, 4 + (152 + 15 * lines) * 6)
    sheet = np.asarray(picture)

    catalog = open_catalog(cfg, "train")
    loader = Loader(cfg, catalog, RankInfo(), training=True, seed=5, epochs=4)
    ids = list(dict.fromkeys(order(5, 2, len(catalog), cfg.augment.repeats).tolist()))[:6]
    columns = dict.fromkeys(ids, 0)
    epoch = 2
    while min(columns.values()) < show.COLUMNS:
        loader.seek(Cursor(epoch))
        for batch in take(loader):
            for sample, image in list(zip(batch.ids.tolist(), batch.images, strict=True))[: batch.num_real]:
                if columns.get(sample, show.COLUMNS) < show.COLUMNS:
                    columns[sample] += 1
                    ours = window(sheet, columns[sample], ids.index(sample), lines)
                    theirs = image.permute(1, 2, 0).round().to(torch.uint8).numpy()
                    assert np.array_equal(ours, theirs), (epoch, sample)
        epoch += 1


def test_captions_name_the_classes() -> None:
    classes = ["a cat", "a dog", "a fish"]
    assert show._caption(classes, 1, None) == ["a dog"]
    assert show._caption(classes, 1, torch.tensor([0.25, 0.75, 0])) == ["0.75 a dog", "0.25 a cat"]
    assert show._caption(classes, 2, torch.tensor([0.0, 0, 1])) == ["a fish"]
    assert show._caption(classes, -1, torch.zeros(3)) == ["does not count"]
    font = show.ImageFont.load_default(12)
    assert show._cut("short", SIDE, font) == "short"
    long = show._cut("a very long name\tof\na class " * 9, SIDE, font)
    assert long.startswith("a very long name of") and long.endswith("...") and font.getlength(long) <= SIDE


def test_sizes_of_the_epochs_are_enlarged_to_one(folder: Path) -> None:
    cfg = DataConfig(str(folder), batch=16, size_px=[48, 72])
    sheet = np.asarray(show.sheet(cfg, epochs=2))
    for column, repeated in ((1, 3), (2, 2)):
        cell = window(sheet, column, 0, 1)
        assert np.array_equal(cell, cell[::repeated, ::repeated].repeat(repeated, 0).repeat(repeated, 1))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(show, "ROWS", 2)
    monkeypatch.setattr(show, "COLUMNS", 2)
    monkeypatch.setattr(sys, "argv", ["show", *arguments])
    main()


def test_command_writes_and_replaces_only_when_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it's a sheet.png"
    given = ["--data.path", str(folder), "--data.batch", "8", "--data.augment.policy", "autoaugment", "--out", str(out)]
    given += ["--data.augment.color_jitter", "[0.4, 0.4, 0.4, 0.1]"]
    command(monkeypatch, *given)
    assert "it's a sheet.png" in capsys.readouterr().out
    first = out.read_bytes()
    with Image.open(out) as image:
        assert image.format == "PNG" and image.size[0] == 4 + 148 * 3
    with pytest.raises(UserError, match=r"--out: .* exists; .* --force"):
        command(monkeypatch, *given)
    command(monkeypatch, *given, "--force", "--seed", "1")
    assert out.read_bytes() != first
    command(monkeypatch, *given, "--force")
    assert out.read_bytes() == first, "the same options and seed draw the same sheet"
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "sheet.jpg"], "--out: sheet.jpg"),
        (["--out", "no such folder/sheet.png"], "--out: no such folder"),
        (["--epoch", "-1"], "--epoch: -1"),
        (["--epochs", "0"], "--epochs: 0"),
        (["--seed", "-1"], "--seed: -1"),
        (["--data.augment.erase", "2"], "data.augment.erase: 2"),
        (["--data.augment.policy", "augmix"], "--data.augment.policy: augmix"),
        (["--data.augment.mixup", "0.2", "--data.batch", "7"], "data.batch: 7"),
        (["--data.augment.blur", "1"], "--data.augment.blur: no such option"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        command(monkeypatch, *arguments)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
