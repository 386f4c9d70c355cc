"""Send a run's metrics to their destinations: the console, `metrics.jsonl`, TensorBoard and Weights & Biases.

`metrics.jsonl` in the run folder is the source of truth and always on. Every destination is a sink behind one small
protocol, and none may stop a training: the first exception of a sink is said in one line, then the sink is dropped.
A disk that is full is none: the rows wait in memory until they can be written (`row_file.py`).
Alarms (`alerts.py`) go to the console and to W&B, which tells people who are not looking.
Names carry units; `README.md` defines each. TensorBoard and W&B are also given the network's graph and, every few epochs,
`weights/PARAMETER` (histograms) and `weight_norm/PARAMETER` (scalars).
"""

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from data_pipeline.common.errors import UserError, printable
from trainer.tracking.alerts import Alarms
from trainer.tracking.config import TrackingConfig, wandb_mode
from trainer.tracking.console import BarConsole, Console
from trainer.tracking.json_lines import JsonLines
from trainer.tracking.sink import Sink

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.tracking.model_summary import Layer


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

    def alert(self, title: str, text: str, facts: Mapping[str, str | float] | None = None) -> None:
        """Write one console line, a line in metrics.jsonl, and a W&B alert, which reaches people by mail or chat.

        `facts` are the figures and names in the text, for programs.
        """
        self.note(f"{title}: {text}")
        self._send(lambda sink: sink.alert(title, text, facts or {}))

    def stopped(self, comes_back: bool) -> None:
        """Mark the run as stopped before its end, or as one of which the machine is taken away and that comes back."""
        self._send(lambda sink: sink.stopped(comes_back))

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
                self._sinks.pop(name, None)  # another thread may have dropped it
                with contextlib.suppress(Exception):
                    sink.close(failed=True)
                self._say_dropped(name, error)

    def _say_dropped(self, name: str, error: Exception) -> None:
        self.note(f"{name} failed and is dropped: {type(error).__name__}: {error}")

    def _tell(self, act: Callable[[Console], None]) -> None:
        try:
            if self._console is not None:
                act(self._console)
        except (OSError, ValueError) as error:
            # A closed pipe, file or terminal: there is nowhere left to say so. A log on a full disk goes on when there is room.
            if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._console = None
