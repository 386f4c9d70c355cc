"""The built-in dataset: what is drawn, and that one whole copy of it appears in the cache whatever happens."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_pipeline.common.errors import UserError
from data_pipeline.sources import builtin
from data_pipeline.sources.builtin import CLASSES, PER_CLASS, builtin_dataset, cache_root, render

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = {"train": 6, "val": 2}
RENDER = "import sys; from pathlib import Path; from data_pipeline.sources import builtin; "
RENDER += "print(builtin._render_once(Path(sys.argv[1]), {'train': int(sys.argv[2]), 'val': 2}))"


@pytest.fixture(scope="session")
def dataset() -> Path:
    return builtin_dataset()


def start_rendering(root: Path, train_per_class: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RENDER, str(root), str(train_per_class)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- what is drawn


@pytest.mark.slow
def test_full_set_is_balanced_and_named_by_class(dataset: Path) -> None:
    assert sorted(path.name for path in dataset.iterdir()) == ["train", "val"]
    for split, count in PER_CLASS.items():
        assert sorted(path.name for path in (dataset / split).iterdir()) == sorted(CLASSES)
        for name in CLASSES:
            expected = [f"{name}_{index:04d}.jpg" for index in range(count)]
            assert sorted(path.name for path in (dataset / split / name).iterdir()) == expected
    assert (len(CLASSES), PER_CLASS) == (10, {"train": 400, "val": 100})


@pytest.mark.slow
def test_every_file_is_a_jpeg_of_the_promised_size_and_some_are_gray(dataset: Path) -> None:
    sizes, modes = set(), []
    for path in dataset.glob("*/*/*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert image.format == "JPEG"
            assert all(72 <= side <= 160 for side in image.size), path
            sizes.add(image.size)
            modes.append(image.mode)
    assert len(sizes) > 500
    assert {width > height for width, height in sizes} == {True, False}
    assert set(modes) == {"RGB", "L"}
    assert modes.count("L") == (400 // 12 + 100 // 12) * len(CLASSES)


@pytest.mark.slow
def test_file_holds_the_rendered_pixels(dataset: Path) -> None:
    for name in CLASSES:
        with Image.open(dataset / "val" / name / f"{name}_0005.jpg") as image:
            stored = np.asarray(image).astype(float)
        assert np.abs(stored - render("val", name, 5)).mean() < 12


def test_rendering_repeats_and_no_two_samples_are_alike() -> None:
    samples = [(split, name, index) for split in PER_CLASS for name in CLASSES for index in range(2)]
    first, second = ([render(*sample).tobytes() for sample in samples] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(samples)


def test_pixels_are_pinned() -> None:
    """A change here changes everybody's dataset: raise `VERSION`, and measure the recipes that use it again."""
    digest = hashlib.sha256()
    for sample in [("train", name, 7) for name in CLASSES] + [("val", "star", 11)]:
        digest.update(render(*sample).tobytes())
    assert (builtin.VERSION, digest.hexdigest()[:16]) == ("builtin-v1", "97bfc9ece2f99ab8")


@pytest.mark.parametrize("name", CLASSES)
def test_figures_stay_in_the_unit_disc(name: str) -> None:
    for seed in range(20):
        for polygon in builtin.FIGURES[name](np.random.Generator(np.random.Philox(seed))):
            assert np.hypot(*polygon.T).max() <= 1.08


def test_coverage_is_the_area_and_agrees_with_supersampling() -> None:
    corners = np.array([[3.3, 2.0], [15.7, 4.5], [12.1, 13.25], [5.0, 11.0]])
    hole = np.array([[7.0, 6.0], [7.0, 8.0], [10.5, 8.0], [10.5, 6.0]])
    covered = builtin._coverage([corners, hole], 16, 20)

    def area(polygon: np.ndarray) -> float:
        x, y = polygon.T
        return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2

    assert covered.sum() == pytest.approx(area(corners) + area(hole), abs=0.05)

    y, x = (np.mgrid[: 16 * 16, : 20 * 16] + 0.5) / 16
    inside = np.ones(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) > 0
    inside &= ~((x > 7) & (x < 10.5) & (y > 6) & (y < 8))
    supersampled = inside.reshape(16, 16, 20, 16).mean(axis=(1, 3))
    np.testing.assert_allclose(covered, supersampled, atol=0.13)


@pytest.mark.slow
def test_linear_classifier_on_pixels_fails(dataset: Path) -> None:
    images: dict[str, torch.Tensor] = {}
    for split in PER_CLASS:
        paths = [path for name in CLASSES for path in sorted((dataset / split / name).iterdir())]
        pixels = [np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BOX)) for path in paths]
        images[split] = torch.from_numpy(np.stack(pixels)).flatten(1).float()
    labels = {split: torch.arange(len(CLASSES)).repeat_interleave(count) for split, count in PER_CLASS.items()}
    mean, std = images["train"].mean(0), images["train"].std(0)
    train, val = (images["train"] - mean) / std, (images["val"] - mean) / std

    linear = nn.Linear(train.shape[1], len(CLASSES))
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=5e-4)
    top1_pct = []
    for _ in range(60):
        optimizer.zero_grad()
        penalty = 0.15 * linear.weight.square().sum()
        (nn.functional.cross_entropy(linear(train), labels["train"]) + penalty).backward()
        optimizer.step()
        with torch.no_grad():
            top1_pct.append(100 * (linear(val).argmax(1) == labels["val"]).float().mean().item())
    assert 15 < max(top1_pct) < 45  # stopped at its best; it does learn something, chance being 10


# ---- the cache


def test_second_call_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path))
    folder = builtin._render_once(cache_root(), SMALL)
    (tmp_path / f"{builtin.VERSION}.lock").unlink()
    assert builtin_dataset() == folder
    assert sorted(path.name for path in tmp_path.iterdir()) == [builtin.VERSION]


def test_two_processes_at_once_get_one_complete_folder(tmp_path: Path) -> None:
    processes = [start_rendering(tmp_path, SMALL["train"]) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    folder = tmp_path / builtin.VERSION
    assert [stdout.strip() for stdout, _ in outputs] == [str(folder)] * 2
    assert sorted(stderr for _, stderr in outputs) == [
        "",
        f"Rendering the built-in dataset (80 images, once) into {folder}\n",
    ]
    assert len(contents(folder)) == 80


def test_killed_rendering_is_not_taken_for_complete(tmp_path: Path) -> None:
    killed = start_rendering(tmp_path, 1000)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(f"{builtin.VERSION}.partial-*/*/*/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert any(tmp_path.glob(f"{builtin.VERSION}.partial-*"))
    assert not (tmp_path / builtin.VERSION).exists()

    elsewhere = tmp_path / f"{builtin.VERSION}.partial-another-machine"
    elsewhere.mkdir()
    folder = builtin._render_once(tmp_path, SMALL)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert contents(folder) == contents(builtin._render_once(undisturbed, SMALL))
    assert not any(tmp_path.glob("*.partial-*"))


def test_failed_rendering_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(split: str, name: str, index: int) -> np.ndarray:
        if name == "cross":
            raise KeyboardInterrupt
        return render(split, name, index)

    monkeypatch.setattr(builtin, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builtin._render_once(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [f"{builtin.VERSION}.lock"]


def test_without_a_common_lock_the_first_to_finish_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / builtin.VERSION

    def overtaken(split: str, name: str, index: int) -> np.ndarray:
        (folder / "of another machine").mkdir(parents=True, exist_ok=True)
        return render(split, name, index)

    monkeypatch.setattr(builtin, "render", overtaken)
    assert builtin._render_once(tmp_path, SMALL) == folder
    assert [path.name for path in folder.iterdir()] == ["of another machine"]
    assert not any(tmp_path.glob("*.partial-*"))


def test_cache_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / 'it\'s a "cache" ü'))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    roots = [cache_root()]
    monkeypatch.setenv("SLUICE_CACHE", "~/own")
    roots.append(cache_root())
    monkeypatch.setenv("SLUICE_CACHE", "")
    roots.append(cache_root())
    monkeypatch.delenv("XDG_CACHE_HOME")
    roots.append(cache_root())
    assert roots == [tmp_path / part for part in ('it\'s a "cache" ü', "home/own", "xdg/sluice", "home/.cache/sluice")]
    assert all(root.is_dir() for root in roots)


def blocked_by_a_file(root: Path) -> None:
    root.write_text("a file where the cache should be")


def closed_to_writing(root: Path) -> None:
    root.mkdir()
    root.chmod(0o500)


@pytest.mark.parametrize("spoil", [blocked_by_a_file, closed_to_writing])
def test_unwritable_cache_names_the_remedy(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoil is closed_to_writing and os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    root = tmp_path / "cache"
    spoil(root)
    monkeypatch.setenv("SLUICE_CACHE", str(root))
    for call in (cache_root, builtin_dataset):
        with pytest.raises(UserError, match=r"cannot write to .*cache \(.+\); set SLUICE_CACHE"):
            call()


def test_lock_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / f"{builtin.VERSION}.lock").mkdir()
    with pytest.raises(UserError, match="set SLUICE_CACHE"):
        builtin._render_once(tmp_path, SMALL)
