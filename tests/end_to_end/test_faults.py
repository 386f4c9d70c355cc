"""A user's mistake costs one line: `error: ...` on stderr, exit code 2, and nothing is written."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from data_pipeline.common.entry_point import run_command
from tests.support.runs import (
    QUICK,
    ROOT,
    STEPS,
    Job,
    checkpoint,
    dotted,
    environment,
    images,
    reference,
    rows,
    settings_of,
    train,
    tree,
)
from trainer import __main__ as training
from trainer import evaluate
from trainer.checkpoint.store import Store

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; returns its exit code, stdout and stderr."""

    def run(main: Callable[[], None], *arguments: str) -> tuple[int, str, str]:
        assert "RANK" not in os.environ
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capfd.readouterr()

    return run


def assert_one_line(ended: tuple[int, str, str], line: str) -> None:
    code, out, err = ended
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err


class Fault(NamedTuple):
    """Options beside those that work, and how the line begins that says what is wrong. DATA: the folder of images."""

    line: str
    options: dict[str, str]


COMMAND_LINES = {
    "unknown option": Fault("--optim.lrr: no such option; did you mean --optim.lr?", {"optim.lrr": "1"}),
    "wrong type": Fault("optim.lr: fast does not fit; give a number", {"optim.lr": "fast"}),
    "value of two lines": Fault("optim.lr: fa st does not fit; give a number", {"optim.lr": "fa\nst"}),
    "bad value": Fault("optim.lr: -1.0 is not positive; give a learning rate above 0", {"optim.lr": "-1"}),
    "unknown choice": Fault(
        "model.name: 'resnet19' is unknown; choose one of resnet18, resnet34", {"model.name": "resnet19"}
    ),
    "recipe behind options": Fault("--config: it comes after other options and would undo them", {"config": "builtin"}),
    "batch that cannot be shared": Fault(
        "data.batch: 12 images cannot be shared by 1 ranks x 5 micro-batches; choose a multiple of 5",
        {"optim.accumulate": "5"},
    ),
    "run folder below a file": Fault(
        "run.dir: cannot write to broken.yaml/run (Not a directory); give another --run.dir",
        {"run.dir": "broken.yaml/run"},
    ),
    "run folder in /proc": Fault("run.dir: cannot write to /proc/run (", {"run.dir": "/proc/run"}),
    "run folder is a file": Fault(
        "run.dir: broken.yaml is in use and holds no run; give another --run.dir", {"run.dir": "broken.yaml"}
    ),
    "run folder of something else": Fault(
        "run.dir: some photos is in use and holds no run; give another --run.dir", {"run.dir": "some photos"}
    ),
}


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_mistaken_options(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("run:\n  epochs: [1\n")
    Path("some photos").mkdir()
    Path("some photos", "1.jpg").write_bytes(b"")
    before = tree(tmp_path)
    line, options = COMMAND_LINES[name]
    settings = settings_of(base, Path("a run")) | options
    assert_one_line(call(training.main, *dotted(settings)), line)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("broken.yaml", "broken.yaml: it is no YAML: "),
        ("imagenet", "--config: imagenet is neither a file nor a recipe; the recipes are board_20, board_5, builtin"),
    ],
)
def test_mistaken_recipes(recipe: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("run:\n  epochs: [1\n")
    before = tree(tmp_path)
    assert_one_line(call(training.main, "--config", recipe), line)
    assert tree(tmp_path) == before


# ---- images ----------------------------------------------------------------------------------------------------------


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def no_training_folder(folder: Path) -> None:
    shutil.rmtree(folder / "train")


def no_classes(folder: Path) -> None:
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


def no_images(folder: Path) -> None:
    for path in (folder / "train").rglob("*.jpg"):
        path.rename(path.with_suffix(".txt"))


def no_readable_images(folder: Path) -> None:
    for path in (folder / "val").rglob("*.jpg"):
        path.write_bytes(b"no image")


def class_in_val_alone(folder: Path) -> None:
    (folder / "val" / "red").rename(folder / "val" / "violet")


@pytest.mark.parametrize(
    "spoil",
    [
        no_folder,
        empty_folder,
        no_training_folder,
        no_classes,
        no_images,
        no_readable_images,
        class_in_val_alone,
    ],
)
def test_mistaken_images(spoil: Callable[[Path], None], base: Path, tmp_path: Path, call: Call) -> None:
    """The line names the folder; a run folder is not begun."""
    data = shutil.copytree(images(base), tmp_path / "some images")
    spoil(data)
    before = tree(tmp_path)
    settings = settings_of(base, tmp_path / "a run") | {"data.path": str(data)}
    ended = call(training.main, *dotted(settings))
    assert_one_line(ended, "data.path: ")
    assert str(data) in ended[2]
    assert tree(tmp_path) == before


# ---- a run that is there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"model.name": "resnet34"}, "RUN was started with other options (model.name was resnet18, now resnet34); "),
        ({"run.epochs": "4"}, "RUN was started with other options (run.epochs was 3, now 4); "),
        ({"data.augment.flip": "0"}, "RUN was started with other options (data.augment.flip was 0.5, now 0.0); "),
    ],
)
def test_another_run_in_the_same_folder(options: dict[str, str], line: str, base: Path, call: Call) -> None:
    run = reference(base, 1)
    before = tree(run)
    settings = settings_of(base, run) | options
    assert_one_line(call(training.main, *dotted(settings)), "run.dir: " + line.replace("RUN", str(run)))
    assert tree(run) == before


def test_other_images_in_the_same_folder(base: Path, tmp_path: Path, call: Call) -> None:
    run, data = reference(base, 1), shutil.copytree(images(base), tmp_path / "data")
    next((data / "train" / "red").iterdir()).unlink()
    before = tree(run)
    settings = settings_of(base, run) | {"data.path": str(data)}
    assert_one_line(
        call(training.main, *dotted(settings)),
        f"data.path: {data / 'train'} holds other images or classes than when {run} was started; restore them, or ",
    )
    assert tree(run) == before


@pytest.mark.parametrize("text", ["", "- 1\n", "run: [1\n"])
def test_broken_record_of_the_run(text: str, base: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "config.yaml").write_text(text)
    settings = settings_of(base, tmp_path)
    assert_one_line(call(training.main, *dotted(settings)), f"{tmp_path / 'config.yaml'}: it ")
    assert tree(tmp_path) == {"config.yaml": text.encode()}


def test_a_finished_run_says_so(base: Path, call: Call) -> None:
    """No mistake: one line on stdout, exit code 0, and nothing is written either."""
    run = reference(base, 1)
    before = tree(run)
    settings = settings_of(base, run) | {"run.log_every": "7"}
    code, out, err = call(training.main, *dotted(settings))
    assert (code, err) == (0, "")
    assert out.startswith(f"{run} is finished: best val top-1 ") and out.count("\n") == 1
    assert tree(run) == before


# ---- a disk that is full, or lets nobody write ------------------------------------------------------------------------


@contextmanager
def mounted(place: Path, *how: str) -> Iterator[Path]:
    """A file system at `place`, which it is skipped without."""
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", *how, str(place)], capture_output=True).returncode:
        pytest.skip("it takes root, and leave to mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave 2 MB; a checkpoint that takes room meanwhile makes it try again."""
    with (disk / "filler").open("ab") as filler:
        while (more := shutil.disk_usage(disk).free - 2_000_000) > 0:
            with suppress(OSError):
                os.posix_fallocate(filler.fileno(), filler.seek(0, os.SEEK_END), more)


def wait_until(job: Job, holds: Callable[[], bool]) -> None:
    while not holds():
        assert job.process.poll() is None, job.output()
        time.sleep(0.01)


def test_a_disk_too_small_is_refused(base: Path, tmp_path: Path, call: Call) -> None:
    """A checkpoint of ResNet-18 with momentum and an average of its weights has 134 MB."""
    with mounted(tmp_path / "a disk", "-t", "tmpfs", "-o", "size=500m", "none") as disk:
        run = disk / "a run"
        settings = settings_of(base, run) | {"model.width": "1"}
        line = (
            f"run.dir: 4 checkpoints of 0.134 GB need 0.537 GB beside what is there, and 0.524 GB are free in {run}; "
        )
        assert_one_line(call(training.main, *dotted(settings)), line)
        assert tree(disk) == {}


def test_a_disk_that_is_full_for_a_while(base: Path, tmp_path: Path) -> None:
    """Training goes on without a checkpoint, and writes the next; no weight and no row is lost."""
    with mounted(tmp_path / "a disk", "-t", "tmpfs", "-o", "size=100m", "none") as disk:
        run = disk / "a run"
        job = Job(1, tmp_path / "log", "trainer", *dotted(settings_of(base, run) | {"run.keep": "1"}))
        wait_until(job, lambda: Store(run).progress().step >= 3)
        fill(disk)
        wait_until(job, lambda: "not saved: " in job.output())
        (disk / "filler").unlink()
        assert job.wait() == 0, job.output()
        assert re.search(
            rf"\nnot saved: run\.dir: cannot write step \d+ to {run}/checkpoints \(No space left on device\); make room, and "
            r"the same command goes on from the checkpoint before\n",
            job.output(),
        )
        assert Store(run).progress().finished
        assert checkpoint(run)["training.pt"] == checkpoint(reference(base, 1))["training.pt"]
        assert max(row.get("perf/ckpt_failed", 0) for row in rows(run)) >= 1
        assert {row["step"] for row in rows(run)} == set(range(1, STEPS + 1))


def test_a_disk_that_is_full_at_the_end(base: Path, tmp_path: Path, call: Call) -> None:
    """A run that is asked to stop, and cannot save, says so in its exit code; the same command then mends it.

    While it trains, starts in the same folder are refused and change nothing, whether their options fit or not.
    """
    run = tmp_path / "a run"
    job = train(1, base, run)
    wait_until(job, lambda: Store(run).progress().step >= 3)
    job.process.send_signal(signal.SIGSTOP)
    before = tree(run)
    for options, line in (
        ({"run.log_every": "7"}, f"run.dir: another process trains in {run} right now; "),
        (
            {"optim.lr": "0.7"},
            f"run.dir: {run} was started with other options (optim.lr was {QUICK['optim.lr']}, now 0.7); ",
        ),
    ):
        assert_one_line(call(training.main, *dotted(settings_of(base, run) | options)), line)
    assert tree(run) == before
    job.process.send_signal(signal.SIGCONT)
    with mounted(run / "checkpoints", "--bind", "-o", "ro", str(run / "checkpoints")):
        job.terminate()
        assert job.wait() == 2, job.output()
        last = job.output().splitlines()[-1]
        assert last.startswith("error: run.dir: cannot write step ") and "(Read-only file system); make room" in last
    job = train(1, base, run)
    assert job.wait() == 0, job.output()
    assert f"resuming {run} at step " in job.output()
    assert checkpoint(run) == checkpoint(reference(base, 1))


def test_damaged_checkpoints_of_a_run(base: Path, tmp_path: Path, call: Call) -> None:
    """The newest is passed over in one line, and the end is the same; with none whole, nothing starts."""
    run = tmp_path / "a run"
    job = train(1, base, run, max_steps=9)
    assert job.wait() == 0, job.output()
    newest = (run / "checkpoints/last").resolve()
    with (newest / "training.pt").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\0\1\2")
    broken = shutil.copytree(run, tmp_path / "broken", symlinks=True)
    for folder in (broken / "checkpoints").glob("step-*"):
        os.truncate(folder / "model.safetensors", 1000)
    before = tree(broken)
    ended = call(training.main, *dotted(settings_of(base, broken)))
    assert_one_line(
        ended, f"run.dir: no checkpoint in {broken / 'checkpoints'} is whole ({newest.name}: model.safetensors has "
    )
    assert tree(broken) == before

    job = train(1, base, run)
    assert job.wait() == 0, job.output()
    assert f"passed over {run / 'checkpoints' / newest.name}: training.pt does not match its checksum\n" in job.output()
    assert f"resuming {run} at step 6 of {STEPS}\n" in job.output()
    assert checkpoint(run) == checkpoint(reference(base, 1))


# ---- the evaluation ----------------------------------------------------------------------------------------------------


def test_mistakes_of_the_evaluation(base: Path, tmp_path: Path, call: Call) -> None:
    run = reference(base, 1)
    before = tree(run)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run / "config.yaml", begun)
    for arguments, line in (
        ([], "RUN: no run folder given; call python -m trainer.evaluate RUN [--data.path FOLDER]"),
        (["--data.path", "x"], "RUN: no run folder given; call python -m trainer.evaluate RUN"),
        (
            [str(tmp_path / "no run")],
            f"{tmp_path / 'no run'} is not a run folder: it has no config.yaml; give one such",
        ),
        ([str(tmp_path)], f"{tmp_path} is not a run folder: it has no config.yaml; give one such"),
        ([str(begun)], f"{begun} has no complete checkpoint yet; train it first"),
        ([str(run), "--data.path", str(tmp_path / "no")], f"data.path: {tmp_path / 'no'} is not a folder; "),
        ([str(run), "--model.name", "resnet34"], f"model.name: {run} holds a resnet18, not a resnet34"),
        ([str(run), "--data.pat", "x"], "--data.pat: no such option; did you mean --data.path?"),
    ):
        assert_one_line(call(evaluate.main, *arguments), line)
    assert tree(run) == before


def test_nobody_reads_what_is_printed(base: Path, tmp_path: Path) -> None:
    """`python -m trainer ... <&- | head -1` with names that the encoding lacks: no rank dies of it."""
    data, run = shutil.copytree(images(base), tmp_path / "some images"), tmp_path / "a run"
    for number, path in enumerate(sorted((data / "train").rglob("*.jpg"))[::4]):
        path.with_name(f"猫 {number}.jpg").write_bytes(path.read_bytes()[:-200])
        path.unlink()
    options = settings_of(base, run, epochs=1) | {"data.path": str(data), "data.max_bad_share": "0.9"}
    launcher = [sys.executable, "-m", "launch", "local", "-n", "2", *dotted(options)]
    command = ["bash", "-c", '"$@" 2>&1 <&- | head -1; exit ${PIPESTATUS[0]}', "bash", *launcher]
    variables = {**environment(), "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("\n") == 1
    assert Store(run).progress().finished
    assert max(row.get("data/bad_images", 0) for row in rows(run)) > 8


# ---- as processes -----------------------------------------------------------------------------------------------------


def assert_said_once(job: Job, line: str) -> None:
    """By rank 0 alone, without a traceback of ours; torchrun then adds its own report."""
    assert job.wait() == 1, job.output()
    ours, _, report = job.output().partition("Traceback (most recent call last):")
    assert ours.count("error: ") == 1 and any(told.startswith(f"error: {line}") for told in ours.splitlines())
    assert "exitcode  : 2" in report and "/trainer/" not in report


def test_mistakes_under_torchrun(base: Path, tmp_path: Path) -> None:
    settings = settings_of(base, tmp_path / "a run")
    log = tmp_path / "log"
    assert_said_once(
        Job(2, log, "trainer", *dotted({**settings, "optim.lrr": "1"})), "--optim.lrr: no such option; did you mean "
    )
    assert_said_once(
        Job(2, log, "trainer", *dotted({**settings, "data.batch": "9"})),
        "data.batch: 9 images cannot be shared by 2 ranks x 1 micro-batches; choose a multiple of 2",
    )
    assert tree(tmp_path).keys() == {"log"}
