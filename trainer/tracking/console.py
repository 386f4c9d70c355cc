"""Output of a run: plain lines for a file or a pipe, a progress bar on a terminal."""

import contextlib
import math
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

from data_pipeline.common.worker_pool import SILENT_S


class Console:
    """Output for a file or a pipe: plain lines on stdout, never wrapped, no ANSI codes."""

    def __init__(self, total_steps: int, epochs: int, resume_step: int) -> None:
        self._total_steps, self._epochs = total_steps, epochs
        self._start_step, self._start_s = resume_step, time.monotonic()
        self._last_s, self._spoke_s = -math.inf, self._start_s
        self._closed = threading.Event()

    def open(self) -> None:
        self._spoke_s = time.monotonic()
        threading.Thread(target=self._break_silence, daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def line(self, text: str) -> None:
        self._spoke_s = time.monotonic()
        print(text, flush=True)

    def _break_silence(self) -> None:
        """Print the progress whenever nothing was printed for SILENT_S: a compilation, a long step or validation."""
        from trainer.resilience.watchdog import position

        with contextlib.suppress(OSError, ValueError):  # a closed pipe or file
            while not self._closed.wait(max(self._spoke_s + SILENT_S - time.monotonic(), 0.1)):
                if time.monotonic() - self._spoke_s >= SILENT_S:
                    here = position()
                    self.line(f"step {here.step}/{self._total_steps}  still busy: {here.phase}")

    def progress(self, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        figures, now = _figures(scalars, _PROGRESS), time.monotonic()
        if not figures or now - self._last_s < SILENT_S:
            return
        self._last_s = now
        left_s = (self._total_steps - step) * (now - self._start_s) / max(step - self._start_step, 1)
        at = f"step {step:{len(str(self._total_steps))}}/{self._total_steps}  epoch {epoch:6.2f}/{self._epochs}"
        self.line(f"{at}{figures}  eta {timedelta(seconds=round(left_s))}")

    def epoch(self, scalars: Mapping[str, float], epoch: int, best: bool) -> None:
        at = f"epoch {epoch:{len(str(self._epochs))}}/{self._epochs}"
        self.line(at + _figures(scalars, _EPOCH) + "  best so far" * best)


class BarConsole(Console):
    """Output on a terminal: the same lines, above a progress bar instead of progress lines."""

    def __init__(self, total_steps: int, epochs: int, resume_step: int) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        super().__init__(total_steps, epochs, resume_step)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        # Speed over minutes: an estimate over rich's half minute jumps at every evaluation.
        self._bar = Progress(*columns, expand=True, transient=True, refresh_per_second=2, speed_estimate_period=300)
        self._task = self._bar.add_task("starting", total=total_steps, completed=resume_step, figures="")

    def open(self) -> None:
        self._bar.start()

    def close(self) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def progress(self, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        if figures := _figures(scalars, _PROGRESS).strip():
            description = f"epoch {min(int(epoch) + 1, self._epochs)}/{self._epochs}"
            self._bar.update(self._task, completed=step, description=description, figures=figures)


_PROGRESS = (
    ("train/loss", "  loss {:6.3f}"),
    ("perf/images_per_s", "  {:5.0f} img/s"),
    ("perf/data_wait_pct", "  data wait {:4.1f} %"),
)
_EPOCH = (
    ("train/loss", "  train {:6.3f} loss"),
    ("train/top1_pct", " {:5.1f} % top-1"),
    ("val/loss", "  val {:6.3f} loss"),
    ("val/top1_pct", " {:5.1f} % top-1"),
    ("val/top5_pct", " {:5.1f} % top-5"),
    ("val/map_pct", " {:5.1f} % mAP"),
    ("val/macro_f1_pct", " {:5.1f} % macro F1"),
    ("val/macro_recall_pct", " {:5.1f} % macro recall"),
    *_PROGRESS[1:],
)


def _figures(scalars: Mapping[str, float], layout: tuple[tuple[str, str], ...]) -> str:
    """Format the existing scalars, each in its place of the layout."""
    return "".join(template.format(scalars[name]) for name, template in layout if name in scalars)
