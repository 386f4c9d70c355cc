"""The protocol of engines, which turn batches into weights: forward, backward, all-reduce, optimizer step."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from torch import Tensor, nn

from data_pipeline.batch import Batch
from trainer.checkpoint.manifest import StateWriter
from trainer.engine.precision import Autocast
from trainer.node.clock import WaitTimer


class StepSums(NamedTuple):
    """Sums over the images of an optimizer step, in this order, and the norm of its gradient."""

    loss: float
    top1: float
    top5: float
    images: float
    grad_norm: float

    @classmethod
    def zero(cls) -> Self:
        return cls(*[0.0] * len(cls._fields))


class Engine(Protocol):
    module: nn.Module
    """Network in training, unwrapped: its keys never contain "module." or "_orig_mod."."""

    autocast: Autocast
    """Precision of its passes, resolved."""
    waits: WaitTimer
    """Times in which this rank's gradients were there, and it waited for those of the others."""

    @property
    def loss_scale(self) -> float | None:
        """Factor of the losses at present; None where they are not scaled."""
        ...

    @property
    def predict(self) -> Callable[[Tensor], Tensor]:
        """Compute logits [B, classes] float32 of images [B, 3, H, W] uint8, by the averaged weights if there are any."""
        ...

    def step(self, micro_batches: list[Batch], lr: float) -> Tensor:
        """Make one optimizer step. Returns this rank's sums [5] float64 on the device (see StepSums); nothing waits for them."""
        ...

    def fit_memory(self, rows: int, size_px: int, beside_bytes: int = 0) -> int:
        """Cut micro-batches of so many images into the fewest pieces that memory holds; returns their number. Collective."""
        ...

    def sync_buffers(self) -> None:
        """Give all ranks rank 0's statistics of batch normalisation, before evaluating. Collective."""
        ...

    def average(self, count: int, batches: Iterable[Batch]) -> None:
        """Add the weights to the mean of `count` (see `OptimConfig.swa`), and estimate its statistics of batch normalisation
        from images of `batches`, as many as it needs. Collective."""
        ...

    def capture_state(self, metadata: dict[str, str]) -> StateWriter:
        """Capture weights and training state: returns a function that writes this rank's files of them into a folder.

        Collective; the function is not, and may be called in another thread while training goes on, until the next capture.
        It raises OSError.
        """
        ...

    def load(self, folder: Path) -> None:
        """Continue exactly from the state in `folder`. Collective."""
        ...
