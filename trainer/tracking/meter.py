"""Speed of a run, and the sums behind its scores."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, Self, TypeVar

import torch

from trainer.checkpoint.progress import BestBy
from trainer.distributed import DistContext
from trainer.engine.base import StepSums
from trainer.node.clock import Span, clock_of
from trainer.node.usage import Usage, UsageMeter, usage_figures
from trainer.resilience.slow_ranks import RankTimes, rank_figures
from trainer.resilience.watchdog import Phase

T = TypeVar("T")

TOP5_FROM = 6
"""Classes from which top-5 says anything: with five and fewer every image is right."""


class Scores(NamedTuple):
    """Scores of a model on some images."""

    loss: float
    """Mean in nats: of the training loss (optim.loss, label smoothing included); in evaluation of the cross-entropy."""
    top1_pct: float
    top5_pct: float
    images: int
    macro_recall_pct: float | None = None
    """Mean over the classes that have images of the share of them that is recognised; in evaluation only."""

    @classmethod
    def of(cls, sums: Sequence[float]) -> Self:
        """Compute from sums of loss, top-1 hits, top-5 hits and images; there must be at least one."""
        loss, top1, top5, images = sums[:4]
        return cls(loss / images, 100 * top1 / images, 100 * top5 / images, int(images))

    def by(self, name: BestBy) -> float:
        """Return the score that chooses the best weights."""
        scores: dict[BestBy, float | None] = {
            "top1": self.top1_pct,
            "macro_recall": self.macro_recall_pct,
            "loss": self.loss,
        }
        score = scores[name]
        assert score is not None, "these are of no evaluation"
        return score

    def words(self, classes: int) -> str:
        """The scores for people, top-5 only where there are `TOP5_FROM` classes."""
        top5 = f"  top-5 {self.top5_pct:.2f} %" if classes >= TOP5_FROM else ""
        macro = "" if self.macro_recall_pct is None else f"  macro recall {self.macro_recall_pct:.2f} %"
        return f"loss {self.loss:.4f}  top-1 {self.top1_pct:.2f} %{top5}{macro}"

    def figures(self, classes: int) -> dict[str, float]:
        """The scores by their names, top-5 only where there are `TOP5_FROM` classes."""
        top5 = {"top5_pct": self.top5_pct} if classes >= TOP5_FROM else {}
        macro = {} if self.macro_recall_pct is None else {"macro_recall_pct": self.macro_recall_pct}
        return {"loss": self.loss, "top1_pct": self.top1_pct, **top5, **macro}


class Judged(Protocol):
    """Scores of an evaluation, of either kind."""

    @property
    def loss(self) -> float: ...

    def by(self, name: BestBy) -> float:
        """Return the score that chooses the best weights."""
        ...


def beats(scores: Judged, best: float | None, by: BestBy) -> bool:
    """Return True where they are better than the best so far. A network whose loss is NaN guesses, and is right by chance."""
    if best is None or not math.isfinite(scores.loss):
        return math.isfinite(scores.loss)
    return scores.by(by) < best if by == "loss" else scores.by(by) > best


def named(split: str, figures: dict[str, float]) -> dict[str, float]:
    """Name the figures of a split as metrics do."""
    return {f"{split}/{name}": value for name, value in figures.items()}


class BadStep(NamedTuple):
    """First optimizer step since the last `reduce` with an infinite or NaN value, on any rank."""

    update: int
    """Counted from 1."""
    what: str


class Meter:
    """Collects on the device; nothing leaves it until `reduce`, once per logging interval.

    The wait for data is the time in which the device has nothing to do because its next batch is not there. Which rank
    the others wait for is gathered along the way (see `slow_ranks`).

    With loss scaling (`scaled`) a gradient that is not finite is normal: the step is left out, and the scale
    lowered.
    """

    def __init__(
        self,
        ctx: DistContext,
        epoch_sums: list[float],
        classes: int,
        train_s: float = 0.0,
        *,
        scaled: bool = False,
        multi_label: bool = False,
    ) -> None:
        self.ctx, self.classes, self.multi_label = ctx, classes, multi_label
        watched = ("loss",) if scaled else ("loss", "grad_norm")
        self._watched = [StepSums._fields.index(name) for name in watched]
        self.nonfinite: BadStep | None = None
        """First bad step that the last `reduce` found."""
        self.rank_times: list[RankTimes] = []
        """Times of each rank for a step of the interval before the last `reduce`; empty where it had none."""
        self.train_s = train_s
        """Seconds of training up to the last `reduce`, without what lies before a `pause`."""
        self.epoch_sums = list(epoch_sums) or list(StepSums.zero())
        """Sums of the epoch so far over all ranks, up to the last `reduce`; see `engine.base.StepSums`."""
        self._clock = clock_of(ctx.device)
        self._usage = UsageMeter(ctx.device, ctx.first_of_node)
        self._start = time.perf_counter()
        self._epoch_s, self._epoch_images = 0.0, 0.0  # of this process: a resumed epoch is timed from there
        self._restart()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield from `batches`, and count the wait for each as data wait."""
        iterator = iter(batches)
        while True:
            start = self._clock.mark()
            try:
                with Phase("data"):
                    batch = next(iterator)
            except StopIteration:
                return
            self._data_waits.append(Span(start, self._clock.mark()))
            yield batch

    def add(self, sums: torch.Tensor, waits: Iterable[Span] = ()) -> None:
        """Count one optimizer step; `sums` is what `Engine.step` returned, and `waits` its `Engine.waits`."""
        self._updates.append(sums)
        self._rank_waits.extend(waits)
        self._ends.append(self._clock.mark())

    def reduce(self, *counts: float) -> tuple[dict[str, float], list[float]]:
        """Compute scores and speed since the last call, and add `counts` up over the ranks along the way. Collective."""
        # The only place where the host waits for the device: for the marks, for the sum of images, whose value says that all
        # steps are done, and in the one reduction that serves scores, times and the caller's counts.
        if self._ends[1:]:
            self._clock.settle(self._ends[-1])
        steps = len(self._ends) - 1
        table = torch.stack(self._updates)
        lost = ~table[:, self._watched].isfinite()
        images = float(table[:, StepSums._fields.index("images")].sum())
        own = (*self._times(images), *self._usage.read())
        ranks = table.new_zeros(self.ctx.world, len(own))  # with a row for each rank the sum gathers, too
        ranks[self.ctx.rank] = table.new_tensor(own)
        # One vector: sums of the steps, the caller's counts, 1 where a loss was lost, then the rows of the ranks' own figures.
        values = torch.cat([table.sum(dim=0), table.new_tensor(counts), lost.any()[None], ranks.flatten()])
        summed = self.ctx.sum(values)  # on a GPU this waits for the steps of the interval
        totals = summed[: -ranks.numel()].tolist()
        times, usage = (
            summed[-ranks.numel() :].view_as(ranks).cpu().split([len(RankTimes._fields), len(Usage._fields)], 1)
        )
        self.rank_times = [RankTimes(*row) for row in (times / steps).tolist()] if steps else []
        self.nonfinite = self._first_nonfinite(lost) if totals.pop() else None
        sums = StepSums(*totals[: len(StepSums._fields)])
        sums = sums._replace(grad_norm=sums.grad_norm / self.ctx.world)  # every rank has the same gradient
        counted = totals[len(sums) :]
        # Time and sums go on from interval to interval; an epoch's are added up beside them.
        elapsed_s = time.perf_counter() - self._start
        self.train_s += elapsed_s
        self._epoch_s += elapsed_s
        self._epoch_images += sums.images
        self.epoch_sums = [a + b for a, b in zip(self.epoch_sums, sums, strict=True)]
        # Rates are of all ranks: they step together, so this rank's clock serves.
        scalars = {}
        if steps:
            times_ms = sorted(1e3 * self._clock.seconds(start, end) for start, end in pairwise(self._ends))
            scalars = {
                **self._scores(sums),
                "train/grad_norm": sums.grad_norm / steps,
                "perf/images_per_s": sums.images / elapsed_s,
                "perf/data_wait_pct": 100 * float(times[:, 0].sum()) / self.ctx.world / elapsed_s,
                "perf/step_ms_p50": times_ms[steps // 2],
                "perf/step_ms_p95": times_ms[min(steps - 1, steps * 95 // 100)],
                "perf/train_min": self.train_s / 60,
                **(rank_figures(self.rank_times) if self.ctx.world > 1 else {}),
                **usage_figures([Usage(*row) for row in usage.tolist()], elapsed_s, sums.images),
            }
        self._restart()
        return scalars, counted

    def end_epoch(self) -> dict[str, float]:
        """Scores of the whole epoch, and its speed without the time in evaluation and saving."""
        scalars = self._scores(StepSums(*self.epoch_sums))
        if self._epoch_images:
            scalars |= {"perf/train_min": self.train_s / 60}
            scalars |= {"perf/epoch_s": self._epoch_s, "perf/images_per_s": self._epoch_images / self._epoch_s}
        self.epoch_sums, self._epoch_s, self._epoch_images = list(StepSums.zero()), 0.0, 0.0
        return scalars

    def _scores(self, sums: StepSums) -> dict[str, float]:
        """Name the training scores; of images of several classes only the loss, as mAP needs all of them at once."""
        if not sums.images:
            return {}
        scores = Scores.of(sums)
        return {"train/loss": scores.loss} if self.multi_label else named("train", scores.figures(self.classes))

    def pause(self) -> None:
        """Restart the clock: the time until now was not training, nor its energy."""
        self._usage.restart()
        self._start = time.perf_counter()
        self._data_waits: list[Span] = []
        self._rank_waits: list[Span] = []
        self._ends = [self._clock.mark()]  # of the steps, behind the mark where the first begins

    def _times(self, images: float) -> RankTimes:
        """Sums of this rank over the interval."""
        data_s, wait_s = (
            sum(self._clock.seconds(*span) for span in spans) for spans in (self._data_waits, self._rank_waits)
        )
        all_s = self._clock.seconds(self._ends[0], self._ends[-1]) if self._ends[1:] else 0.0
        return RankTimes(data_s, max(all_s - data_s - wait_s, 0.0), wait_s, images)

    def _first_nonfinite(self, lost: torch.Tensor) -> BadStep:
        """Find the step by `lost` on this rank: [1 + steps, 1 or 2] for the loss, and for the gradient's norm. Collective."""
        anywhere = self.ctx.gather(lost.long()).sum(dim=0)
        step = int(anywhere.any(dim=1).long().argmax())
        return BadStep(step, "loss" if anywhere[step, 0] else "gradient")

    def _restart(self) -> None:
        nothing = torch.zeros(len(StepSums._fields), dtype=torch.float64, device=self.ctx.device)
        self._updates = [nothing]  # and behind it what each step returned
        self.pause()
