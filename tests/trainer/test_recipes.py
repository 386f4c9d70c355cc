"""The shipped recipes: what they say of themselves, and that those for ImageNet are the published ones which they name."""

import re
import shlex
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from trainer.config import RECIPES, Config, load, recipes
from trainer.optim.optimizer import lr_at
from trainer.plan import __main__ as plan
from trainer.plan.allreduce_model import Link
from trainer.plan.cli import Cluster, predict
from trainer.plan.measurements import Step, read

IMAGES = 1_281_167  # to train on in ImageNet-1k
GPUS = 8  # of a node

NAMES = recipes()
PAGE = (RECIPES / "IMAGENET.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| `imagenet_")
]
"""Of both tables of recipes: name, options, epochs, of them at 192 px or else nodes, batch, learning rate, others' results."""

PUBLISHED = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| `imagenet/")
]
"""Of the table of published recipes: name, options, epochs, batch, learning rate, others' results."""

FFCV_RAMPS = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 88: (65, 76)}
"""Epochs -> start_ramp and end_ramp, from rn18_configs/ and rn50_configs/ of github.com/libffcv/ffcv-imagenet."""
FFCV_LR = {"imagenet_resnet18": (1024, 0.5, 5e-5), "imagenet_resnet50": (8 * 512, 1.7, 1e-4)}
"""Recipe -> global batch, learning rate and weight decay, from the same."""
MLPERF = {
    3264: (10.5, 5e-5, 2, 14523),
    2048: (8.5, 2e-4, 5, 22530 + 5 * 626),
    4096: (10.0, 2e-4, 5, 13137),
    8192: (17.0, 2e-4, 5, 6095 + 5 * 157),
}
"""Batch -> opt_base_learning_rate, opt_weight_decay, opt_learning_rate_warmup_epochs, and the step where the decay ends: with
opt_learning_rate_decay_steps, which for 2048 and 8192 are counted from the end of the warm-up."""


def header(name: str) -> str:
    """The comment that a recipe opens with, without its signs."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line.removeprefix("#") for line in lines[: next(n for n, s in enumerate(lines) if s[:1] != "#")])


def of_row(row: list[str]) -> Config:
    return load(["--config", row[0].strip("`"), *shlex.split(row[1].strip("`"))])


def ffcv_px(epoch: int, epochs: int) -> int:
    """Their resolution: 160 px up to start_ramp, 192 from end_ramp on, in between on a line and rounded to 32."""
    return 32 * round(float(np.interp(epoch, FFCV_RAMPS[epochs], (160, 192))) / 32)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_uses_all_that_it_lists(name: str) -> None:
    cfg = load(["--config", name])
    epochs = range(cfg.run.epochs)
    assert {cfg.data.size_at(epoch, cfg.run.epochs) for epoch in epochs} == set(cfg.data.sizes_px)
    assert {cfg.data.batch_at(epoch, cfg.run.epochs) for epoch in epochs} == set(cfg.data.batches)
    assert cfg.run.name == Path(name).name


@pytest.mark.parametrize("name", NAMES)
def test_a_header_gives_commands_and_says_what_was_measured(name: str) -> None:
    commands = [
        shlex.split(line) for line in header(name).splitlines() if re.match(r"   .* -m (trainer|launch submit)", line)
    ]
    assert commands
    for words in commands:
        asked = words[words.index("--config") :] if "--config" in words else []
        assert load(asked).run.name == Path(name).name
    assert re.search(r"\bmeasured\b", header(name), re.IGNORECASE)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("imagenet_")])
def test_an_imagenet_recipe_names_its_source_and_that_nobody_ran_it(name: str) -> None:
    assert re.search(r"\bSource: .*github\.com/", header(name), re.DOTALL)
    assert "Not measured." in header(name)
    assert "trainer.bench" in header(name)
    assert any(row[0].strip("`") == name and not row[1] for row in ROWS), "the page lists it as it is"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].strip('`')}, {row[2]} epochs")
def test_the_page_tells_what_its_options_do(row: list[str]) -> None:
    cfg = of_row(row)
    assert (cfg.run.epochs, cfg.data.batch, cfg.optim.lr) == (int(row[2]), int(row[4]), float(row[5]))
    nodes = int(row[3]) if cfg.optim.name == "lars" else 1
    assert int(row[4]) % (nodes * GPUS * cfg.optim.accumulate) == 0
    if cfg.optim.name == "lars":
        assert int(row[4]) == nodes * GPUS * (408 if nodes == 1 else 128)
    else:
        assert sum(cfg.data.size_at(epoch, int(row[2])) == 192 for epoch in range(int(row[2]))) == int(row[3])


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row[0].strip("`") in FFCV_LR], ids=lambda row: f"{row[0]} {row[2]}"
)
def test_ffcv_schedules(row: list[str]) -> None:
    """Learning rate within an update of theirs, which is a line between epochs 0, 2 and the last; size in each epoch."""
    cfg, epochs = of_row(row), int(row[2])
    assert (cfg.data.batch, cfg.optim.lr, cfg.optim.weight_decay) == FFCV_LR[row[0].strip("`")]
    assert isinstance(cfg.data.batch, int)
    in_epoch = -(-IMAGES // cfg.data.batch)
    steps = np.arange(epochs * in_epoch)
    theirs = np.interp(steps / in_epoch, [0, 2, epochs], [1e-4 * cfg.optim.lr, cfg.optim.lr, 0])
    ours = [lr_at(step, cfg.optim, len(steps)) for step in steps.tolist()]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1.5 * cfg.optim.lr / (2 * in_epoch))
    sizes = [cfg.data.size_at(epoch, epochs) for epoch in range(epochs)]
    if epochs in FFCV_RAMPS:
        assert sizes == [ffcv_px(epoch, epochs) for epoch in range(epochs)]
    else:  # the share at 192 px lies between those of the neighbours
        shares = [
            np.mean([ffcv_px(epoch, known) == 192 for epoch in range(known)])
            for known in (max(k for k in FFCV_RAMPS if k < epochs), min(k for k in FFCV_RAMPS if k > epochs))
        ]
        assert min(shares) <= np.mean([size == 192 for size in sizes]) <= max(shares)
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] == "`imagenet_resnet50_lars`"], ids=lambda row: row[4])
def test_mlperf_settings(row: list[str]) -> None:
    """The rate is theirs: a line up to the peak, and from there the square of what is left, to 1e-4."""
    cfg, batch = of_row(row), int(row[4])
    lr, decay, warmup, end = MLPERF[batch]
    assert (cfg.optim.lr, cfg.optim.momentum, cfg.optim.weight_decay) == (lr, 0.9, decay)
    in_epoch = -(-IMAGES // batch)
    total = cfg.run.epochs * in_epoch
    assert end == pytest.approx(total, rel=0.005)
    steps = np.arange(total)
    left = (total - steps) / (total - warmup * in_epoch)
    theirs = np.where(steps < warmup * in_epoch, lr * steps / (warmup * in_epoch), 1e-4 + (lr - 1e-4) * left**2)
    ours = [lr_at(step, cfg.optim, total) for step in steps.tolist()]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.01 * lr)


# The published recipes that others gave names to


@cache
def of_published(number: int) -> Config:
    return of_row(PUBLISHED[number])


def published(name: str) -> Config:
    """The recipe of this run.name, options of the page included."""
    return next(cfg for cfg in map(of_published, range(len(PUBLISHED))) if cfg.run.name == name)


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
def test_a_published_recipe_is_as_its_row_says_and_not_measured(number: int) -> None:
    row, cfg = PUBLISHED[number], of_published(number)
    told = header(row[0].strip("`"))
    assert (cfg.run.epochs, cfg.data.batch, cfg.optim.lr) == (int(row[2]), int(row[3]), float(row[4]))
    assert re.search(r"\bSource: .*github\.com/", told, re.DOTALL) and "Not measured." in told
    assert int(row[3]) % (GPUS * 2) == 0  # pairs are mixed


def test_every_published_recipe_has_its_row() -> None:
    listed = {row[0].strip("`") for row in PUBLISHED if not row[1]}
    assert listed == {name for name in NAMES if name.startswith("imagenet/")}


@pytest.mark.parametrize(("name", "warmup"), [("timm_a1", 5), ("timm_a2", 5), ("timm_a3", 5), ("mosaic", 8)])
def test_cosines_rise_over_so_many_epochs(name: str, warmup: int) -> None:
    cfg = published(name)
    in_epoch = 20
    rates = [lr_at(step, cfg.optim, cfg.run.epochs * in_epoch) for step in range(cfg.run.epochs * in_epoch)]
    assert int(np.argmax(rates)) == pytest.approx(warmup * in_epoch, abs=1)
    middle = (warmup + cfg.run.epochs) * in_epoch // 2
    assert rates[middle] == pytest.approx(cfg.optim.lr / 2, rel=0.01) and rates[-1] < 1e-4 * cfg.optim.lr


def test_torchvisions_schedule_and_average() -> None:
    """Learning rates of its train.py, which sets one each epoch; its average's weight, alpha there."""
    cfg = published("torchvision_v2")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], cfg.optim.lr)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=600 - 5, eta_min=0.0)
    scheduler = lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[5])
    in_epoch = -(-IMAGES // 1024)
    for epoch in range(600):
        ours = lr_at(epoch * in_epoch, cfg.optim, 600 * in_epoch)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-3)
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    adjust = 1024 * cfg.optim.ema_steps / cfg.run.epochs
    assert cfg.optim.ema_decay == pytest.approx(1 - min(1.0, (1 - 0.99998) * adjust), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "first", "delay"), [("mosaic", 0.5, 0.4), ("mosaic_medium", 0.5, 0.4), ("mosaic_hot", 0.6, 0.2)]
)
def test_mosaics_sizes_and_average(name: str, first: float, delay: float) -> None:
    """Composer's ProgressiveResizing in the middle of each share of the run, and its EMA's half-life."""
    cfg = published(name)
    shares = (np.arange(20) + 0.5) / 20
    sides = np.interp(shares, [0, delay, 0.8, 1], [first * 176, first * 176, 176, 176])
    assert np.abs(np.array(cfg.data.sizes_px) - sides).max() <= 2 and all(side % 4 == 0 for side in cfg.data.sizes_px)
    assert cfg.optim.ema_decay == pytest.approx(0.5 ** (cfg.optim.ema_steps / 100), abs=1e-4)
    decay = 3e-4 if name == "mosaic_hot" else 5e-4
    assert cfg.optim.weight_decay == pytest.approx(decay * (1 - cfg.optim.momentum) / cfg.optim.lr, rel=2e-3)


def test_the_page_loads_its_own_commands() -> None:
    """Every command of the page for the trainer itself, with its options."""
    text = PAGE.replace("\\\n", " ")
    commands = re.findall(
        r"^(?:torchrun \S+ -m trainer|python -m launch submit .* --) (--config .*)$", text, re.MULTILINE
    )
    assert len(commands) == 3
    for command in commands:
        assert load(shlex.split(command)).data.path == "/data/imagenet"


def test_the_page_shows_what_the_planner_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the parts that the page's own script makes of published throughput."""
    script, commands, printed = re.findall(r"```\w*\n(.*?)```", PAGE, re.DOTALL)[-3:]
    making, planning = (shlex.split(line, comments=True) for line in commands.replace("\\\n", " ").splitlines())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", making[1:])
    exec(compile(script, making[1], "exec"), {})
    monkeypatch.setattr("sys.argv", planning[2:])
    plan.main()
    assert capsys.readouterr().out == printed

    # Of eight H100 and H200: from as many images/s, with links twice as fast.
    parts = read(tmp_path / "published.json")
    for gpu, images_per_s in (("H100", 57_400), ("H200", 63_500)):
        step = Step(408, 8 * 408 / images_per_s / 3, 8 * 408 / images_per_s * 2 / 3, 0.0)
        cluster = Cluster(1, 8, 408, inside=Link(10e-6, 450e9), between=None)
        told = predict(replace(parts, steps=(step,), loader_s=0.0), cluster)
        minutes = 35 * told.epoch_s / 60
        assert f"| 8 x {gpu} | {told.images_per_s:,.0f} | {told.epoch_s:.1f} | {minutes:.1f} |" in PAGE
    assert predict(replace(parts, steps=(step,)), cluster).images_per_s == pytest.approx(56_000)
