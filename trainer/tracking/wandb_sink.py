"""Weights & Biases sink: online where there are a key and a server, else offline in the run folder.

wandb itself prints nothing (its messages go to its debug log); what a person must know is one line of ours.
"""

import contextlib
import math
import os
import re
import secrets
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import wandb
from wandb.sdk.lib.module import unset_globals

from data_pipeline.common.errors import UserError
from trainer.checkpoint.files import WEIGHTS
from trainer.checkpoint.run_folder import read_wandb_id, record_wandb_id
from trainer.checkpoint.store import Store
from trainer.tracking.model_summary import Distribution, Layer
from trainer.tracking.wandb_process import started_apart

INIT_TIMEOUT_S = 30.0
"""Longest wait for the server before the run is kept offline; wandb's own default is 90 s."""
FINISH_TIMEOUT_S = 60.0
"""Longest wait for the last uploads; wandb's own default is to retry for days."""
CHOSEN = "offline mode"
"""Reason of a run that was meant to be offline."""
_REMEDY = "run `wandb login`, set WANDB_API_KEY, or give --tracking.wandb offline"


class WandbSink:
    """One W&B run for one run folder, whose `wandb_id.txt` keeps its id for every later attempt.

    A first attempt takes the id from WANDB_RUN_ID, if it is set; in a W&B sweep every attempt does.

    Its configuration is `run_config` and `world_size`, the number of processes. The best weights of a run that has
    trained all its epochs become the artifact `model-ID`.

    `mode` is auto, online or offline. `note` takes lines for the console. `on_stop` is called on another thread when
    somebody presses Stop on the run's page, where wandb's own answer is a KeyboardInterrupt in the middle of a step.

    Raises:
        UserError: `mode` is online and the API key is missing, malformed or refused by the server.
    """

    def __init__(
        self,
        mode: str,
        project: str,
        entity: str | None,
        folder: Path,
        name: str,
        run_config: dict[str, Any],
        note: Callable[[str], None],
        on_stop: Callable[[], None],
    ) -> None:
        # One run on the server for a run folder: a resumed run continues the same curves.
        settings = wandb.Settings(
            project=project,
            entity=entity,
            # Kept for later attempts; one of a sweep has its agent's.
            run_id=read_wandb_id(folder) or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
            run_name=name,
            resume="allow",
            silent=True,
            console="off",  # a progress bar redrawn twice a second makes no readable log page
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            stop_fn=lambda: on_stop(),  # a bound method does not survive the deep copy of settings
        )
        run_config = run_config | {"world_size": int(os.environ.get("WORLD_SIZE", 1))}
        try:
            with started_apart():
                self._run, why_offline = _start(mode, settings, folder, run_config)
            record_wandb_id(folder, self._run.id)
        except BaseException:
            _teardown()
            raise
        # Steps redone after a resume must not be dropped, so no row says `step=`: the axis is a metric like others.
        self._run.define_metric("*", step_metric="train/step")
        self._note, self._offline, self._folder = note, bool(why_offline), folder
        self._preempted = False
        if self._run.summary.get("stopped"):
            self._run.summary["stopped"] = False  # it goes on
        # Every attempt keeps a folder of its own; `wandb sync` skips those that are uploaded already.
        kept, attempts = shlex.quote(str(Path(self._run.settings.sync_dir).resolve().parent)), f"run-*-{self._run.id}*"
        if self._offline:
            self._sync = f"wandb sync {kept}/offline-{attempts}"
            because = "" if why_offline == CHOSEN else f"{why_offline}, so "
            note(f"wandb: {because}the run stays offline; to upload it: {self._sync}")
        else:
            self._sync = f"wandb sync --include-online {kept}/{attempts}"
            note(f"wandb: {self._run.url}")

    def write(self, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        self._run.log({**scalars, "epoch": epoch, "train/step": step})

    def weights(self, found: Mapping[str, Distribution], step: int, epoch: float) -> None:
        norms = {f"weight_norm/{name}": own.norm for name, own in found.items()}
        histograms = {
            f"weights/{name}": wandb.Histogram(np_histogram=(np.array(own.counts), np.array(own.edges)))
            for name, own in found.items()
        }
        self._run.log({**norms, **histograms, "epoch": epoch, "train/step": step})

    def graph(self, layers: list[Layer]) -> None:
        # Not by `watch`, whose hooks run in every step.
        graph = wandb.Graph("torch")
        for layer in layers:
            parameters = [[name, sizes] for name, sizes in layer.parameters.items()]
            counts = [math.prod(sizes) for sizes in layer.parameters.values()]
            graph.add_node(
                id=layer.name,
                name=layer.name,
                class_name=layer.kind,
                output_shape=layer.shape,
                parameters=parameters,
                num_parameters=counts,
            )
            for source in layer.inputs:
                graph.add_edge(graph[source], graph[layer.name])
        self._run.summary["graph"] = graph

    def alert(self, title: str, text: str, facts: Mapping[str, str | float]) -> None:
        self._run.alert(title, text, level="WARN")

    def stopped(self, comes_back: bool) -> None:
        # W&B hands a run that is marked as preempting, and ends with an error, to the next agent of its sweep.
        self._preempted = comes_back
        if comes_back:
            self._run.mark_preempting()
        else:
            self._run.summary["stopped"] = True

    def close(self, failed: bool) -> None:
        try:
            if not failed:
                self._log_best()
        finally:
            self._finish(failed or self._preempted)

    def _finish(self, failed: bool) -> None:
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            raise TimeoutError(f"uploads did not end in {FINISH_TIMEOUT_S:.0f} s; for the rest: {self._sync}") from None
        finally:
            _teardown()
        if self._offline:
            self._note(f"wandb: the run is offline; to upload it: {self._sync}")

    def _log_best(self) -> None:
        store = Store(self._folder)
        best = store.chosen()
        if best and store.progress().finished:
            progress = store.progress()
            score = {"best_top1_pct": progress.best_top1_pct}
            if progress.best_map_pct is not None:
                score = {"best_map_pct": progress.best_map_pct}
            artifact = wandb.Artifact(f"model-{self._run.id}", type="model", metadata=score)
            artifact.add_file(str(best / WEIGHTS), policy="immutable")  # uploaded from its place, without a copy
            self._run.log_artifact(artifact, aliases=["best"])


def _start(mode: str, settings: wandb.Settings, folder: Path, config: dict[str, Any]) -> tuple[wandb.Run, str]:
    """Start the run. Returns it, and the reason why it is offline ("" when it is online)."""
    why = _why_offline(mode)
    if not why:
        try:
            return _init("online", settings, folder, config), ""
        except wandb.Error as error:
            why = " ".join(str(error).split())
            if mode == "online" and re.search(r"error 40[13]\b", why):
                raise UserError(f"tracking.wandb: the server refused the API key ({why}); {_REMEDY}") from None
            _teardown()  # the failed attempt would answer for the next one
    return _init("offline", settings, folder, config), why


def _init(
    mode: Literal["online", "offline"], settings: wandb.Settings, folder: Path, config: dict[str, Any]
) -> wandb.Run:
    wandb.setup(wandb.Settings(silent=True))  # a run's own `silent` does not cover what wandb prints at its end
    return wandb.init(mode=mode, dir=_place(folder), config=config, settings=settings)


def _place(folder: Path) -> str:
    """Folder of wandb's own: the run's, or where WANDB_DIR says, which an agent without one sets to its working folder."""
    given = os.environ.get("WANDB_DIR")
    by_agent = "WANDB_SWEEP_ID" in os.environ and given == os.getcwd()
    return given if given and not by_agent else str(folder)


def _why_offline(mode: str) -> str:
    """Say why the run must be offline, before any server is asked; "" when it may be online."""
    if mode == "offline":
        return CHOSEN
    settings = wandb.Settings(silent=True)
    if mode == "online":
        settings.mode = "online"
    if wandb.setup(settings).settings.mode != "online":
        return "`wandb offline` was run here"
    try:
        problem = "" if wandb.login(prompt=False, verify=False) else "no API key is configured"
    except wandb.Error as error:
        problem = str(error)
    if problem and mode == "online":
        raise UserError(f"tracking.wandb: online, but {problem}; {_REMEDY}")
    return problem


def _teardown() -> None:
    """End wandb's background process; a dead one raises, here rather than in a traceback at the program's exit.

    Its run stays the current one; while there is one, no key is looked for, so a tracker opened anew would find none.
    """
    with contextlib.suppress(Exception):
        wandb.teardown()
    unset_globals()
