"""The form in which a loader hands images out. Without DALI, so that an engine can be imported where there is none."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE_LABEL = -1  # label of a row that counts in no loss and no score


def on_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy `values` to a device; nothing waits.

    Out of pinned memory: for a copy out of other memory the host may wait until a GPU has done all that was handed to it before.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Places(NamedTuple):
    """Places of a batch's rows in a training, from which all of their random numbers follow (see `sampling`)."""

    seed: int
    epoch: int
    positions: NDArray[np.int64]
    """[B] in the order of the epoch, ascending; of padding too."""


class Batch(NamedTuple):
    """One micro-batch of one rank, B rows, of which the first `num_real` are samples and the rest padding."""

    images: torch.Tensor
    """[B, 3, H, W] RGB in channels-last memory on the rank's device, uint8; float32 in 0..255 where mixup blends."""
    labels: torch.Tensor
    """[B] int64 on the rank's device; IGNORE_LABEL for padding and for images that could not be read. Where `multi_label` only
    the sign says anything, and `targets` has the classes."""
    ids: torch.Tensor
    """[B] int64 on the CPU: row in the catalog."""
    num_real: int
    total: int
    """Samples in the whole optimizer step, over its micro-batches and all ranks: what a mean loss is divided by."""
    targets: torch.Tensor | None = None
    """[B, C] float32 where images are mixed: the share of each class. `labels` then has the class of the largest one, and
    `ids` the image that the row began with. Where `multi_label`, always: 1 for each class of an image that is not mixed."""
    places: Places | None = None
    """Places of the rows, for random numbers of the network; None outside of a training."""
    multi_label: bool = False
    """True where an image may have several classes, or none."""
