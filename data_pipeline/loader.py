"""One rank's share of a split as batches in device memory, from any position, the same at any number of ranks.

An epoch is cut into updates of `cfg.batch` images, an update into micro-batches, a micro-batch dealt out to the ranks
image by image. Which image stands where, and how it is cropped, follows from its position alone (see `draws`), so
continuing is computing, not replaying.
"""

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from PIL import Image

from data_pipeline import draws, graph
from data_pipeline.catalog import Catalog
from data_pipeline.config import DataConfig
from data_pipeline.errors import UserError
from data_pipeline.headers import BadImage, inspect

UNCOUNTED = -1  # the label of a row that no loss and no score may count

_READ_AHEAD = 4  # batches that threads read from storage ahead of DALI


class Place(Protocol):
    """Where a loader works; `trainer.machine.Machine` is one."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def cores(self) -> int: ...


@dataclass(frozen=True)
class Cursor:
    """A place in the order of training: `seen` images of `epoch`, counted over all ranks."""

    epoch: int = 0
    seen: int = 0


class Batch(NamedTuple):
    """One micro-batch of one rank, B rows, of which the first `valid` are samples and the rest padding."""

    images: torch.Tensor
    """[B, 3, H, W] uint8 RGB in channels-last memory, on the rank's device."""
    labels: torch.Tensor
    """[B] int64 on the rank's device; UNCOUNTED for padding and for images that could not be read."""
    ids: torch.Tensor
    """[B] int64 on the CPU: row in the catalog."""
    valid: int
    total: int
    """Samples in the whole update, over its micro-batches and all ranks: what a mean loss is divided by."""


class _MicroBatch(NamedTuple):
    """Positions of one micro-batch: from `start`, in the update of positions `update` to `end`."""

    epoch: int
    start: int
    update: int
    end: int


class _Rows(NamedTuple):
    """One micro-batch on its way through DALI."""

    inputs: tuple[list[NDArray[Any]], ...]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    valid: int
    total: int
    cursor: Cursor


class Loader:
    """Batches of one split for one rank.

    Training reads every sample once an epoch in a fresh order. Validation (`training=False`) reads the catalog in its
    own order with a centre crop. Where the images run out, batches are filled up with repeated rows that do not count,
    so that all ranks take the same number of steps and all shapes stay the same.
    """

    def __init__(
        self,
        catalog: Catalog,
        cfg: DataConfig,
        place: Place,
        *,
        training: bool,
        seed: int = 0,
        epochs: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.catalog, self.cfg, self.place = catalog, cfg, place
        self.training, self.seed, self.epochs = training, seed, epochs
        self.micro_batches = accumulate if training else 1
        shares = place.world * self.micro_batches
        if training and cfg.batch % shares:
            raise UserError(
                f"data.batch: {cfg.batch} images cannot be shared by {place.world} ranks x {self.micro_batches} "
                f"micro-batches; choose a multiple of {shares}"
            )
        self.rows = -(-cfg.batch // shares)
        self.cursor = Cursor()
        self._bad: dict[str, str] = {}
        self._told = 0
        self._update = self.rows * shares  # images
        self._rotate = training and cfg.augment.rotate_deg > 0
        self._pipeline: Pipeline | None = None
        self._size_px = 0
        self._ahead: Iterator[_Rows] = iter(())
        self._in_flight: deque[_Rows] = deque()

    @property
    def updates(self) -> int:
        """Updates of a whole epoch; for validation, batches."""
        return -(-len(self.catalog) // self._update)

    def seek(self, cursor: Cursor) -> None:
        """Let the next iteration start at `cursor`; takes no time, wherever that is."""
        self.cursor = cursor

    def take_bad(self) -> list[tuple[str, str]]:
        """Path and reason of the files found unreadable since the last call; none is named twice."""
        new = list(self._bad.items())[self._told :]
        self._told += len(new)
        return new

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the cursor to the end of its epoch. The cursor stands behind the batch handed out last."""
        size_px = self.cfg.size_at(self.cursor.epoch, self.epochs) if self.training else self.cfg.validation_px
        pipeline = self._pipeline if self._pipeline and size_px == self._size_px else self._build(size_px)
        # Kept only once this epoch is read to its end: what an abandoned pipeline has in flight cannot be taken back.
        self._pipeline, self._size_px = None, size_px
        self._in_flight.clear()
        self._ahead = self._read_ahead(self.cursor)
        device = self.place.device
        stream = [torch.cuda.current_stream(device)] if device.type == "cuda" else []
        while True:
            try:
                (images,) = pipeline.run(*stream)
            except StopIteration:
                break
            rows = self._in_flight.popleft()
            self.cursor = rows.cursor
            yield Batch(
                # [B, H, W, 3] seen as [B, 3, H, W]: the same memory, which is what channels-last means.
                images=torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2),
                labels=torch.from_numpy(rows.labels).to(device, non_blocking=True),
                ids=torch.from_numpy(rows.ids),
                valid=rows.valid,
                total=rows.total,
            )
        pipeline.reset()
        self._pipeline = pipeline

    def _build(self, size_px: int) -> Pipeline:
        device = self.place.device
        return graph.build_graph(
            self._next_inputs,
            batch=self.rows,
            size_px=size_px,
            rotate=self._rotate,
            gpu=(device.index or 0) if device.type == "cuda" else None,
            threads=self.cfg.threads or self.place.cores,
        )

    def _next_inputs(self) -> tuple[list[NDArray[Any]], ...]:
        """DALI's source. The rows stay in flight, and so their bytes alive, until DALI has handed out the images."""
        rows = next(self._ahead)  # its StopIteration ends the epoch for DALI too
        self._in_flight.append(rows)
        return rows.inputs

    def _read_ahead(self, start: Cursor) -> Iterator[_Rows]:
        """This rank's micro-batches from `start` to the end of the epoch, read by a few threads before they are needed."""
        count = len(self.catalog)
        order = draws.order(self.seed, start.epoch, count) if self.training else np.arange(count)
        micro_batches = (
            _MicroBatch(
                start.epoch, first + micro * self.rows * self.place.world, first, min(first + self._update, count)
            )
            for first in range(start.seen, count, self._update)
            for micro in range(self.micro_batches)
        )
        with ThreadPoolExecutor(_READ_AHEAD) as pool:
            pending: deque[Future[_Rows]] = deque()
            for micro_batch in micro_batches:
                pending.append(pool.submit(self._fetch, micro_batch, order))
                if len(pending) > _READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _fetch(self, micro: _MicroBatch, order: NDArray[np.int64]) -> _Rows:
        positions = micro.start + self.place.rank + self.place.world * np.arange(self.rows)
        ids = order[positions % len(order)]
        labels = np.where(positions < micro.end, self.catalog.labels[ids], UNCOUNTED)
        sizes = self.catalog.sizes[ids].copy()
        encoded = []
        for row, sample in enumerate(ids):
            data = self._read(int(sample))
            if data is None:
                data, sizes[row], labels[row] = _BLANK, _BLANK_SIZE, UNCOUNTED
            encoded.append(np.frombuffer(data, np.uint8))
        if self.training:
            u = draws.uniforms(self.seed, micro.epoch, positions)
            geometry = draws.training_geometry(u, sizes, self.cfg.augment)
        else:
            geometry = draws.centre_geometry(sizes, self.cfg.validation_px, self.cfg.eval_crop)
        inputs = [encoded, list(geometry.roi[:, :2]), list(geometry.roi[:, 2:])]
        return _Rows(
            inputs=tuple([*inputs, list(geometry.angle_deg)] if self._rotate else inputs),
            labels=labels,
            ids=ids,
            valid=int((positions < micro.end).sum()),
            total=micro.end - micro.update,
            cursor=Cursor(micro.epoch, micro.end),
        )

    def _read(self, sample: int) -> bytes | None:
        """The bytes of a sample, or None where they cannot be decoded; `take_bad` then names it."""
        try:
            data = self.catalog.read(sample)
            inspect(data)
            return data
        except OSError as error:
            why = error.strerror or type(error).__name__
        except BadImage as error:
            why = str(error)
        self._bad.setdefault(self.catalog.paths[sample], why)
        return None


def _blank() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", _BLANK_SIZE, (128, 128, 128)).save(stream, "JPEG")
    return stream.getvalue()


_BLANK_SIZE = (16, 16)
_BLANK = _blank()
