"""Record what a training run reads, finds and leaves behind, and compare it with an undisturbed run.

Each start of a run has a folder "NUMBER RANKS" in "RUN starts": of each rank a line for each batch (R.jsonl; of a validation
batch an empty one) and for each update's loss (R.loss).
"""

import hashlib
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.common.entry_point import run_command
from data_pipeline.loader import Batch, Loader
from tests.support.runs import rows
from trainer import __main__ as trainer
from trainer.engine.ddp import DdpEngine

IMAGES, EPOCHS, STEPS = 250, 4, 44  # of a run
PAIR = 2  # images in a row that a rank takes, as mixup blends them

Update = tuple[int, int]
"""The epoch, and how many images of it have been read after the update."""
Row = tuple[int, str]
"""An image's number, and a hash of its pixels and of its share of each class as the network is given them."""


# ---- writing down ----------------------------------------------------------------------------------------------------


def recorded(folder: Path, batches: Callable[[Loader], Iterator[Batch]]) -> Callable[[Loader], Iterator[Batch]]:
    """`Loader.__iter__`, such that it writes down the batches it hands out, for training with what is in each row."""

    def iterate(self: Loader) -> Iterator[Batch]:
        with (folder / f"{self.rank_info.rank}.jsonl").open("ab", buffering=0) as file:
            for batch in batches(self):
                record = [self.cursor.epoch, self.cursor.seen, batch.num_real, _hashed(batch)] if self.training else []
                file.write(json.dumps(record).encode() + b"\n")
                yield batch

    return iterate


def _hashed(batch: Batch) -> list[Row]:
    assert batch.targets is not None
    pixels, shares = batch.images.permute(0, 2, 3, 1).numpy(), batch.targets.numpy()
    hashes = [hashlib.blake2b(a.tobytes() + b.tobytes(), digest_size=8) for a, b in zip(pixels, shares, strict=True)]
    return [(image, found.hexdigest()) for image, found in zip(batch.ids.tolist(), hashes, strict=True)]


def judged(folder: Path, step: Callable[[DdpEngine, list[Batch], float], Tensor]) -> Callable[..., Tensor]:
    """`DdpEngine.step`, such that it writes down the loss of each update."""

    def stepped(self: DdpEngine, micro_batches: list[Batch], lr: float) -> Tensor:
        sums = step(self, micro_batches, lr)
        with (folder / f"{self.ctx.rank}.loss").open("ab") as file:
            file.write(json.dumps(sums[0].item()).encode() + b"\n")
        return sums

    return stepped


def train_recorded(folder: Path, arguments: list[str]) -> None:
    """Run `python -m trainer` with these arguments on each rank, and record in `folder` what it reads and finds."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # forked, it has the agent's handler
    Loader.__iter__ = recorded(folder, Loader.__iter__)  # type: ignore[method-assign]
    DdpEngine.step = judged(folder, DdpEngine.step)  # type: ignore[method-assign]
    sys.argv = ["trainer", *arguments]
    run_command(trainer.main)


def starts(run: Path) -> list[Path]:
    """The folder of each start of a run, in their order."""
    return sorted(run.with_name(f"{run.name} starts").glob("*"))


def records(file: Path) -> list[Any]:
    """Read a rank's record, without a line that its death cut short."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


# ---- comparing -------------------------------------------------------------------------------------------------------


def read_order(run: Path) -> dict[Update, list[Row]]:
    """The rows of each update in their order over all ranks, by the last start that came to it."""
    order: dict[Update, list[Row]] = {}
    for folder in starts(run):
        updates: dict[Update, dict[int, list[Row]]] = {}
        counted: Counter[Update] = Counter()
        for rank in range(int(folder.name.split()[1])):
            for epoch, seen, num_real, found in filter(None, records(folder / f"{rank}.jsonl")):
                updates.setdefault((epoch, seen), {})[rank] = [(image, pixels) for image, pixels in found]
                counted[epoch, seen] += num_real
        for update, ranks in updates.items():
            shares = [ranks[rank] for rank in sorted(ranks)]
            turns = range(0, len(shares[0]), PAIR)
            order[update] = [row for at in turns for share in shares for row in share[at : at + PAIR]][
                : counted[update]
            ]
    return order


def faults_of_order(run: Path, whole: Path) -> list[str]:
    """In what `run` read, and reported, other than it should and than the run `whole` did."""
    ours, theirs = read_order(run), read_order(whole)
    faults = [f"update {update} differs" for update in ours.keys() | theirs if ours.get(update) != theirs.get(update)]
    for epoch in range(EPOCHS):
        read = Counter(image for (at, _), found in ours.items() if at == epoch for image, _ in found)
        if read != Counter(range(IMAGES)):
            faults.append(f"epoch {epoch}: {read.total()} images read, {len(read)} of {IMAGES}")
    if Counter(row["step"] for row in rows(run) if "train/loss" in row) != Counter(range(1, STEPS + 1)):
        faults.append("metrics.jsonl has not each step once")
    return faults


def read_losses(folder: Path) -> dict[tuple[int, int, int], float]:
    """Loss of each update of a start, by epoch, images read and rank."""
    losses = {}
    for rank in range(int(folder.name.split()[1])):
        updates = filter(None, records(folder / f"{rank}.jsonl"))
        # A rank may die between the two, of the last one.
        for (epoch, seen, *_), loss in zip(updates, records(folder / f"{rank}.loss"), strict=False):
            losses[epoch, seen, rank] = loss
    return losses


def faults_of_losses(run: Path, whole: Path) -> list[str]:
    """The first update of each start, be it lost later, that had another loss than in the run `whole`: its weights differed."""
    theirs, faults = read_losses(starts(whole)[0]), []
    for folder in starts(run):
        ours = read_losses(folder)
        wrong = next((at for at in sorted(ours) if ours[at] != theirs[at]), None)
        if wrong:
            faults.append(f"start {folder.name}: (epoch, images, rank) {wrong} lost {ours[wrong]}, not {theirs[wrong]}")
    return faults


def faults_of_weights(run: Path, whole: Path) -> list[str]:
    """The files of the last checkpoint that have other bytes than those of the run `whole`."""
    ours, theirs = (folder / "checkpoints/last" for folder in (run, whole))
    names = ("model.safetensors", "training.pt")
    return [f"{name} differs" for name in names if (ours / name).read_bytes() != (theirs / name).read_bytes()]
