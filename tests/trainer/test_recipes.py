"""The shipped recipes: what they say of themselves, and that those for ImageNet are the published ones which they name."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from trainer.config import RECIPES, Config, load, recipes
from trainer.optim.optimizer import lr_at
from trainer.plan import __main__ as plan

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

FFCV_RAMPS = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 88: (65, 76)}
"""Epochs -> start_ramp and end_ramp, from rn18_configs/ and rn50_configs/ of github.com/libffcv/ffcv-imagenet."""
FFCV_LR = {"imagenet_resnet18": (1024, 0.5, 5e-5), "imagenet_resnet50": (8 * 512, 1.7, 1e-4)}
"""Recipe -> global batch, learning rate and weight decay, from the same."""
MLPERF = {2048: (8.5, 22530), 4096: (10.0, None), 8192: (17.0, 6095)}
"""Batch -> opt_base_learning_rate and, where they agree with the epochs of the reference, opt_learning_rate_decay_steps."""


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
        assert int(row[4]) == nodes * GPUS * 128
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
    cfg, batch = of_row(row), int(row[4])
    lr, decay_steps = MLPERF[batch]
    assert (cfg.optim.lr, cfg.optim.momentum, cfg.optim.weight_decay) == (lr, 0.9, 2e-4)
    assert cfg.optim.warmup * cfg.run.epochs == pytest.approx(5, abs=0.05)
    if decay_steps:  # theirs begin after the warm-up of five epochs
        assert decay_steps / (IMAGES / batch) + 5 == pytest.approx(cfg.run.epochs, abs=0.1)


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
