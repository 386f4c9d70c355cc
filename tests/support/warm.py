"""Processes that start at once: forked from one that has imported, seconds ago, what every start of a training imports.

Each is a process of its own, with its number, files, signals and exit code, that runs a module as `python -m` does; but for
`/proc/PID/environ`, which is that of the one it was forked from. Ranks are forked by torchrun's agent, as they are from
a function that is given to `elastic_launch`.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TextIO

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "trainer.loop",
    "trainer.resilience.signals",
    "launch.workers",
    "torch.distributed.launcher.api",
    "data_pipeline.dali.cpu_resize",
    "torch._dynamo",  # which DDP imports
    "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook",
    "tests.conftest",
    "tests.support.runs",
]


class Warm:
    """A module under way on so many `ranks`; for what of `subprocess.Popen` the tests use."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        stdout: Path,
        stderr: Path | None = None,
        environment: dict[str, str],
        ranks: int = 1,
        processors: list[int] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """`stderr` is `stdout`, if not given."""
        target = (_as_module, (module, arguments)) if ranks == 1 else (_by_torchrun, (ranks, module, arguments))
        umask = os.umask(0)
        os.umask(umask)
        place = (environment, processors or sorted(os.sched_getaffinity(0)), str(cwd or Path.cwd()), umask)
        self._process: ForkServerProcess = _CONTEXT.Process(
            target=_run, args=(*target, str(stdout), str(stderr or ""), *place), daemon=True
        )
        _prepare_server()
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, negative for a signal."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._process.exitcode


def run(
    module: str, *arguments: str, environment: dict[str, str], cwd: Path | None = None, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """`python -m module arguments` to its end, as `subprocess.run` does it with what it says in two texts.

    Lines that tell how long it has taken, which a busy machine causes, are left out of stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = Warm(module, *arguments, stdout=stdout, stderr=stderr, environment=environment, cwd=cwd)
        try:
            code = process.wait(timeout)
        finally:
            process.send_signal(signal.SIGKILL)
        errors = [line for line in stderr.read_text().splitlines(keepends=True) if not line.endswith(" s so far\n")]
        return subprocess.CompletedProcess([module, *arguments], code, stdout.read_text(), "".join(errors))


def start_ranks(act: Callable[..., None], arguments: tuple[object, ...], ranks: int) -> None:
    """`act(rank, *arguments)` in a process for each of the ranks, until all have ended; raises what one of them raises."""
    _prepare_server()
    torch.multiprocessing.start_processes(act, arguments, nprocs=ranks, start_method="forkserver")


def _prepare_server() -> None:
    """Let the one server that a process has be ours, and not, say, the data loaders' benchmark's."""
    server = forkserver._forkserver
    if server._preload_modules != _IMPORTED:  # type: ignore[attr-defined]
        server._stop()  # type: ignore[attr-defined]
        server.set_forkserver_preload(_IMPORTED)


def _run(
    target: object,
    given: tuple[object, ...],
    stdout: str,
    stderr: str,
    environment: dict[str, str],
    processors: list[int],
    cwd: str,
    umask: int,
) -> None:
    """Run the forked process."""
    multiprocessing.current_process().daemon = False  # it may have children of its own
    os.environ.clear()
    os.environ.update(environment)
    os.sched_setaffinity(0, processors)
    os.chdir(cwd)
    os.umask(umask)
    sys.stdout, sys.stderr = _redirected(1, stdout), _redirected(2, stderr or stdout)
    try:
        target(*given)  # type: ignore[operator]
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def _redirected(number: int, path: str) -> TextIO:
    """The open file `number` as one that is written to `path`."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, number)
    os.close(file)
    return os.fdopen(number, "w", closefd=False, buffering=1 if number == 2 else -1)


def _as_module(module: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _by_torchrun(ranks: int, module: str, arguments: tuple[str, ...]) -> None:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import elastic_launch

    from tests.support.elastic import this_machine

    config = this_machine(ranks)
    config.start_method = "fork"
    with tempfile.TemporaryDirectory() as notes:
        config.logs_specs = DefaultLogsSpecs(log_dir=notes)
        elastic_launch(config, _as_rank)(module, arguments)


def _as_rank(module: str, arguments: tuple[str, ...]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # forked, it has the agent's handlers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _as_module(module, arguments)
    finally:
        atexit._run_exitfuncs()
