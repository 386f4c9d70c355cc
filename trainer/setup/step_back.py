"""Go back to the last checkpoint from a step whose loss or gradient was not finite."""

from dataclasses import replace

from data_pipeline.common.errors import UserError
from trainer.checkpoint.progress import Progress, read_progress
from trainer.resilience.sanity_checks import STEPS_BACK, NonFinite
from trainer.session import Session
from trainer.setup.opening import last_row


def step_back(session: Session, found: NonFinite) -> None:
    """Resume from the last checkpoint, past the step that went wrong, or end the run. Collective. Raises `UserError`."""
    remedy = "lower optim.lr, set optim.clip_norm, or engine.precision to fp32"
    tracker, ctx, store = session.tracker, session.ctx, session.store
    tracker.alert("bad step", str(found))
    if session.cfg.run.on_nonfinite == "stop":
        raise UserError(f"{found}; {remedy}, or pass over such steps by run.on_nonfinite back") from None
    # The one being written is newer than those on disk, and its weights were checked. Rank 0 reads for all, so that no rank
    # goes back to another.
    session.wait_for_checkpoint()
    newest = ctx.raise_together(lambda: store.newest() if ctx.primary else None)
    newest, progress = ctx.broadcast_from_rank0(lambda: (newest, read_progress(newest) if newest else Progress()))
    # Counted by the steps that changed the weights: a run that fails again without one more of them goes in a circle.
    trained = progress.step - sum(step <= progress.step for step in progress.skipped)
    session.steps_back[trained] += 1
    if newest is None:
        raise UserError(f"{found}, and there is no checkpoint to step back to; {remedy}") from None
    if session.steps_back[trained] > STEPS_BACK:
        raise UserError(f"{found}, and {STEPS_BACK} steps back have not helped; {remedy}") from None
    session.engine.load(newest)
    # Snapshots in memory are of steps that are undone now.
    if session.snapshots:
        session.snapshots.give_up()
    session.resume(
        replace(
            progress,
            skipped=sorted({*session.progress.skipped, found.step}),
            arithmetic=session.progress.arithmetic,
            finished=False,
        )
    )
    ctx.raise_together(
        lambda: tracker.reopen(last_row(progress, session.images))
    )  # without the rows of the undone steps
    tracker.note(f"back to step {progress.step}, and on past the images of step {found.step}")
