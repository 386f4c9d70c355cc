"""Send a run's metrics to their destinations: the console, `metrics.jsonl`, TensorBoard and Weights & Biases.

`metrics.jsonl` in the run folder is the source of truth and always on. Every destination is a sink behind one small
protocol, and none may stop a training: the first exception of a sink is said in one line, then the sink is dropped.
A disk that is full is none: the rows wait in memory until they can be written (`row_file.py`).
Alarms (`alerts.py`) go to the console and to W&B, which tells people who are not looking.
Names carry units: `train/{loss,top1_pct,lr,grad_norm}`, `val/{loss,top1_pct,top5_pct,best_top1_pct}`,
`perf/{images_per_s,step_ms_p50,step_ms_p95,data_wait_pct,epoch_s,ckpt_save_s}`. TensorBoard and W&B are also given the network's
graph and, every few epochs, `weights/PARAMETER` (histograms) and `weight_norm/PARAMETER` (scalars).
"""

import contextlib
import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, printable
from data_pipeline.common.worker_pool import SILENT_S
from trainer.tracking.alerts import Alarms
from trainer.tracking.row_file import RowFile

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.tracking.model_summary import Distribution, Layer


@dataclass(frozen=True)
class TrackingConfig:
    """Destinations of a run's metrics besides the console and `metrics.jsonl`."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases. `auto` obeys WANDB_MODE and WANDB_DISABLED where they are set; otherwise it is online where an API
    key is configured, and offline, to be uploaded later, where none is."""
    project: str = "sluice"
    """W&B project."""
    entity: str | None = None
    """W&B team or user that owns the project; null means the account's default."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder's `tensorboard`."""
    histograms_every: int = 1
    """Epochs between two histograms of each layer's weights, with their norms, in TensorBoard and W&B; 0 for none."""

    def __post_init__(self) -> None:
        if not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise UserError(
                f"tracking.project: {self.project!r} is no W&B project name; give 1 to 128 characters, none of /\\#?%:"
            )
        if self.histograms_every < 0:
            raise UserError(
                f"tracking.histograms_every: {self.histograms_every} is negative; give a number of epochs, or 0 for none"
            )


class Sink(Protocol):
    """One destination of rows. Any method may raise: the tracker then drops the sink."""

    def write(self, scalars: Mapping[str, float], step: int, epoch: float) -> None: ...

    def alert(self, title: str, text: str) -> None:
        """Tell people who are not looking, where the destination can."""
        return

    def weights(self, found: Mapping[str, "Distribution"], step: int, epoch: float) -> None:
        """Show the distribution of each parameter's values, where the destination can."""
        return

    def graph(self, layers: list["Layer"]) -> None:
        """Show the network that is trained, where the destination can."""
        return

    def close(self, failed: bool) -> None:
        """Flush and let go; `failed` when an exception ends the training."""


class Tracker:
    """Gives every row of scalars to every sink, and closes them as a context manager.

    On a rank that is not `primary` there are no sinks and every call is a no-op. `total_steps` and `epochs` scale the
    progress bar. Rows after `resume_step`, left by a run that was stopped past its last checkpoint, are removed; with
    0 every row is.

    Raises:
        UserError: W&B is to be online without a usable API key, or WANDB_MODE has an unknown value.
    """

    def __init__(
        self,
        cfg: TrackingConfig,
        folder: Path,
        *,
        name: str,
        run_config: dict[str, Any],
        total_steps: int,
        epochs: int,
        resume_step: int,
        primary: bool,
    ) -> None:
        self._cfg, self._folder, self._name, self._run_config = cfg, folder, name, run_config
        self._total_steps, self._epochs, self._primary = total_steps, epochs, primary
        self._stop = threading.Event()
        self._sinks: dict[str, Sink] = {}
        self._console: Console | None = None
        self._open_all(resume_step)

    def reopen(self, resume_step: int) -> None:
        """Go on as a run resumed at this step does: without later rows. Raises `UserError`."""
        self.close()
        self._open_all(resume_step)
        self._tell(lambda console: console.open())

    def _open_all(self, resume_step: int) -> None:
        # Rank 0 alone has destinations.
        self._alarms = Alarms()
        if not self._primary:
            return
        cfg, folder = self._cfg, self._folder
        on_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._console = (BarConsole if on_terminal else Console)(self._total_steps, self._epochs, resume_step)

        def open_wandb(mode: str) -> Sink:
            from trainer.tracking.wandb_sink import WandbSink  # here, for its import takes up to two seconds

            return WandbSink(
                mode, cfg.project, cfg.entity, folder, self._name, self._run_config, self.note, self._stop.set
            )

        def open_tensorboard(folder: Path, resume_step: int) -> Sink:
            from trainer.tracking.tensorboard_sink import TensorBoard

            return TensorBoard(folder, resume_step, self.note)

        # W&B first: it alone may refuse to start, and the others alter what an earlier attempt left in the folder.
        mode = wandb_mode(os.environ) if cfg.wandb == "auto" else cfg.wandb
        if mode != "off":
            self._open("wandb", lambda: open_wandb(mode))
        self._open("metrics.jsonl", lambda: JsonLines(folder / "metrics.jsonl", resume_step, self.note))
        if cfg.tensorboard:
            self._open("tensorboard", lambda: open_tensorboard(folder / "tensorboard", resume_step))

    @property
    def stop_requested(self) -> bool:
        """True where somebody pressed Stop on the run's W&B page; only the primary rank knows."""
        return self._stop.is_set()

    def log(self, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        """Write one row at a logging interval; `epoch` 2.5 is the middle of the third epoch.

        Moves the progress on the console if the row has any of its figures: loss, images/s or data wait.
        """
        self._tell(lambda console: console.progress(scalars, step, epoch))
        self._write(scalars, step, epoch)
        for title, text in self._alarms.row(scalars, step):
            self.alert(title, text)

    def epoch(self, scalars: Mapping[str, float], step: int, epoch: int, best: bool) -> None:
        """Write one row and one console line at the end of an epoch, counted from 1; `best`: none before was better."""
        self._tell(lambda console: console.epoch(scalars, epoch, best))
        self._write(scalars, step, epoch)
        self._alarms.new_epoch()

    def weights(self, parameters: Iterable[tuple[str, "Tensor"]], step: int, epoch: int) -> None:
        """Show histogram and norm of each parameter, if they are due at the end of `epoch`, from 1, and shown anywhere."""
        if self._pictures and self._cfg.histograms_every and epoch % self._cfg.histograms_every == 0:
            from trainer.tracking.model_summary import distributions

            found = distributions(parameters)
            self._send(lambda sink: sink.weights(found, step, epoch))

    def graph(self, layers: Callable[[], list["Layer"]]) -> None:
        """Show the network that is trained; `layers` is called only if it is shown anywhere."""
        if self._pictures:
            try:
                found = layers()
            except Exception as error:
                self.note(f"the graph of the network is left out: {type(error).__name__}: {error}")
                return
            self._send(lambda sink: sink.graph(found))

    @property
    def _pictures(self) -> bool:
        """True where any destination shows more than scalars."""
        return not {*self._sinks} <= {"metrics.jsonl"}

    def alert(self, title: str, text: str) -> None:
        """Write one console line, and a W&B alert, which reaches people by mail or chat."""
        self.note(f"{title}: {text}")
        self._send(lambda sink: sink.alert(title, text))

    def note(self, text: str) -> None:
        """Write one console line, information or a warning, without breaking the progress bar."""
        encoding = sys.stdout.encoding or "utf-8"  # a file name in the text may hold what it cannot say
        line = printable(" ".join(text.split())).encode(encoding, "backslashreplace").decode(encoding)
        self._tell(lambda console: console.line(line))

    def close(self, failed: bool = False) -> None:
        """Close every sink; `failed` marks the W&B run as failed. More calls do nothing."""
        for name, sink in self._sinks.items():
            try:
                sink.close(failed)
            except Exception as error:
                self._say_dropped(name, error)
        self._sinks = {}
        self._tell(lambda console: console.close())
        self._console = None

    def __enter__(self) -> Self:
        self._tell(lambda console: console.open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _open(self, name: str, sink: Callable[[], Sink]) -> None:
        try:
            self._sinks[name] = sink()
        except UserError:
            raise
        except Exception as error:
            self._say_dropped(name, error)

    def _write(self, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        row = {name: float(value) for name, value in scalars.items()}
        self._send(lambda sink: sink.write(row, step, epoch))

    def _send(self, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                act(sink)
            except Exception as error:
                del self._sinks[name]
                with contextlib.suppress(Exception):
                    sink.close(failed=True)
                self._say_dropped(name, error)

    def _say_dropped(self, name: str, error: Exception) -> None:
        self.note(f"{name} failed and is dropped: {type(error).__name__}: {error}")

    def _tell(self, act: Callable[["Console"], None]) -> None:
        try:
            if self._console is not None:
                act(self._console)
        except (OSError, ValueError) as error:
            # A closed pipe, file or terminal: there is nowhere left to say so. A log on a full disk goes on when there is room.
            if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._console = None


def wandb_mode(environment: Mapping[str, str]) -> str:
    """Read the mode of W&B from the environment, with the words of older versions: online, offline, off or auto.

    Raises `UserError` for an unknown WANDB_MODE.
    """
    if environment.get("WANDB_DISABLED", "").lower() not in ("", "0", "false", "no", "off"):
        return "off"
    word = environment.get("WANDB_MODE", "").strip().lower()
    modes = {"": "auto", "run": "online", "dryrun": "offline", "disabled": "off", "dry-run": "offline"}
    mode = modes.get(word, word)
    if mode not in ("auto", "online", "offline", "off"):
        raise UserError(f"WANDB_MODE: {word!r} is unknown; set online, offline or disabled, or unset it")
    return mode


class JsonLines(Sink):
    """`metrics.jsonl`: a row a line, flushed at once: `{"step": int, "epoch": float, "time": Unix seconds, ...}`.

    JSON has no NaN and no infinity: both become `null`, which pandas reads as NaN.
    """

    def __init__(self, path: Path, resume_step: int, tell: Callable[[str], None]) -> None:
        self._file = RowFile(path.name, lambda: _open_rows(path, resume_step), tell)

    def write(self, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        row = {"step": step, "epoch": epoch, "time": time.time(), **finite}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self, failed: bool) -> None:
        self._file.close()


def _open_rows(path: Path, resume_step: int) -> int:
    """Open the file of rows up to `resume_step`, to append to. Raises OSError."""
    if resume_step and path.exists():
        # A kill may tear the last line: a line that is no whole row is dropped too.
        kept = [line for line in path.read_text(errors="replace").splitlines() if 0 <= _step(line) <= resume_step]
        replace_file(path, "".join(line + "\n" for line in kept).encode())
    return os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if resume_step else os.O_TRUNC), 0o666)


def _step(line: str) -> int:
    """Read the step of a row of `metrics.jsonl`; -1 where the line is no whole row."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


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
    *_PROGRESS[1:],
)


def _figures(scalars: Mapping[str, float], layout: tuple[tuple[str, str], ...]) -> str:
    """Format the existing scalars, each in its place of the layout."""
    return "".join(template.format(scalars[name]) for name, template in layout if name in scalars)
