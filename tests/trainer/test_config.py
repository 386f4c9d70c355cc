"""Configuration: what wins over what, what is refused and in which words, and that it is read back as it was written."""

import importlib
import os
import shlex
import subprocess
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import data_pipeline.options
from data_pipeline.common.errors import UserError
from tests.support import warm
from tests.support.runs import environment
from trainer.config import RECIPES, Config, load, load_run, recipes, to_yaml
from trainer.resume_rules import first_difference, may_change


def reload(cfg: Config, folder: Path) -> Config:
    (folder / "config.yaml").write_text(to_yaml(cfg))
    return load_run(folder, [])


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_reloads(name: str, tmp_path: Path) -> None:
    cfg = load(["--config", name])
    assert cfg == load([f"--config={name}"]) == load(["--config", str(RECIPES / f"{name}.yaml")])
    assert reload(cfg, tmp_path) == cfg


@pytest.mark.parametrize(
    "value", ["1e3", "1e-3", "-4E+2", "007", "1.5", "null", "true", "on", "12:30", "2026-01-01", "a: b", "ü ö'\"", "#1"]
)
def test_any_text_reloads_equal(value: str, tmp_path: Path) -> None:
    cfg = load([f"--run.name={value}", f"--data.path={value}", "--optim.lr", "1e-5"])
    assert (cfg.run.name, cfg.data.path) == (value, value)
    assert reload(cfg, tmp_path) == cfg


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        *(
            (f"tracking:\n  wandb: {word}\n", "tracking.wandb", "off")
            for word in ("off", "Off", "no", "false", "FALSE", "'off'")
        ),
        ("tracking: {wandb: online}", "tracking.wandb", "online"),
        ("engine: {compile: on}", "engine.compile", "on"),
        ("engine: {compile: yes}", "engine.compile", "on"),
        ("engine: {compression: no, zero_stage: 2}", "engine.compression", "none"),
        ("data: {augment: {policy: null}}", "data.augment.policy", "none"),
        *(
            (f"run:\n  name: {word}\n", "run.name", word)
            for word in ("007", "1e3", "0x10", "12:30", "2024-01-01", "1_000", ".5", "on", "No", "true", ".nan")
        ),
        ("run: {name: a, dir: null}", "run.dir", None),
        ("data: {images: ~}", "data.images", None),
        ("data: {label_column: 007}", "data.label_column", "007"),
        ("optim: {nesterov: off}", "optim.nesterov", False),
        ("optim: {class_weights: balanced}", "optim.class_weights", "balanced"),
        ("optim: {class_weights: null}", "optim.class_weights", "none"),
        ("optim: {class_weights: [1, 2.5]}", "optim.class_weights", [1.0, 2.5]),
        ("run: {seed: 007}", "run.seed", 7),
        ("data: {batch: 064}", "data.batch", 64),
        ("data: {batch: [064, 0_128, 08]}", "data.batch", [64, 128, 8]),
        ("data: {batch: 1_000}", "data.batch", 1000),
        ("optim: {lr: 010}", "optim.lr", 10.0),
        ("optim: {lr: 00.5}", "optim.lr", 0.5),
        ("run: {log_every: +064}", "run.log_every", 64),
        ("optim: {lr: 1e-3}", "optim.lr", 0.001),
    ],
)
def test_a_file_means_what_is_written_in_it(text: str, option: str, value: object, tmp_path: Path) -> None:
    """YAML's own reading of words and numbers is for options that are no text."""
    (tmp_path / "recipe.yaml").write_text(text)
    cfg = load(["--config", str(tmp_path / "recipe.yaml")])
    found: Any = cfg
    for name in option.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)
    assert reload(cfg, tmp_path) == cfg


def test_parts_that_read_options_in_one_process_do_not_undo_each_other(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run: {name: 007}\ndata: {batch: 064}\n")
    importlib.reload(data_pipeline.options)  # as if a command on data were imported after the trainer
    cfg = load(["--config", str(tmp_path / "recipe.yaml")])
    assert (cfg.run.name, cfg.data.batch) == ("007", 64)


def test_the_last_wins(tmp_path: Path) -> None:
    """Defaults, then the recipe, then a file, then dotted options."""
    assert load([]) == load(["--config", "builtin"])
    recipe = yaml.safe_load((RECIPES / "builtin.yaml").read_text())
    assert load([]).run.epochs == recipe["run"]["epochs"] != Config().run.epochs
    file = tmp_path / "a file.yaml"
    file.write_text("optim:\n  lr: 0.25\n  momentum: 0.5\n")
    cfg = load(["--config", "builtin", "--config", str(file), "--optim.lr", "1e-3", "--data.size_px=[32,64]"])
    assert isinstance(cfg.optim.lr, float)
    assert (cfg.optim.lr, cfg.optim.momentum, cfg.run.epochs) == (0.001, 0.5, recipe["run"]["epochs"])
    assert cfg.data.size_px == [32, 64]
    assert load(["--config", str(file)]).run == Config().run, "a file of one's own builds on the defaults"


def test_run_folder_is_the_name_or_what_is_given() -> None:
    assert load(["--run.name", "first"]).folder == Path("runs/first")
    assert load(["--run.name", "first", "--run.dir", "/tmp/a b"]).folder == Path("/tmp/a b")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"optim:\n  lrr: 0.1\n", "FILE: optim.lrr: no such option; did you mean optim.lr?"),
        (b"optimm:\n  lr: 0.1\n", "FILE: optimm.lr: no such option; did you mean optim.lr?"),
        (
            b"data:\n  augment:\n    flipp: 1\n",
            "FILE: data.augment.flipp: no such option; did you mean data.augment.flip?",
        ),
        (b"config: other.yaml\n", "FILE: config: no such option; see --help"),
        (b"tracking: {wandb: on}", "tracking.wandb: on does not fit; give one of 'auto', 'online', 'offline', 'off'"),
        (b"data:\n  path:\n", "FILE: data.path: nothing is given; give a value, or leave the option out"),
        (b"run: {epochs: ~}", "FILE: run.epochs: nothing is given; give a value, or leave the option out"),
        (b"run: {epochs: 1:30}", "FILE: run.epochs: 1:30 does not fit; give a number without colons"),
        (b"run: {epochs: 1e3}", "run.epochs: 1000.0 does not fit; give a whole number"),
        (b"optim: {lr: 1:30.5}", "FILE: optim.lr: 1:30.5 does not fit; give a number without colons"),
        (b"data: {size_px: [64, 1:30]}", "FILE: data.size_px: 1:30 does not fit; give a number without colons"),
        (
            b"optim: {class_weights: [1:30, 2]}",
            "FILE: optim.class_weights: 1:30 does not fit; give a number without colons",
        ),
        (b"optim:\n  lr: fast\n", "optim.lr: fast does not fit; give a number"),
        (b"optim:\n  lr: -1\n", "optim.lr: -1.0 is not positive; give a learning rate above 0"),
        (b"", f"FILE: it holds no options; write them as in {RECIPES / 'builtin.yaml'}"),
        (b"- 1\n- 2\n", f"FILE: it holds no options; write them as in {RECIPES / 'builtin.yaml'}"),
        (b"1: 2\n", "FILE: 1: no such option; see --help"),
        (b"run: &run\n  name: *run\n", "FILE: it is no YAML: it holds a value that contains itself"),
        (b"optim:\n  lr: 2026-13-40\n", "FILE: it is no YAML: month must be in 1..12"),
        (b"x" * (2 << 20), "FILE: it is no YAML: it has more than 1 MiB"),
        (b"run: [1\n", "FILE: it is no YAML: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "--config: FILE cannot be read: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_mistakes_in_a_file(text: bytes, line: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text)
    with pytest.raises(UserError) as error:
        load(["--config", str(file)])
    message = str(error.value)
    assert message.replace(str(file), "FILE").startswith(line) and "\n" not in message


def difference(saved: str, *options: str) -> tuple[str, str]:
    """The option that differs, and the remedy."""
    found = first_difference(saved, load([*options]))
    assert found is not None
    return found


def test_first_difference_names_what_decides_the_weights() -> None:
    cfg = load([])
    saved = to_yaml(cfg)
    free = ["--run.max_steps", "9", "--data.path", "/x", "--engine.precision", "bf16", "--tracking.wandb", "off"]
    assert first_difference(saved, cfg) is None
    assert first_difference(saved, load(free)) is None
    assert difference(saved, "--optim.lr", "0.5")[0] == f"optim.lr was {cfg.optim.lr}, now 0.5"
    assert difference(saved, "--optim.betas", "[0.5,0.5]")[0] == "optim.betas was [0.9, 0.999], now [0.5, 0.5]"
    assert difference(saved, "--data.augment.flip", "0")[0] == "data.augment.flip was 0.5, now 0.0"


def test_an_option_newer_than_the_run_folder_was_at_its_default() -> None:
    saved = "".join(line for line in to_yaml(load([])).splitlines(keepends=True) if "drop_path" not in line)
    assert first_difference(saved, load([])) is None
    assert difference(saved, "--model.drop_path", "0.3")[0] == "model.drop_path was 0.0, now 0.3"


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ([], ["--run.best_by", "map"], True),
        (["--run.best_by", "top1"], [], True),
        ([], ["--run.best_by", "loss"], False),
        (["--optim.teacher", "runs/a"], ["--optim.teacher", "runs/b"], True),
        ([], ["--optim.teacher", "runs/a"], False),
    ],
)
def test_the_same_in_other_words_is_no_difference(before: list[str], now: list[str], same: bool) -> None:
    assert (first_difference(to_yaml(load(before)), load(now)) is None) == same


FROM_WEIGHTS = "go on from its weights as a run of its own"


@pytest.mark.parametrize(
    ("changed", "ways", "place"),
    [
        (["run.epochs=9"], ["train it on"], ["run.extend_to=6", "run.extend_lr=0.01"]),
        (["run.epochs=2"], [], ["run.extend_to=6", "run.extend_lr=0.01"]),
        (["run.seed=3"], [], ["run.dir=it's 1"]),
        (["data.augment.flip=0.0", "optim.betas=[0.5, 0.5]"], [FROM_WEIGHTS], ["run.dir=it's 1"]),
        (["model.freeze_until=1"], [FROM_WEIGHTS], ["run.name=a b", "model.weights=w.pth"]),
    ],
)
def test_a_difference_names_commands_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: list[str], ways: list[str], place: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.config._preprocessing", lambda weights: {})  # the files are not there
    before = load(["--run.keep=5", "--data.batch=48", *(f"--{option}" for option in place)])
    run = before.folder
    (run / "checkpoints/last").mkdir(parents=True)
    run.with_name(f"{run.name}-2").mkdir()
    (run / "config.yaml").write_text(to_yaml(before))
    length = (
        ["--run.extend_to=null", "--run.extend_from=null", "--run.extend_lr=schedule"] if "epochs" in changed[0] else []
    )
    now = load_run(run, [*length, *(f"--{option}" for option in changed)])
    found = first_difference(to_yaml(before), now)
    assert found and found.what.startswith(changed[0].partition("=")[0] + " was ")

    assert [way.partition(": ")[0] for way in found.remedy.split("; ")] == [
        f"to {way}" for way in ("resume it", *ways, "train anew")
    ]
    for way in found.remedy.split("; "):
        what, _, command = way.partition(": ")
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "trainer"]
        cfg = load(words[3:])
        assert cfg.run.keep == 5, "the options of the run that is there"
        if what in ("to resume it", "to train it on"):
            assert cfg.folder == run and first_difference(to_yaml(before), cfg) is None
            assert cfg.run.epochs == (now.run.epochs if "on" in what else before.run.epochs)
            continue
        assert cfg.folder == run.with_name(f"{run.name}-3"), "where nothing is yet"
        weights = str(run) if FROM_WEIGHTS in what else now.model.weights
        own = replace(cfg.run, name=now.run.name, dir=now.run.dir)
        assert replace(cfg, run=own, model=replace(cfg.model, weights=weights)) == replace(
            now, model=replace(now.model, weights=weights)
        )
        assert cfg.model.weights == weights


def test_another_recipe_is_another_run() -> None:
    remedy = difference(to_yaml(load([])), "--config", "imagenette_75", "--run.name", "builtin")[1]
    assert (
        remedy
        == "to resume it: python -m trainer --config runs/builtin/config.yaml; to train anew give another --run.name"
    )


def test_more_epochs_are_the_same_run_if_it_is_extended() -> None:
    saved = to_yaml(load([]))
    extended = load(["--run.extend_to", "9"])
    assert (extended.run.epochs, first_difference(saved, extended)) == (9, None)
    longer = to_yaml(extended)
    assert first_difference(longer, load(["--run.epochs", "9"])) is None
    assert difference(longer)[0] == "run.epochs was 9, now 4"
    assert difference(longer, "--run.extend_to", "8")[0] == "run.epochs was 9, now 8"
    with pytest.raises(
        UserError, match=r"run\.extend_to: 3 is less than run\.epochs 4; give the number of epochs in all"
    ):
        load(["--run.extend_to", "3"])


def test_what_may_change_stands_at_the_fields() -> None:
    free = {option for option in options(Config()) if may_change(option)}
    assert {option for option in free if option.split(".")[0] not in ("engine", "tracking")} == {
        *("run.name", "run.dir", "run.extend_to", "run.max_steps", "run.log_every", "run.save_every", "run.keep"),
        *("run.keep_every", "run.profile", "run.on_nonfinite", "run.stall_s", "run.slow_pct"),
        *("run.snapshot_every", "run.snapshot_dir", "run.mirror"),
        *("run.extend_lr", "run.extend_from", "run.patience", "run.validate_every"),
        *("data.path", "data.images", "data.threads", "data.on_error", "data.max_bad_share", "data.cache_gb"),
        "data.prefetch",
    }
    assert {"engine.precision", "engine.threads", "tracking.wandb"} <= free
    assert not any(map(may_change, ("config", "run", "no.such", "data.augment", "optim.lr.x")))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("builtin", "builtin"),
        ("flowers", "flowers"),
        ("/data/my flowers/", "my flowers"),
        (".", "place"),
        ("..", "work"),
    ],
)
def test_a_run_is_called_after_its_data(path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "place" / "cats").mkdir(parents=True)
    (tmp_path / "work" / "place" / "cats" / "train.csv").write_text("")
    monkeypatch.chdir(tmp_path / "work" / "place")
    assert load(["--data.path", path]).folder == Path("runs") / name
    assert load(["--data.path", "cats/train.csv"]).folder == Path("runs/cats")
    assert load(["--data.path", path, "--run.name", "first"]).folder == Path("runs/first")
    assert load(["--config", "imagenette_75", "--data.path", path]).folder == Path("runs/imagenette_75")


@pytest.mark.parametrize("text", ["a\tb", "a: b: c", "[1", "'", '"un\\dis"\t; $HOME [ü] \'x', "%x", "@x"])
def test_text_that_is_no_yaml_is_text(text: str) -> None:
    assert load(["--run.dir", text]).run.dir == text


@pytest.mark.parametrize(
    ("arguments", "batch"),
    [("064", 64), ("[064, 32]", [64, 32]), ("[08]", [8]), ("1_000", 1000), ("1:30", None), ("[1:30]", None)],
)
def test_a_number_on_the_command_line_is_to_base_ten(arguments: str, batch: object) -> None:
    if batch is None:
        with pytest.raises(UserError, match=r"^data\.batch: 1:30 does not fit; give a number without colons"):
            load(["--data.batch", arguments])
    else:
        assert load(["--data.batch", arguments]).data.batch == batch


def test_the_options_of_a_moved_run_do_not_lead_to_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They name the folder that it was started in, where another run, or none, would be trained."""
    monkeypatch.chdir(tmp_path)
    saved = Path("runs/first/config.yaml")
    (saved.parent / "checkpoints/last").mkdir(parents=True)
    saved.write_text(to_yaml(load(["--run.name", "first"])))
    assert load(["--config", str(saved)]).folder == saved.parent
    moved = saved.parent.rename("runs/my run") / "config.yaml"
    with pytest.raises(UserError, match=r"copied from runs/first, .* give --run\.dir 'runs/my run' to go on with it"):
        load(["--config", str(moved), "--run.extend_to", "9"])
    for option in (["--run.dir", "runs/my run"], ["--run.name", "first"], ["--run.name", "second"]):
        load(["--config", str(moved), *option])
    (moved.parent / "checkpoints/last").rmdir()
    assert load(["--config", str(moved)]).folder == saved.parent, "options that were copied alone are a recipe"


def test_load_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml; give one such as"):
        load_run(tmp_path, [])
    (tmp_path / "config.yaml").write_text(to_yaml(load(["--data.batch", "48"])))
    cfg = load_run(tmp_path, ["--data.path", "/elsewhere"])
    assert (cfg.data.batch, cfg.data.path) == (48, "/elsewhere")


def options(section: Any, prefix: str = "") -> list[str]:
    names = []
    for field in fields(section):
        value = getattr(section, field.name)
        names += options(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]
    return names


def trainer(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return warm.run("trainer", *arguments, environment={**environment(), "COLUMNS": "100", **variables})


def test_print_config_loads_equal(tmp_path: Path) -> None:
    arguments = ["--config", "builtin", "--run.name", "1e3", "--optim.lr", "1e-3", "--data.size_px", "[32,64]"]
    printed = trainer(*arguments, "--print_config")
    assert (printed.returncode, printed.stderr) == (0, "")
    file = tmp_path / "printed.yaml"
    file.write_text(printed.stdout)
    assert load(["--config", str(file)]) == load(arguments)


def test_help_explains_every_option() -> None:
    shown = trainer("--config", "builtin", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    entries = shown.stdout.split("\n  --")[1:]
    explained = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    names = options(Config())
    assert len(names) > 40
    for name in names:
        assert len(explained[name].partition("(type:")[0]) > len(name) + 20, f"--{name} has no explanation"
        assert "default:" in explained[name]
    assert "Global batch: images in an optimizer step, over all ranks and micro-" in explained["data.batch"]


def test_mistake_as_the_shell_sees_it() -> None:
    """One line on stderr, newlines in the value notwithstanding; exit code 2; rank 1 leaves the word to rank 0."""
    assert os.environ.get("RANK") is None
    failed = trainer("--optim.lr", "fa\nst")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "error: optim.lr: fa st does not fit; give a number\n"


def test_runs_of_a_wandb_sweep_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "5weep")
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    assert load(["--optim.lr=0.3"]).folder.name == "builtin-run1"
    assert load(["--run.name=mine"]).folder.name == "mine-run1", "all runs of a sweep have the same command"
    assert load(["--run.name=mine-run1"]).folder.name == "mine-run1"
    assert str(load(["--run.dir", "here"]).folder) == "here"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert load(["--optim.lr=0.3"]).folder.name == "builtin"


def test_run_of_a_wandb_sweep_is_where_its_agent_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    assert (load([]).tracking.project, load([]).tracking.entity) == ("theirs", "team")
    assert load(["--tracking.project=own"]).tracking.project == "own"
    monkeypatch.setenv("WANDB_SWEEP_ID", "5weep")
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    cfg = load(["--tracking.project=own"])  # W&B itself passes over it in a sweep
    assert (cfg.tracking.project, cfg.tracking.entity) == ("theirs", "team")


def test_agents_of_a_wandb_sweep_write_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "5weep")
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    values = {"run.max_steps": None, "data.images": None, "engine.sync_bn": True, "optim.lr": 1e-05}
    given = [f"--{option}={value}" for option, value in values.items()]
    cfg = load([*given, f"--data.size_px={[32, 64]}", f"--optim={ {'ema_decay': 0.8} }"])
    assert (cfg.run.max_steps, cfg.data.images, cfg.engine.sync_bn, cfg.optim.lr) == tuple(values.values())
    assert (cfg.data.size_px, cfg.optim.ema_decay) == ([32, 64], 0.8)


def test_folder_of_one_trial_is_not_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(["--run.dir", str(tmp_path)])
    (tmp_path / "wandb_id.txt").write_text("run1\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "5weep")
    for trial, refused in (("run1", False), ("run2", True)):
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        difference = first_difference(to_yaml(cfg), cfg)
        assert (difference is not None) == refused
    assert difference and difference.what == "its W&B run was run1, now run2" and "--run.dir" in difference.remedy


def test_config_takes_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(["--config", "imagenette", '--config={"optim.lr": 2.0, "engine.compile": off}', "--optim.momentum=0.5"])
    assert (cfg.data.path, cfg.optim.lr, cfg.engine.compile, cfg.optim.momentum) == ("imagenette", 2.0, "off", 0.5)
    with pytest.raises(UserError, match="lrr: no such option"):
        load(["--config", "{optim.lrr: 1}"])
