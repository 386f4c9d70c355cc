"""Position of a run, as a checkpoint holds it."""

import json
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipeline.cursor import Cursor

PROGRESS = "progress.json"
_MOST_BYTES = 16 << 20  # of a manifest or a progress.json: a run of 1,000 ranks has less than a hundredth of it


@dataclass(frozen=True)
class Arithmetic:
    """Rounding of sums, besides a run's options: where it is the same, the same steps give the same bits."""

    precision: str
    """Precision of forward and backward pass: fp32, bf16 or fp16."""
    threads: list[int]
    """Threads that compute on each rank's CPU; 0 where a GPU computes, as they then decide nothing."""
    processor: str

    def differences(self, other: "Arithmetic") -> str:
        """List the differences, as "precision was fp32, now bf16"; empty where there are none."""
        if len(self.threads) != len(other.threads):
            return f"it had {len(self.threads)} processes, now {len(other.threads)}"
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in ("precision", "processor", "threads"))
        return ", ".join(f"{name} was {_short(was)}, now {_short(now)}" for name, was, now in pairs if was != now)


def _short(value: str | list[int]) -> str:
    return value if isinstance(value, str) else " and ".join(map(str, sorted(set(value))))


BestBy = Literal["top1", "macro_recall", "map", "macro_f1", "loss"]


@dataclass(frozen=True)
class Progress:
    """Position of a run, and all that it needs beside weights and optimiser to continue exactly."""

    step: int = 0
    """Optimizer steps so far."""
    cursor: Cursor = field(default_factory=Cursor)
    sums: list[float] = field(default_factory=list)
    """Sums of the epoch so far, over all ranks (see `engine.base.StepSums`)."""
    train_s: float = 0.0
    """Seconds of training so far, without evaluation, checkpoints and what an interruption lost."""
    best_top1_pct: float = -1.0
    """Validation top-1 of the best weights; below 0 before there are any."""
    best_map_pct: float | None = None
    """The same of mAP, for images of several classes, where there is no top-1."""
    best_by: BestBy = "top1"
    """Score that chooses the best weights (see `run.best_by`)."""
    best_score: float | None = None
    """That score of theirs; None before there are any, and in runs from before it was recorded, which chose by top-1."""
    since_best: int = 0
    """Validations since that of the best weights."""
    validated_step: int = 0
    """Step of the last validation that was due."""
    averaged: int = 0
    """Epochs in the average of `optim.swa`; 0 before there are any, and in checkpoints from before they were recorded."""
    finished: bool = False
    skipped: list[int] = field(default_factory=list)
    """Steps, counted from 1, whose images are passed over without changing the weights (see `run.on_nonfinite`)."""
    arithmetic: Arithmetic | None = None
    """Arithmetic of the last steps; None in runs from before it was recorded."""

    def over(self, epochs: int, patience: int | None) -> bool:
        """Return True where a run of so many epochs has trained them all, or has run out of `run.patience` before."""
        return self.cursor.epoch >= epochs or (patience is not None and self.since_best >= patience)

    @property
    def to_beat(self) -> float | None:
        """Score by `best_by` that weights must beat to be the best; None where there are none yet."""
        return self.best_top1_pct if self.best_score is None and self.best_top1_pct >= 0 else self.best_score

    @property
    def best(self) -> str:
        """The best weights' scores for people."""
        usual = "top-1" if self.best_map_pct is None else "mAP"
        score = self.best_top1_pct if self.best_map_pct is None else self.best_map_pct
        if self.best_score is None or self.best_by in ("top1", "map"):
            return f"val {usual} {score:.2f} %"
        names = {"macro_recall": "macro recall", "macro_f1": "macro F1"}
        named = (
            f"{names[self.best_by]} {self.best_score:.2f} %" if self.best_by in names else f"loss {self.best_score:.4f}"
        )
        return f"val {named}, val {usual} {score:.2f} %"


def read_progress(checkpoint: Path) -> Progress:
    """Read the progress of a whole checkpoint."""
    state = read_json(checkpoint / PROGRESS)
    kept = state.get("arithmetic")
    return Progress(
        **{**state, "cursor": Cursor(**state["cursor"]), "arithmetic": Arithmetic(**kept) if kept else None}
    )


def read_json(file: Path) -> Any:
    """Read a small file of a checkpoint. Raises OSError, and ValueError for anything but JSON that we may have written."""
    found = file.stat()  # once: it may be removed at any time, which does not make it a damaged one
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
        raise ValueError(f"{file} is none of ours")
    try:
        return json.loads(file.read_text())
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None
