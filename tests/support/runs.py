"""Training runs for the tests: small images, real processes, and what they leave behind."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from tests.support.warm import Warm
from trainer.checkpoint.manifest import write_stamped
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.run_folder import record_run
from trainer.checkpoint.store import Store
from trainer.config import Config, to_yaml
from trainer.distributed import DistContext

ROOT = Path(__file__).parents[2]
SOLO = DistContext(torch.device("cpu"), rank=0, world=1, cores=1)
TINTS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 1),
    "cyan": (0, 1, 1),
    "green": (0, 1, 0),
    "red": (1, 0, 0),
    "white": (1, 1, 1),
    "yellow": (1, 1, 0),
}
TRAIN, VAL = 57, 23  # images: no multiple of the batch, nor of any number of ranks
BATCH, EPOCHS, STEPS = 12, 3, 15

QUICK = {
    "data.size_px": "40",
    "data.batch": str(BATCH),
    "run.log_every": "1",
    "run.save_every": "3",
    "model.width": "0.25",
    "model.bn_momentum": "0.3",
    "optim.lr": "0.02",
    "optim.ema_decay": "0.9",
    "tracking.wandb": "off",
    "tracking.tensorboard": "false",
    "tracking.histograms_every": "0",
}
"""Five updates an epoch, with a checkpoint within each."""


def render_images(folder: Path, train: int = TRAIN, val: int = VAL) -> Path:
    """`folder` with train/CLASS/ and val/CLASS/: JPEGs of noise, 24 to 40 px a side, tinted after their class."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            name, tint = list(TINTS.items())[number % len(TINTS)]
            height, width = draw.integers(24, 41, 2)
            pixels = draw.integers(0, 160, (height, width, 3)) + 95 * np.array(tint)
            path = folder / split / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


LIGHTS = ("red", "green", "blue")


def render_lights(folder: Path, count: int = 48, form: str = " ") -> Path:
    """`folder` with count images and train.csv, in which each image has those of LIGHTS that are on in it, or none.

    `form` is the character between the classes in its column `lights`, or "columns" for a column of 0 and 1 for each.
    """
    draw = np.random.default_rng(1)
    (folder / "images").mkdir(parents=True)
    columns = form == "columns"
    lines = [",".join(("image", *(LIGHTS if columns else ("lights",))))]
    for number in range(count):
        on = draw.integers(0, 2, 3)
        height, width = draw.integers(24, 41, 2)
        pixels = draw.integers(0, 120, (height, width, 3)) + 135 * on
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"images/{number:03}.jpg")
        names = [name for name, lit in zip(LIGHTS, on, strict=True) if lit]
        lines.append(f"{number:03}.jpg," + (",".join(map(str, on)) if columns else f'"{form.join(names)}"'))
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder / "train.csv"


@cache
def images(base: Path) -> Path:
    """The images that most tests share, below the session's folder `base`."""
    return render_images(base / "some images")


@cache
def reference(base: Path, ranks: int, epochs: int = EPOCHS) -> Path:
    """Folder of a run by `ranks` processes that nothing interrupted."""
    run = base / f"reference {ranks} {epochs}"
    job = train(ranks, base, run, epochs)
    assert job.wait() == 0, job.output()
    return run


def torchvision_network(classes: int) -> nn.Module:
    """torchvision's ResNet-18 of the width of QUICK, with its own names, layers and arithmetic."""
    import torchvision  # type: ignore[import-untyped] # here, for it takes two seconds

    network: nn.Module = torchvision.models.resnet18(num_classes=classes)

    def narrow(size: int) -> slice:
        return slice(None if size in (3, classes) else round(size * float(QUICK["model.width"])))

    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            part = tuple(narrow(size) for size in value.shape[:2])
            setattr(module, name, nn.Parameter(value.detach()[part].clone()))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer[narrow(len(buffer))].clone() if buffer.ndim else buffer)
    return network


class Job:
    """A command under way, on as many processors as it has ranks: one thread a rank, wherever the tests run.

    `cold` has it started as a user starts it, imports included, by torchrun if there are more ranks than one.
    """

    process: "Warm | subprocess.Popen[bytes]"

    def __init__(self, ranks: int, log: Path, module: str, *arguments: str, cold: bool = False) -> None:
        processors = random.sample(sorted(os.sched_getaffinity(0)), min(ranks, len(os.sched_getaffinity(0))))
        self.log = log
        self.start_s = time.time()
        log.write_bytes(b"")
        if not cold:
            self.process = Warm(
                module, *arguments, stdout=log, environment=environment(), ranks=ranks, processors=processors
            )
            return
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master-port={free_port()}"]
        command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", module, *arguments]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                preexec_fn=lambda: os.sched_setaffinity(0, processors),
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Exit code, negative for a signal."""
        try:
            return self.process.wait(300)
        finally:
            self.kill()

    def terminate(self) -> None:
        """SIGTERM for it and all that it started, as SLURM ends a job; torchrun sends its workers another."""
        for pid in (self.process.pid, *descendants(self.process.pid)):
            os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL for it and all that it started; returns once none of them can write any more."""
        family = [self.process.pid, *descendants(self.process.pid)] if self.process.poll() is None else []
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(state_of(pid) not in "ZX" for pid in family):
            time.sleep(0.01)

    def wait_for_step(self, run: Path, step: int) -> None:
        """Until the run has reported `step`, or has ended."""
        while self.process.poll() is None:
            if any(row["step"] >= step and row["time"] > self.start_s for row in rows(run)):
                return
            time.sleep(0.02)


def ranks_of(job: Job, start: int = 0) -> dict[int, int]:
    """Process of each rank that torchrun has started, as a program, for the `start`-th time, from 0."""
    found: dict[int, int] = {}
    for pid in descendants(job.process.pid):
        with suppress(OSError):  # it has ended in the meantime
            lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            variables = dict(line.split("=", 1) for line in lines if "=" in line)
            if variables.get("TORCHELASTIC_RESTART_COUNT") == str(start):
                found.setdefault(int(variables["RANK"]), pid)
    return found


def train(ranks: int, base: Path, run: Path, epochs: int = EPOCHS, max_steps: int | None = None) -> Job:
    """Start or resume the training QUICK of the shared images in the folder `run`."""
    settings = settings_of(base, run, epochs)
    if max_steps:
        settings["run.max_steps"] = str(max_steps)
    return Job(ranks, run.with_name(run.name + ".log"), "trainer", *dotted(settings))


def settings_of(base: Path, run: Path, epochs: int = EPOCHS) -> dict[str, str]:
    """The options of the training QUICK of the shared images in the folder `run`."""
    return {**QUICK, "data.path": str(images(base)), "run.dir": str(run), "run.epochs": str(epochs)}


def unhurried(text: str) -> str:
    """Drop the lines that tell how long a command has taken, which a busy machine causes."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.endswith(" s so far\n"))


def dotted(settings: dict[str, str]) -> list[str]:
    """Arguments of a command line."""
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def environment() -> dict[str, str]:
    """The environment for a command of ours: the source tree's modules, and no launcher's variables."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**ours, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def descendants(pid: int) -> Iterator[int]:
    """All processes below `pid`, those of other sessions included."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield int(child)
            yield from descendants(int(child))


def state_of(pid: int) -> str:
    """The letter that `ps` shows for a process; X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def place_checkpoint(run: Path, cfg: Config, files: dict[str, bytes]) -> Path:
    """Make the run folder of `cfg` with one checkpoint, the best, of these files."""
    record_run(run, to_yaml(cfg))
    store = Store(run)
    store.begin(1)
    stamps = store.put(1, lambda folder: {name: write_stamped(folder / name, data) for name, data in files.items()})
    store.complete(Progress(step=1), stamps, best=True)
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl, without the alerts."""
    return [row for row in _metrics_lines(run) if "alert" not in row]


def alerts(run: Path) -> list[dict[str, Any]]:
    """The alerts in metrics.jsonl."""
    return [row for row in _metrics_lines(run) if "alert" in row]


USUAL = ("always", "one class an image", "6 classes or more")
"""Conditions of that table that the runs of the tests meet."""


def metrics_table() -> dict[str, str]:
    """Every metric that trainer/tracking/README.md defines, and when a run has it."""
    text = (ROOT / "trainer/tracking/README.md").read_text()
    return dict(re.findall(r"^\| `(\w+/\w+)` \| .+ \| ([^|]+) \|$", text, re.MULTILINE))


def _metrics_lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def checkpoint(run: Path) -> dict[str, bytes]:
    """Name and content of the files of the last checkpoint, but for its manifest and the time that training took."""
    files = {file.name: file.read_bytes() for file in sorted((run / "checkpoints/last").iterdir())}
    progress = json.loads(files["progress.json"])
    assert progress.pop("train_s") > 0 and "manifest.json" in files
    del files["manifest.json"]
    return {**files, "progress.json": json.dumps(progress).encode()}


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below `folder`: the content of files, the targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }
