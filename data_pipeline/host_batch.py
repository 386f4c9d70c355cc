"""A micro-batch in host memory: its encoded images, and the random changes of each."""

import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline import sampling
from data_pipeline.batch import IGNORE_LABEL
from data_pipeline.config import DataConfig
from data_pipeline.dali import augment, graph
from data_pipeline.sharding import MicroBatch
from data_pipeline.sources.catalog import Catalog
from data_pipeline.sources.image_headers import BadImage, Size

_MOST_PIXELS = 1 << 28  # pixels that a rank decodes at once at most, 0.8 GB: three times as many are in flight


class HostBatch(NamedTuple):
    """One micro-batch of one rank, B rows, in the form that DALI takes."""

    inputs: list[graph.Inputs]
    """Rows in order, in parts that may be decoded at once; a single part, except where images are huge."""
    labels: NDArray[np.int64]
    """[B] class of each row; IGNORE_LABEL for padding and for images that cannot be read."""
    ids: NDArray[np.int64]
    """[B] row in the catalog."""
    bad: dict[int, str]
    """Images among `ids` that cannot be read -> reason."""
    micro_batch: MicroBatch

    @property
    def real_ids(self) -> NDArray[np.int64]:
        """`ids` without padding."""
        return self.ids[: self.micro_batch.num_real]


class Fetcher:
    """Reads micro-batches of a catalog, and draws the random changes of their images."""

    def __init__(
        self,
        catalog: Catalog,
        cfg: DataConfig,
        read: Callable[[int], tuple[bytes, Size]],
        *,
        training: bool,
        seed: int,
    ) -> None:
        """Make a fetcher. `read` returns a sample's encoded bytes and the image's size, or raises `BadImage`."""
        self._catalog, self._cfg, self._read = catalog, cfg, read
        self._training, self._seed = training, seed
        self.shifts = training and cfg.augment.crop == "simple"
        self.rotates = training and cfg.augment.rotate_deg > 0
        self.operators = augment.operators(cfg) if training else []

    def fetch(self, micro_batch: MicroBatch, epoch: int, order: NDArray[np.int64], size_px: int) -> HostBatch:
        """Read the micro-batch of an epoch with this `order`, for images of `size_px`."""
        positions = micro_batch.positions
        ids = order[positions % len(order)]
        labels = np.where(positions < micro_batch.end, self._catalog.labels[ids], IGNORE_LABEL)

        # Read the bytes, of an address those of the whole batch at once. A grey image stands in for one that cannot be read.
        sizes = np.empty((len(ids), 2), np.int32)
        encoded, bad = [], {}
        self._catalog.prefetch(ids)
        for row, sample in enumerate(ids.tolist()):
            try:
                stream, sizes[row] = self._read(sample)
            except BadImage as error:
                stream, sizes[row] = _BLANK
                bad[sample], labels[row] = str(error), IGNORE_LABEL
            encoded.append(stream)

        # Choose the window of each image, which depends on its size.
        if self._training:
            u = sampling.uniforms(self._seed, epoch, positions)
            if self.shifts:
                geometry = sampling.simple_geometry(u, sizes, size_px, self._cfg.augment)
            else:
                geometry = sampling.training_geometry(u, sizes, self._cfg.augment)
        else:
            geometry = sampling.centre_geometry(sizes, size_px, self._cfg.eval_crop)
        tables: list[NDArray[Any]] = [geometry.roi[:, :2], geometry.roi[:, 2:]]
        if geometry.shift_px is not None:
            tables.append(geometry.shift_px)

        # Draw the other changes, in the order of the graph's inputs.
        if self.rotates:
            tables.append(geometry.angle_deg)
        if self.operators:
            u = sampling.uniforms(self._seed, epoch, positions, sampling.LOOK)
            tables += [operator.draw(u, size_px) for operator in self.operators]
        inputs = [graph.inputs_of(encoded[rows], *(table[rows] for table in tables)) for rows in _cut(sizes)]
        return HostBatch(inputs, labels, ids, bad, micro_batch)


def _cut(sizes: NDArray[np.int32]) -> Iterator[slice]:
    """Yield slices of rows whose images of `sizes` [B, 2] are decoded at once: at most `_MOST_PIXELS`, or a single image."""
    first, pixels = 0, 0
    for row, more in enumerate(sizes.astype(np.int64).prod(axis=1).tolist()):
        if pixels + more > _MOST_PIXELS and row > first:
            yield slice(first, row)
            first, pixels = row, 0
        pixels += more
    yield slice(first, len(sizes))


def _blank() -> tuple[bytes, Size]:
    """Encode a grey image for the row of one that cannot be read."""
    size, stream = Size(16, 16), io.BytesIO()
    Image.new("RGB", size, (128, 128, 128)).save(stream, "JPEG")
    return stream.getvalue(), size


_BLANK = _blank()
