"""Profile of chosen optimizer steps, as a Chrome trace: for Perfetto (ui.perfetto.dev), TensorBoard or chrome://tracing.

Ranges with names of ours (`torch.profiler.record_function`) stand in it beside the operators: "step N" around each step,
and within it data, forward, backward and update.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.profiler import ProfilerActivity, profile, record_function

from data_pipeline.common.errors import printable
from trainer.distributed import DistContext

# Otherwise the profiler's library reports each start, and a missing GPU, on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Trace:
    """Writes `rankR-FIRST-LAST.pt.trace.json.gz` into `folder`, holding only the chosen steps.

        with Trace(cfg.run.profiled, cfg.folder / "profile", ctx, done=progress.step) as trace:
            for ...:
                ...  # an optimizer step, from fetching its data on
                trace.step(number)

    `steps` are counted from 1, and none of them profile nothing; `done` is the number of steps made before. If the
    file exists, as after a resume, nothing is profiled again. A run that ends earlier, or is resumed between
    the chosen steps, leaves a file of those that it made. A disk that does not take the file ends no training.
    """

    def __init__(self, steps: range, folder: Path, ctx: DistContext, done: int = 0) -> None:
        self._steps = steps
        self._folder, self._machine, self._done = folder, ctx, done
        self._profile: profile | None = None
        if self._steps and self._path(self._steps).exists():
            self._steps = range(0)

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def step(self, done: int) -> None:
        """Record that step number `done`, counted from 1, is complete."""
        if self._profile:
            self._range.__exit__(None, None, None)
        self._done = done
        if done + 1 in self._steps:
            self._begin()
        else:
            self._end()

    def _begin(self) -> None:
        """Begin with the next step, if it is chosen."""
        following = self._done + 1
        if following not in self._steps:
            return
        if not self._profile:
            gpu = [ProfilerActivity.CUDA] if self._machine.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._profile.start()
            self._first = following
        self._range = record_function(f"step {following}")
        self._range.__enter__()

    def _end(self) -> None:
        """Write the recorded steps, if there are any."""
        recorded, self._profile = self._profile, None
        if not recorded:
            return
        recorded.stop()
        self._steps = range(0)
        if self._done < self._first:
            return
        path = self._path(range(self._first, self._done + 1))
        beside = path.with_name(f".partial-{path.name}")  # it must have the same suffix to be compressed
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(beside))
            os.replace(beside, path)
        except OSError as error:
            line = f"no profile is written: {self._folder}: {error.strerror}"
            print(printable(line), file=sys.stderr, flush=True)
            with suppress(OSError):
                beside.unlink()

    def _path(self, steps: range) -> Path:
        named = f"{steps[0]}-{steps[-1]}" if len(steps) > 1 else f"{steps[0]}"
        return self._folder / f"rank{self._machine.rank}-{named}.pt.trace.json.gz"
