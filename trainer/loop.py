"""Training loop: build or resume a run (`setup`), then step by step to the end, with a save whenever one is due."""

import os
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import Enum, auto

from data_pipeline.common.errors import printable
from data_pipeline.loader import Batch
from trainer.checkpoint.files import WEIGHTS
from trainer.checkpoint.mirror import copy_rest, grace_s
from trainer.checkpoint.progress import Progress
from trainer.config import Config
from trainer.distributed import DistContext
from trainer.optim.extension import extended_lr_at
from trainer.resilience.sanity_checks import NonFinite
from trainer.resilience.signals import AFTER_SIGNAL, StopFlag
from trainer.resilience.wandb_agent import Agent, trial_of
from trainer.resilience.watchdog import heartbeat
from trainer.session import Session
from trainer.setup.opening import open_session
from trainer.setup.start import nothing_left, out_of_patience, start_run
from trainer.setup.step_back import step_back


class Outcome(Enum):
    """Result of a step, or of an epoch."""

    CONTINUE = auto()
    """The epoch goes on."""
    EPOCH_DONE = auto()
    """The epoch was the last, if the run is finished."""
    OUT_OF_PATIENCE = auto()
    """`run.patience` has ended the run within an epoch, and it has begun to save."""
    STOPPED = auto()
    """Some rank was asked to stop; all have begun to save."""
    MAX_STEPS = auto()
    """`run.max_steps` is reached: evaluated, and begun to save."""


def fit(cfg: Config, ctx: DistContext, stop: StopFlag, started: Callable[[], None] = lambda: None) -> Progress:
    """Train until all epochs are done, `run.max_steps` is reached or `stop` is raised; resume the run that is there.

    `started` is called when all is open, before the run's own console speaks.

    Collective. Raises `UserError`, on every rank, for a mistake that a user can correct.
    """
    agent = Agent.above() if trial_of(os.environ) else None
    with start_run(cfg, ctx) as start:
        if start.nothing_left:
            if ctx.primary:
                print(printable(nothing_left(start)))
            if start.mirrored:
                copy_rest(start.mirrored, start.store)
            return start.progress
        with open_session(start, started) as session:
            outcome = train(session, stop)
            follows = mark_stop(session, stop, agent) if outcome is Outcome.STOPPED else ""
            session.finish()
            # Whoever sent the signal kills the process after a while, so the last copy gets what is left of that.
            if session.mirror and outcome is Outcome.STOPPED:
                session.mirror.patience_s = max(grace_s() - stop.raised_for_s, 0)
            say_end(session, outcome, stop, follows)
            return session.progress


def train(session: Session, stop: StopFlag) -> Outcome:
    """Train epoch after epoch. Returns how it ended: EPOCH_DONE with the last one, or with that which `run.patience` ended."""
    outcome = Outcome.CONTINUE
    while not session.progress.finished and outcome not in (Outcome.STOPPED, Outcome.MAX_STEPS):
        try:
            outcome = train_epoch(session, stop)
        except NonFinite as found:
            step_back(session, found)
    return outcome


def train_epoch(session: Session, stop: StopFlag) -> Outcome:
    """Train from the run's position to the end of the epoch, or until the run must stop before."""
    # A stop may have come between a step and its validation, which may find the best weights or end the run.
    if session.validation_missed and validate_within_epoch(session):
        return Outcome.OUT_OF_PATIENCE
    session.begin_epoch()
    for micro_batches in _grouped(session.meter.waiting(session.loader), session.cfg.optim.accumulate):
        lr = take_step(session, micro_batches)
        if not session.epoch_read:  # otherwise the loader ends here, and the end of the epoch reports and saves
            outcome = after_step(session, lr, stop)
            if outcome is not Outcome.CONTINUE:
                return outcome
    return end_epoch(session, stop)


def take_step(session: Session, micro_batches: list[Batch]) -> float:
    """Make one optimizer step, unless it is one to pass over. Returns its learning rate."""
    lr = extended_lr_at(session.progress.step, session.cfg.optim, session.total_steps, session.extension)
    step = session.progress.step + 1
    heartbeat("update")
    # A step that is passed over counts in every other respect, so that the images and rates of all others stay the same.
    if step not in session.progress.skipped:
        sums = session.engine.step(micro_batches, lr)
        session.meter.add(sums, session.engine.waits.take())
    session.trace.step(step)
    # The position changes with the weights: whatever is saved after this belongs together.
    session.progress = replace(session.progress, step=step, cursor=session.loader.cursor)
    heartbeat("update", step, fresh=False)
    return lr


def after_step(session: Session, lr: float, stop: StopFlag) -> Outcome:
    """Report and save, where either is due; here the ranks agree on a stop."""
    run, step = session.cfg.run, session.progress.step
    save_due, last_step, validation_due = step % run.save_every == 0, step == run.max_steps, run.validation_due(step)
    snapshot_due = run.snapshot_every is not None and step % run.snapshot_every == 0
    # All of this depends on the step alone, so every rank comes to the same calls, which are collective.
    if not (step % run.log_every == 0 or save_due or snapshot_due or last_step or validation_due):
        return Outcome.CONTINUE
    # A signal may reach one rank alone, or each at another step. They agree here and not in every step, because the reduction
    # waits for the device.
    stopping = session.log(lr, stop.raised)
    if last_step or (validation_due and not stopping):
        over = validate_within_epoch(session)
        return Outcome.MAX_STEPS if last_step else Outcome.OUT_OF_PATIENCE if over else Outcome.CONTINUE
    if save_due or stopping:
        session.save()
    elif snapshot_due:
        session.keep_snapshot()
    return Outcome.STOPPED if stopping else Outcome.CONTINUE


def validate_within_epoch(session: Session) -> bool:
    """Evaluate, report, save. Returns True where `run.patience` has ended the run."""
    session.save_before_validation()
    session.average()
    scores, best = session.validate()
    session.tracker.log(scores, session.progress.step, session.epoch)
    session.save(best)
    return session.progress.finished


def end_epoch(session: Session, stop: StopFlag) -> Outcome:
    """Evaluate where that is due, report, move on to the next epoch, save.

    A run that must stop leaves the evaluation to the one that goes on, because it may be short of time.
    """
    scalars, stopping = session.reduce(stop.raised)
    session.prove_coverage()  # before anything that says that the epoch is trained
    if stopping:
        session.save()
        return Outcome.STOPPED
    session.close_epoch(scalars)
    return Outcome.MAX_STEPS if session.progress.step == session.cfg.run.max_steps else Outcome.EPOCH_DONE


def mark_stop(session: Session, stop: StopFlag, agent: Agent | None) -> str:
    """Tell W&B why a run stops before its end. Returns what comes next; a signal may only want the machine for a while."""
    tracker, by_itself = session.tracker, os.environ.get(AFTER_SIGNAL)
    if by_itself and not tracker.stop_requested:
        return by_itself
    if agent and not tracker.stop_requested and agent.took_away(stop.signal):
        tracker.stopped(comes_back=True)
        return "W&B hands it to the next agent of its sweep"
    if tracker.stop_requested or agent:
        tracker.stopped(comes_back=False)
    command = shlex.join(["python", "-m", "trainer", "--config", str(session.cfg.folder / "config.yaml")])
    return (
        f"its sweep is done with it; to go on from there: {command}" if agent else "the same command goes on from there"
    )


def say_end(session: Session, outcome: Outcome, stop: StopFlag, follows: str) -> None:
    """Print how the training ended, by which signal, and what comes next."""
    run, progress, tracker = session.cfg.run, session.progress, session.tracker
    best = f"best {progress.best}"
    if outcome is Outcome.STOPPED:
        tracker.alert("asked to stop", f"saved step {progress.step}{_by(stop)}; {follows}")
    elif outcome is Outcome.MAX_STEPS:
        tracker.note(
            f"stopped after run.max_steps: {progress.step} of {session.total_steps} steps, {best}, saved in "
            f"{session.cfg.folder}"
        )
    else:
        which = "best" if progress.to_beat is not None else "last"
        command = shlex.join(["python", "-m", "trainer.report", str(session.cfg.folder)])
        weights = session.store.folder / which / WEIGHTS
        early = progress.cursor.epoch < run.epochs
        whole = f"trained {run.epochs} epoch{'s' * (run.epochs > 1)}"
        ended = f"ended early after {session.epoch:.4g} epochs ({out_of_patience(progress)})"
        tracker.note(f"{ended if early else whole}: {best}, weights in {weights}; next: {command}")


def _by(stop: StopFlag) -> str:
    """Name the signal that rank 0 got; nothing where only another rank was told, or somebody has pressed Stop at W&B."""
    return f" on {signal.Signals(stop.signal).name}" if stop.signal else ""


def _grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
