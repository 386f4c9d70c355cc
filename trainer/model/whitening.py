"""Start of the stem from the principal directions of images, instead of random filters."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.loader import IGNORE_LABEL, Loader
from data_pipeline.sources.catalog import Catalog
from trainer.distributed import DistContext
from trainer.model.normalize import Normalise

IMAGES = 256
FLOOR = 5e-4
"""Lowest variance of a direction that is scaled to one, as a share of the largest: a lower one is noise."""


def whiten_stem(network: nn.Module, catalog: Catalog, cfg: DataConfig, size_px: int, ctx: DistContext) -> None:
    """Start the stem of `network` from images of `catalog`, evenly spread over it, in squares of `size_px`.

    The result is the same on every rank, without communication. Raises `UserError` where none of the images can be read.
    """
    rows = catalog.spread(IMAGES)
    here = replace(ctx, device=torch.device("cpu"), rank=0, world=1)
    options = replace(cfg, batch=len(rows), decode="cpu", eval_size_px=size_px)
    (batch,) = Loader(options, catalog.part(rows), here, training=False)
    images = batch.images[batch.labels != IGNORE_LABEL]
    if not len(images):
        raise UserError(f"model.whiten: none of {len(rows)} images in {catalog.root} could be read; leave it out")
    set_filters(network, Normalise(cfg.mean, cfg.std, here.device)(images))


@torch.no_grad()
def set_filters(network: nn.Module, images: Tensor) -> None:
    """Set the stem's filters to the directions in which its patches of normalised images [N,3,H,W] vary most, and their
    negatives, which the rectifier needs: each answers with variance one, and none like another.

    The whitening layer of Jordan 2024 (arXiv 2404.00498, section 3.2), which is of 2 x 2 px there and stays frozen; here
    filters are as large as the stem has them, and learn. Where it has more than twice as many as there are directions,
    the others stay as they are.
    """
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    # In double precision, as directions of like variance turn with the last digit: ranks and machines round differently.
    products, count = torch.zeros(()), 0
    for some in images.split(16):  # as patches take many times the memory of images
        patches = functional.unfold(some, stem.kernel_size, stride=stem.stride).transpose(1, 2).flatten(0, 1).double()
        products, count = products + patches.T @ patches, count + len(patches)
    variances, directions = torch.linalg.eigh(products / count)  # ascending
    half = min(stem.out_channels // 2, len(variances))
    scales = (variances[-half:] + FLOOR * variances[-1]).rsqrt()
    filters = (directions[:, -half:] * scales).T
    stem.weight[: 2 * half] = torch.cat([filters, -filters]).view(-1, *stem.weight.shape[1:])
