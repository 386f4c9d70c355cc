"""Sweeps: what a file asks for, its runs on this machine, and what they have found. On SLURM: see test_slurm."""

import io
import json
import statistics
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from PIL import Image

from data_pipeline.common.errors import UserError
from launch.slurm.commands import Queued
from launch.slurm.submission import Job, Submission
from launch.sweep.cli import Record, main, read_record
from launch.sweep.settings import Sweep, read_sweep
from launch.sweep.summary import main as summary
from launch.sweep.summary import over_seeds, plot, summarise, text_of
from tests.support import warm
from tests.support.runs import QUICK, environment, images, rows, tree
from trainer.checkpoint.store import Store
from trainer.config import load

GRID = "grid: {optim.lr: [0.1, 1e-2], run.seed: [0, 1]}"


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def sweep_of(tmp_path: Path, text: str) -> Sweep:
    return read_sweep(written(tmp_path, text))


# What a file asks for


def test_a_sweep_over_folds(tmp_path: Path) -> None:
    """The text 1/5 is no number, no date and no folder."""
    sweep = read_sweep(written(tmp_path, "grid: {data.fold: [1/3, 2/3, 3/3]}\noptions: {data.group: 2}\n"))
    assert sweep.names == ["fold=1-3", "fold=2-3", "fold=3-3"]
    found = [load(member.arguments).data for member in sweep.members(tmp_path / "folds")]
    assert [(data.fold, data.group) for data in found] == [("1/3", "2"), ("2/3", "2"), ("3/3", "2")]


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "config: imagenette\noptions: {run.epochs: 3, data.size_px: [64, 96, 128]}\n" + GRID)
    members = sweep.members(tmp_path / "runs/mine")
    assert [member.name for member in members] == ["lr=0.1,seed=0", "lr=0.1,seed=1", "lr=1e-2,seed=0", "lr=1e-2,seed=1"]
    for member, (lr, seed) in zip(members, [(0.1, 0), (0.1, 1), (0.01, 0), (0.01, 1)], strict=True):
        cfg = member.cfg
        assert (cfg.optim.lr, cfg.run.seed, cfg.run.epochs, cfg.data.path) == (lr, seed, 3, "imagenette")
        assert cfg.data.size_px == [64, 96, 128]
        assert cfg.folder == tmp_path / "runs/mine" / member.name
        assert cfg.run.name == f"mine {member.name}"


def test_words_are_words(tmp_path: Path) -> None:
    """In options, a grid and a list alike, as in a recipe."""
    text = "options: {tracking.wandb: off, data.label_column: 007}\n"
    for rest in (
        "grid: {engine.compile: [on, off], data.image_column: [1e3]}",
        "list: [{engine.compile: yes, data.image_column: 1e3}, {engine.compile: false, data.image_column: 1e3}]",
    ):
        members = sweep_of(tmp_path, text + rest).members(tmp_path)
        assert [member.name for member in members] == ["compile=on,image_column=1e3", "compile=off,image_column=1e3"]
        for member, compiled in zip(members, ("on", "off"), strict=True):
            cfg = member.cfg
            assert (cfg.tracking.wandb, cfg.engine.compile) == ("off", compiled)
            assert (cfg.data.label_column, cfg.data.image_column) == ("007", "1e3")


def test_a_list_is_as_it_stands(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "list: [{optim.lr: 0.1}, {optim.lr: 0.1, run.max_steps: null}, {}]")
    members = sweep.members(tmp_path)
    assert [member.name for member in members] == ["lr=0.1", "lr=0.1,max_steps=null", "as-it-is"]
    assert [member.cfg.optim.lr for member in members] == [0.1, 0.1, 0.05]


def test_names_are_folders_and_differ(tmp_path: Path) -> None:
    """Whatever the values are; those that would be alike get a mark of their own, which does not depend on their place."""
    paths = ["/a b/c", "/a-b/c", "it's; rm -rf $HOME", "x" * 300, "x" * 301, "ü", "ABC", "abc"]
    text = "grid: {data.path: %s, run.epochs: [1, [2]]}"
    names = sweep_of(tmp_path, text % json.dumps(paths)).names
    assert len({name.lower() for name in names}) == 2 * len(paths)
    for name in names:
        assert (tmp_path / name).parent == tmp_path and len(name.encode()) < 200 and name.isascii()
        assert not set(name) & set("/\\ %$;'")
    turned = sweep_of(tmp_path, text % json.dumps(paths[::-1])).names
    assert set(turned) == set(names)


def test_options_of_one_last_name_keep_their_sections(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, "grid: {model.name: [a], run.x.name: [b], run.seed: [1]}").names == [
        "model.name=a,run.x.name=b,seed=1"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "cannot be read as YAML"),
        ("[]", "it is no table; give config, options, and grid or list"),
        ("gird: {}", "'gird' has no meaning here"),
        ("config: builtin", "give either grid or list"),
        (GRID + "\nlist: []", "give either grid or list"),
        ("grid: {}", "grid: it is empty"),
        ("grid: {optim.lr: 0.1}", "grid: optim.lr: 0.1 is no list of values"),
        ("grid: {lr: [0.1]}", "grid: 'lr' is no option's name; write it with its section"),
        ("grid: {run.name: [a, b]}", "grid: run.name is chosen by the sweep"),
        ("grid: {run.seed: [1, 1]}", "run.seed=1 is there twice"),
        ("list: [3]", "list: entry 1: 3 is no table of options"),
        ("options: [a]\n" + GRID, "options: ['a'] is no table of options"),
        ("config: 3\n" + GRID, "config: 3 is no recipe's name"),
        ("config: nobody\n" + GRID, "run lr=0.1,seed=0: --config: nobody is neither a file nor a recipe"),
        ("grid: {optim.lr: [0.1, fast, 0.2]}", "run lr=fast: optim.lr: fast does not fit"),
        ("grid: {optim.lrr: [0.1]}", "run lrr=0.1: --optim.lrr: no such option; did you mean --optim.lr?"),
        ("list: [{run.epochs: 1}, {run.epochs: 0}]", "run epochs=0: run.epochs: 0 is not positive"),
    ],
)
@pytest.mark.parametrize("place", [["--local"], ["--parallel", "2"]])
def test_a_wrong_file_writes_nothing(
    text: str, words: str, place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the file, and the run where it is one."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, text)
    with pytest.raises(UserError) as refused:
        main(["mine.yaml", *place])
    assert words in str(refused.value) and "mine.yaml" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "FILE: no file given"),
        (["--local"], "FILE: no file given"),
        (["nobody.yaml"], "FILE: nobody.yaml cannot be read"),
        (["mine.yaml", "--parallel", "0"], "parallel"),
        (["mine.yaml", "--nodes", "0"], "nodes: 0 is not positive"),
        (["mine.yaml"], "no sbatch here: this machine has no SLURM"),
    ],
)
def test_wrong_commands_write_nothing(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    written(tmp_path, GRID)
    with pytest.raises(UserError, match=words):
        main(arguments)
    assert not (tmp_path / "runs").exists()


# Another sweep's folder


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "options: {run.epochs: 4}\n" + GRID,
            "holds another sweep (run.epochs was 3, now 4); give the file another name",
        ),
        ("config: imagenette\noptions: {run.epochs: 3}\n" + GRID, "(config was builtin, now imagenette)"),
        ("options: {run.epochs: 3, optim.ema_decay: 0.9}\n" + GRID, "(optim.ema_decay was not given, now 0.9)"),
    ],
)
def test_another_sweep_is_not_touched(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Record({"config": "builtin", "run.epochs": 3}, {"lr=0.1": {"optim.lr": 0.1}}).write(tmp_path / "runs/mine")
    before = tree(tmp_path / "runs")
    written(tmp_path, text)
    with pytest.raises(UserError) as refused:
        main(["mine.yaml", "--local"])
    assert words in str(refused.value)
    assert tree(tmp_path / "runs") == before


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.yaml").write_text("a run, not a sweep")
    written(tmp_path, GRID)
    with pytest.raises(UserError, match="is in use and holds no sweep; give the file another name"):
        main(["mine.yaml", "--local"])


# On this machine


@pytest.mark.slow
def test_one_after_another_on_this_machine(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One that fails is named at the end and keeps none of the others; the same command tries it again, and only it."""
    there, late = images(tmp_path_factory.getbasetemp()), tmp_path / "late images"
    options = {**QUICK, "data.path": str(there), "run.max_steps": 1, "engine.precision": "fp32"}
    listed = [{"optim.lr": 0.01}, {"data.path": str(late)}, {"optim.lr": 0.02}]
    file = written(tmp_path, json.dumps({"options": options, "list": listed}), "it's mine.yaml")
    folder = tmp_path / "runs/it's mine"
    names = read_sweep(file).names
    first = launch("sweep", file.name, "--local", "--ranks", "1", cwd=tmp_path)
    assert first.returncode == 1
    mistake, named = first.stderr.splitlines()
    assert mistake.startswith(f"error: data.path: {late} is not a folder")
    assert named == f"error: {folder / names[1]} failed with exit code 2"
    assert [Store(folder / name).progress().step for name in names] == [1, 0, 1]
    record = read_record(folder)
    assert record and record.failed == {names[1]: 2}
    table = summarise(folder, record, {}, now_s=0.0)
    assert list(table.state) == ["stopped at run.max_steps 1", "failed with exit code 2", "stopped at run.max_steps 1"]
    assert list(table.done) == [True, False, True]

    late.symlink_to(there)
    kept = {name: tree(folder / name) for name in (names[0], names[2])}
    again = launch("sweep", file.name, "--local", "--ranks", "1", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, ""), again
    assert again.stdout.count("is done already") == 2
    assert {name: tree(folder / name) for name in kept} == kept
    assert len(rows(folder / names[1])) > 0
    assert (read_record(folder) or record).failed == {}


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return warm.run("launch", *arguments, environment=environment(), cwd=cwd)


# What it has found


def trained(run: Path, top1_pct: list[float], finished: bool = True) -> None:
    """A run folder as training leaves it: an epoch every half minute, and 100 images/s more each time."""
    (run / "checkpoints/last").mkdir(parents=True)
    (run / "config.yaml").write_text(f"run: {{name: {run.name!r}, max_steps: null, epochs: 2}}\n")
    figures = [
        {
            "step": n,
            "epoch": n,
            "time": 30.0 * n,
            "train/lr": 0.1,
            "perf/images_per_s": 100.0 * n,
            "perf/train_min": n / 2,
            "val/top1_pct": top1,
        }
        for n, top1 in enumerate(top1_pct, start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in figures))
    progress = {"step": len(top1_pct), "finished": finished}
    (run / "checkpoints/last/progress.json").write_text(json.dumps(progress))


TOP1 = {(0.1, 0): 60.0, (0.1, 1): 64.0, (0.1, 2): 62.5, (0.2, 0): 70.0, (0.2, 1): 71.0}
"""(learning rate, seed) -> best top-1 of the runs that are finished; one more has failed, and one never began."""


@pytest.fixture
def found(tmp_path: Path) -> tuple[Path, Record]:
    folder = tmp_path / "runs/it's $found$"
    settings: dict[str, dict[str, Any]] = {}
    for lr, seed in [*TOP1, (0.2, 2), (0.3, 0)]:
        name = f"lr={lr},seed={seed}"
        settings[name] = {"optim.lr": lr, "run.seed": seed}
        if (lr, seed) in TOP1:
            trained(folder / name, [TOP1[lr, seed] - 5, TOP1[lr, seed], 1.0])
    trained(folder / "lr=0.2,seed=2", [99.0], finished=False)
    record = Record({"config": "builtin"}, settings)
    record.write(folder)
    return folder, record


def test_the_table_has_every_run(found: tuple[Path, Record]) -> None:
    table = summarise(*found, {}, now_s=1e9)
    assert list(table.columns) == [
        "run", "optim.lr", "run.seed", "state", "done", "epochs", "best_top1_pct", "minutes", "images_per_s"
    ]  # fmt: skip
    assert list(table.run) == list(found[1].settings)
    assert list(table.state) == ["finished"] * 5 + ["stopped, saved at step 1", "not begun"]
    assert list(table.best_top1_pct[:6]) == [*TOP1.values(), 99.0] and table.best_top1_pct.isna()[6]
    assert list(table.minutes[:6]) == [1.5] * 5 + [0.5] and table.minutes.isna()[6]
    assert list(table.images_per_s[:6]) == [200.0] * 5 + [100.0]
    assert list(table.epochs) == [3, 3, 3, 3, 3, 1, 0]
    assert "nan" not in text_of(table).lower()


def test_images_of_several_classes_have_map_for_top1(found: tuple[Path, Record]) -> None:
    before = summarise(*found, {}, now_s=1e9)
    for file in found[0].glob("*/metrics.jsonl"):
        file.write_text(file.read_text().replace("val/top1_pct", "val/map_pct"))
    after = summarise(*found, {}, now_s=1e9)
    assert after.equals(before.rename(columns={"best_top1_pct": "best_map_pct"}))
    spread = over_seeds(after)
    assert spread is not None and {"mean_map_pct", "max_map_pct"} < {*spread} and "mean_top1_pct" not in spread
    assert plot(after, "mAP").startswith(b"\x89PNG")


def test_the_spread_over_seeds_is_that_of_finished_runs(found: tuple[Path, Record]) -> None:
    spread = over_seeds(summarise(*found, {}, now_s=1e9))
    assert spread is not None
    for lr in (0.1, 0.2):
        values = [top1 for (other, _), top1 in TOP1.items() if other == lr]
        row = spread[spread["optim.lr"] == str(lr)].iloc[0]
        assert row.runs == len(values)
        assert row.mean_top1_pct == pytest.approx(statistics.mean(values))
        assert row.std_top1_pct == pytest.approx(statistics.stdev(values))
        assert (row.min_top1_pct, row.max_top1_pct) == (min(values), max(values))
    assert spread[spread["optim.lr"] == "0.3"].iloc[0].runs == 0


def test_no_spread_without_seeds(found: tuple[Path, Record]) -> None:
    folder, record = found
    seeds_only = {name: {"run.seed": own["run.seed"]} for name, own in list(record.settings.items())[:3]}
    no_seeds = {name: {"optim.lr": own["optim.lr"]} for name, own in record.settings.items()}
    only = over_seeds(summarise(folder, Record({}, seeds_only), {}, now_s=1e9))
    assert only is not None and list(only.setting) == ["all"] and list(only.runs) == [3]
    assert over_seeds(summarise(folder, Record({}, no_seeds), {}, now_s=1e9)) is None


def test_slurm_has_a_say_until_a_run_is_finished(found: tuple[Path, Record]) -> None:
    folder, record = found
    for number, name in enumerate(record.settings):
        submission = Submission(folder / name / "slurm/1")
        submission.folder.mkdir(parents=True)
        submission.write_job(Job(str(folder / name), "/", {}, "v", "2026-01-31 12:00:00", f"7_{number}"))
    failed = Submission(folder / "lr=0.3,seed=0/slurm/1")
    failed.write_restarts(crashes=0, restarts=0, end="error: data.path: x")
    jobs = {"7_5": Queued("RUNNING", "gpu1", 0, "None"), "7_6": Queued("FAILED", "", 0, "None")}
    states = list(summarise(folder, record, jobs, now_s=1e9).state)
    assert states == ["finished"] * 5 + ["running", "error: data.path: x"]


def test_the_summary_is_written_once(
    found: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = found
    monkeypatch.chdir(folder.parents[1])
    summary([folder.name])
    said = capsys.readouterr().out
    assert "62.17" in said and "2.02" in said, "mean and spread of 60, 64 and 62.5"
    runs = pd.read_csv(folder / "summary.csv")
    assert list(runs.best_top1_pct.dropna()) == [*TOP1.values(), 99.0]
    assert len(pd.read_csv(folder / "summary-seeds.csv")) == 3
    before = tree(folder)
    with pytest.raises(UserError, match=r"summary\.csv exists; give --force to replace it"):
        summary([str(folder)])
    assert tree(folder) == before
    summary([str(folder), "--force"])
    with pytest.raises(UserError, match="SWEEP: nobody holds no sweep"):
        summary(["nobody"])


def test_a_run_that_cannot_be_read_is_left_out(found: tuple[Path, Record], capsys: pytest.CaptureFixture[str]) -> None:
    folder, record = found
    hostile, *others = record.settings
    (folder / hostile / "metrics.jsonl").write_text("[" * 100_000 + "\n")
    assert list(summarise(folder, record, {}, now_s=1e9).run) == others
    said = capsys.readouterr().err
    assert said.startswith(f"left out: RUNS: {folder / hostile / 'metrics.jsonl'} cannot be read (")
    assert said.count("\n") == 1
    with pytest.raises(UserError, match="cannot be read"):
        summarise(folder, Record({}, {hostile: record.settings[hostile]}), {}, now_s=1e9)


def test_the_plot_grows_with_the_settings(found: tuple[Path, Record]) -> None:
    table = summarise(*found, {}, now_s=1e9)
    few, many = (
        Image.open(
            io.BytesIO(plot(pd.concat([table.assign(**{"optim.lr": f"{n}"}) for n in range(count)]), "it's $ü$"))
        )
        for count in (1, 40)
    )
    assert few.format == "PNG" and few.width == many.width == 1125
    assert many.height > 5 * few.height
    colours = {colour for _, colour in few.convert("RGB").getcolors(1 << 24) or ()}
    assert (11, 110, 153) in colours, "the runs' dots"


# For agents of W&B


@pytest.mark.parametrize(
    "runs",
    [
        "grid: {optim.lr: [0.1, 1e-5], run.max_steps: [null], data.size_px: [[32, 64]], engine.compile: [on, off]}",
        "list: [{optim.lr: 0.1}, {optim.accumulate: 2, run.epochs: 2, data.path: it's 1, engine.compile: on}, {}]",
    ],
)
def test_agents_of_wandb_train_the_same_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: str
) -> None:
    """As wandb's own code makes a command of the file."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, f"options: {{data.path: a b, optim.momentum: 0.5, run.epochs: 3}}\n{runs}")
    main([str(file), "--wandb", "--ranks", "2"])
    assert capsys.readouterr().out.startswith(f"{len(read_sweep(file).settings)} runs; next: wandb sweep ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.wandb.yaml", "mine.yaml"]
    main([str(file), "--wandb", "--ranks", "2"])  # the same again is no change

    sweep = yaml.safe_load((tmp_path / "mine.wandb.yaml").read_text())
    assert sweep["command"][:7] == ["${env}", "python", "-m", "launch", "local", "-n", "2"]
    (given,) = (at for at, word in enumerate(sweep["command"]) if word == "${args}")
    parameters, members = sweep["parameters"], read_sweep(file).members(tmp_path / "runs/mine")
    for number, values in enumerate(product(*(parameter["values"] for parameter in parameters.values()))):
        of_agent = {name: {"value": value} for name, value in zip(parameters, values, strict=True)}
        arguments = create_sweep_command_args({"args": of_agent})["args"]
        cfg = load([*sweep["command"][7:given], *arguments, *sweep["command"][given + 1 :]])
        member = members[number]
        assert cfg.run.name == "mine" and cfg.run.dir is None
        assert replace(cfg, run=replace(cfg.run, name=member.cfg.run.name, dir=member.cfg.run.dir)) == member.cfg


@pytest.mark.parametrize(
    ("options", "metric", "is_said"),
    [
        ("", "val/best_top1_pct", True),
        (", data.labels: multi", "val/best_map_pct", True),
        (", data.labels: multi, run.best_by: macro_f1", "val/macro_f1_pct", False),
        (", run.best_by: macro_recall", "val/macro_recall_pct", False),
    ],
)
def test_the_metric_for_wandb_is_that_of_the_best_weights_or_said(
    options: str, metric: str, is_said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, f"options: {{run.epochs: 3{options}}}\ngrid: {{optim.lr: [0.1, 0.2]}}\n")
    main([str(file), "--wandb"])
    assert yaml.safe_load((tmp_path / "mine.wandb.yaml").read_text())["metric"] == {"name": metric, "goal": "maximize"}
    assert (f"its metric is {metric}, as the options give no run.best_by" in capsys.readouterr().out) == is_said


def test_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    file = written(tmp_path, GRID)
    theirs = written(tmp_path, "method: bayes\n", "mine.wandb.yaml")
    with pytest.raises(UserError, match="there already, with another content; move it away"):
        main([str(file), "--wandb"])
    assert theirs.read_text() == "method: bayes\n"
