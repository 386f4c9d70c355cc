"""The protocol of a destination of metrics."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trainer.tracking.model_summary import Distribution, Layer


class Sink(Protocol):
    """One destination of rows. Any method may raise: the tracker then drops the sink."""

    def write(self, scalars: Mapping[str, float], step: int, epoch: float) -> None: ...

    def alert(self, title: str, text: str, facts: Mapping[str, str | float]) -> None:
        """Tell people who are not looking, where the destination can."""
        return

    def weights(self, found: Mapping[str, "Distribution"], step: int, epoch: float) -> None:
        """Show the distribution of each parameter's values, where the destination can."""
        return

    def graph(self, layers: list["Layer"]) -> None:
        """Show the network that is trained, where the destination can."""
        return

    def stopped(self, comes_back: bool) -> None:
        """Mark the run as stopped before its end, or as one of which the machine is taken away and that comes back."""
        return

    def close(self, failed: bool) -> None:
        """Flush and let go; `failed` when an exception ends the training."""
