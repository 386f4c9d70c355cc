"""Length of a run, and its validations: trained on, ended early, resumed in both."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import UserError
from tests.support.runs import SOLO, checkpoint, dotted, rows, settings_of, tree
from trainer.checkpoint.progress import Progress
from trainer.config import load, load_run, to_yaml
from trainer.loop import fit
from trainer.optim.config import OptimConfig
from trainer.optim.extension import Extension, extended_lr_at, extension_of
from trainer.optim.optimizer import lr_at
from trainer.resilience.signals import StopFlag
from trainer.run_config import RunConfig


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


pytestmark = pytest.mark.usefixtures("one_thread")


def train(base: Path, run: Path, *, stopped: bool = False, **options: Any) -> Progress:
    """Train one epoch of five steps, if not said otherwise; `stopped`: until the first row of metrics."""
    given = {name.replace("__", "."): str(value) for name, value in options.items()}
    stop = StopFlag()
    stop.raised = stopped
    return fit(load(dotted(settings_of(base, run, epochs=1) | given)), SOLO, stop)


def validated(run: Path) -> list[tuple[int, float]]:
    """Step and score of each validation."""
    return [(row["step"], row["val/loss"]) for row in rows(run) if "val/loss" in row]


# Trained on


def test_what_follows_the_schedule() -> None:
    cfg = OptimConfig(lr=0.4, schedule="onecycle", warmup=0.2, momentum=0.9)
    assert extension_of("schedule", 2, lambda epoch: 5) is None and extension_of(0.1, None, lambda epoch: 5) is None
    constant, cosine = extension_of(0.1, 2, lambda epoch: 5), extension_of("cosine", 2, lambda epoch: 5)
    for step in range(10):
        assert extended_lr_at(step, cfg, 30, constant) == extended_lr_at(step, cfg, 30, cosine) == lr_at(step, cfg, 10)
    assert {extended_lr_at(step, cfg, 30, constant) for step in range(10, 30)} == {0.1}
    warm_up = [0.1, 0.2, 0.3, 0.4]
    falls = [0.2 * (1 + math.cos(math.pi * number / 17)) for number in range(1, 17)]
    assert [extended_lr_at(step, cfg, 30, cosine) for step in range(10, 30)] == pytest.approx([*warm_up, *falls])
    assert [extended_lr_at(step, cfg, 30, None) for step in (0, 29)] == [lr_at(0, cfg, 30), lr_at(29, cfg, 30)]
    assert Extension(10, "cosine").words(0.4).startswith("from step 11 on the learning rate is 0.4 after a warm-up")


def test_a_run_trained_on_is_resumed_exactly(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also from its own config.yaml, which keeps where the added epochs begin."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(base, run)
    shutil.copytree(run, whole)
    capsys.readouterr()
    longer: dict[str, Any] = {"run__extend_to": 2, "run__extend_lr": 0.004}
    assert train(base, whole, **longer).finished
    said = capsys.readouterr().out
    assert "it goes on to 2 epochs: from step 6 on the learning rate stays 0.004; it is 0.004 now" in said
    assert {row["train/lr"] for row in rows(whole) if row["step"] > 5 and "train/lr" in row} == {0.004}

    assert train(base, run, **longer, run__max_steps=7).step == 7
    cfg = load_run(run, ["--run.max_steps=null"])
    assert (cfg.run.epochs, cfg.run.extend_from, cfg.run.extend_lr) == (2, 1, 0.004)
    assert fit(cfg, SOLO, StopFlag()).finished
    assert checkpoint(run) == checkpoint(whole)


def test_a_run_trained_on_twice_spans_the_epochs_added_last(tmp_path: Path) -> None:
    """Also when that is resumed from its config.yaml; the same command, and one that gives extend_from, mean what they say."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load(["--run.epochs=4", "--run.extend_to=5"])))
    longer = ["--config", str(file), "--run.extend_to=8"]
    lengths = {"given": load([*longer, "--run.extend_from=4"]), "added": load(longer)}
    assert {name: cfg.run.extend_from for name, cfg in lengths.items()} == {"given": 4, "added": 5}
    file.write_text(to_yaml(lengths["added"]))
    assert load(longer) == load(longer[:2]) == load_run(tmp_path, []) == lengths["added"]


def test_a_run_trained_on_twice_by_its_recipe_spans_the_epochs_added_last(tmp_path: Path) -> None:
    """The recipe has the run's first number of epochs; the run folder knows those that it had since."""
    recipe, saved = [f"--run.dir={tmp_path}", "--run.epochs=4"], tmp_path / "config.yaml"
    lengths = []
    for more in ([], ["--run.extend_to=5"], ["--run.extend_to=8"], ["--run.extend_to=8"]):  # the last resumes it
        cfg = load([*recipe, *more])
        saved.write_text(to_yaml(cfg))
        lengths.append((cfg.run.epochs, cfg.run.extend_from))
    assert lengths == [(4, None), (5, 4), (8, 5), (8, 5)]
    assert load([*recipe, "--run.extend_to=8", "--run.extend_from=4"]).run.extend_from == 4
    # One that was started with more epochs than its recipe has, by an option that is left out now.
    saved.write_text(to_yaml(load([*recipe[:1], "--run.epochs=6"])))
    assert load([*recipe, "--run.extend_to=8"]).run.extend_from == 6


# Ended early


def test_validation_every_other_epoch(base: Path, tmp_path: Path) -> None:
    assert train(base, tmp_path / "run", run__epochs=3, run__validate_every=2).finished
    assert [step for step, _ in validated(tmp_path / "run")] == [10, 15]
    assert {row["step"] for row in rows(tmp_path / "run")} == set(range(1, 16))


def test_a_run_that_grows_no_better_ends(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the same step, if a stop left a validation to the process that went on."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    options: dict[str, Any] = {
        "run__epochs": 30,
        "run__validate_every": "3 steps",
        "run__log_every": 3,
        "run__best_by": "loss",
    }
    options |= {"run__patience": 1, "optim__schedule": "constant", "optim__lr": 0.1}
    progress = train(base, whole, **options)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("ended early after ") and "(the last validation was no better): best val loss " in said
    losses = [loss for _, loss in validated(whole)]
    assert progress.finished and progress.cursor.epoch < 30 and progress.since_best == 1
    assert [step for step, _ in validated(whole)] == list(range(3, progress.step + 1, 3))
    assert losses[:-1] == sorted(losses[:-1], reverse=True) and losses[-1] >= losses[-2]

    assert train(base, run, stopped=True, **options).step == 3 and validated(run) == []
    train(base, run, **options, run__max_steps=4)  # which is no validation that counts
    train(base, run, **options)
    at_pause = {4}
    assert [one for one in validated(run) if one[0] not in at_pause] == validated(whole)
    assert checkpoint(run) == checkpoint(whole)

    before = tree(run)
    train(base, run, **options)
    assert tree(run) == before
    assert "has ended early (the last validation was no better)" in (said := capsys.readouterr().out)
    assert said.endswith("to go on give a larger --run.patience\n")
    more = train(base, run, **options | {"run__patience": 9, "run__max_steps": progress.step + 2})
    assert more.step == progress.step + 2


@pytest.mark.parametrize(
    ("every", "due"),
    [("1", [5, 10, 15]), (2, [10, 15]), ("2 epochs", [10, 15]), ("1 epoch", [5, 10, 15]), ("4 steps", [4, 8, 12, 15])],
)
def test_when_validation_is_due(every: Any, due: list[int]) -> None:
    run = RunConfig(epochs=3, validate_every=every)
    found = [step for step in range(1, 16) if run.validation_due(step, None if step % 5 else step // 5)]
    assert found == due


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["validate_every=0"],
            "run.validate_every: '0' is no interval; give epochs such as 4, or steps such as '500 steps'",
        ),
        (["validate_every=5 minutes"], "run.validate_every: '5 minutes' is no interval"),
        (["patience=0"], "run.patience: 0 is not positive"),
        (["extend_lr=cosine"], "run.extend_lr: it is for a run that is trained on; give run.extend_to too"),
        (["extend_to=9", "extend_lr=-1"], "run.extend_lr: -1.0 is not positive"),
        (["extend_to=9", "extend_from=12"], "run.extend_from: 12 is none of 9 epochs"),
    ],
)
def test_mistakes(options: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        load([f"--run.{option}" for option in options])
    assert str(error.value).startswith(words)


def test_words_and_numbers_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for rate, interval in (("cosine", "500 steps"), ("0.01", "4")):
        file.write_text(f"run: {{extend_to: 9, extend_lr: {rate}, validate_every: {interval}}}\n")
        run = load(["--config", str(file)]).run
        assert (run.extend_lr, run.validate_every) == (rate if rate == "cosine" else 0.01, interval)


def test_weights_averaged_at_the_ends_of_epochs_are_validated_there() -> None:
    with pytest.raises(UserError, match=r"run\.validate_every: 5 steps is within epochs, and optim\.swa averages"):
        load(["--run.validate_every=5 steps", "--optim.swa=0.5", "--optim.ema_decay=0"])
