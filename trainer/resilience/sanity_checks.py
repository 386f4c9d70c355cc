"""Checks of a run: loss and weights are finite, weights are equal on all ranks, and its images can be read."""

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.loader import Loader
from trainer.distributed import DistContext

STEPS_BACK = 3
"""With `run.on_nonfinite back`: returns to one checkpoint before the run gives up. More mean that no single batch is to blame."""

_OWN = ("running_mean", "running_var")  # statistics of batch normalisation, of each rank's own images


class NonFinite(Exception):
    """Raised on every rank: optimizer step `step` has made `what` infinite or NaN."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"the {what} of step {step} is not finite")
        self.step = step


def find_nonfinite(module: nn.Module, ctx: DistContext) -> str | None:
    """Find the first weight or statistic of `module` that is infinite or NaN on any rank; None where all are finite.

    Collective. Raises `UserError` where weights that should be equal on all ranks are not, if each rank has all of
    them. Statistics of batch normalisation may differ: they are each rank's own in training.

    Sums show both. The sum of a tensor's bits, as integers, is its checksum. A tensor is finite if the sum of its values
    is; a value beyond 1e38 can make the sum infinite, but such a value has exploded as well.
    """
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items() if tensor.numel()}
    equal = [name for name in tensors if not name.endswith(_OWN)]
    finite = torch.stack([tensor.sum().float() for tensor in tensors.values()]).isfinite()
    mine = torch.cat([torch.stack([_checksum(tensors[name]) for name in equal]), finite.long()])
    everyone = ctx.gather(mine)
    names, wrong = differing(everyone[:, : len(equal)], equal)
    if names:
        raise UserError(
            f"the weights have come apart: {names} on rank {', '.join(map(str, wrong))} is not what the other ranks have; "
            "nothing is saved. See whether the memory of that node is sound; the same command goes on from the checkpoint before"
        )
    lost = (everyone[:, len(equal) :] == 0).any(dim=0).tolist()
    return next((name for name, is_lost in zip(tensors, lost, strict=True) if is_lost), None)


def differing(checksums: Tensor, names: list[str]) -> tuple[str | None, list[int]]:
    """Find the first of `names` whose checksums [world, names] are not all equal, and the ranks in the minority.

    If both sides have the same number, the one without rank 0 is named.
    """
    for name, column in zip(names, checksums.T.tolist(), strict=True):
        if len(set(column)) > 1:
            usual = max(column, key=column.count)
            return name, [rank for rank, checksum in enumerate(column) if checksum != usual]
    return None, []


def _checksum(tensor: Tensor) -> Tensor:
    """int64 scalar: the sum, modulo 2^64, of the elements' bits. It does not depend on their order in memory."""
    bits = tensor.view(torch.int32) if tensor.is_floating_point() else tensor
    return bits.sum(dtype=torch.int64)


def limit_bad(loader: Loader, found: int = 0) -> None:
    """Raise `UserError` where too many images of a split are bad; all ranks together `found` so many while reading."""
    catalog, cfg = loader.catalog, loader.cfg
    bad, images = found + len(catalog.bad), len(catalog) + len(catalog.bad)
    example = next((f", as {path}: {why}" for path, why in catalog.bad.items()), "")
    told = f"{bad} of the {images} images in {catalog.root} cannot be read{example}"
    if bad and cfg.on_error == "fail":
        raise UserError(f"data.on_error: {told}; mend them, or let them be skipped")
    if bad > cfg.max_bad_share * images:
        raise UserError(f"data.max_bad_share: {told}; mend them, or allow more than {cfg.max_bad_share:.2%}")
