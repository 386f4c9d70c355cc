"""One rank's share of a split as batches in device memory, from any position, the same at any number of ranks.

An epoch is cut into updates of `cfg.batch` images, an update into micro-batches, a micro-batch dealt out to the ranks
image by image. Which image stands where, and how it is cropped, follows from its position alone (see `draws`), so
continuing is computing, not replaying.
"""

import io
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from PIL import Image

from data_pipeline import coverage, sampling
from data_pipeline import mixing as mix
from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.dali import augment, graph
from data_pipeline.sources.catalog import Catalog
from data_pipeline.sources.image_headers import BadImage, Size, inspect

IGNORE_LABEL = -1  # the label of a row that no loss and no score may count

_READERS = 8  # threads at most that read from storage, each a batch, ahead of DALI
_PATIENCE_S = 30.0  # that storage may take for a batch before its files are named


class RankInfo(Protocol):
    """Where a loader works; `trainer.distributed.DistContext` is one."""

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
    """One micro-batch of one rank, B rows, of which the first `num_real` are samples and the rest padding."""

    images: torch.Tensor
    """[B, 3, H, W] RGB in channels-last memory on the rank's device, uint8; float32 in 0..255 where mixup blends."""
    labels: torch.Tensor
    """[B] int64 on the rank's device; IGNORE_LABEL for padding and for images that could not be read."""
    ids: torch.Tensor
    """[B] int64 on the CPU: row in the catalog."""
    num_real: int
    total: int
    """Samples in the whole update, over its micro-batches and all ranks: what a mean loss is divided by."""
    targets: torch.Tensor | None = None
    """[B, C] float32 where images are mixed: the share of each class. `labels` then has the class of the largest one, and
    `ids` the image that the row began with."""


_Inputs = tuple[list[NDArray[Any]] | NDArray[Any], ...]


class _MicroBatch(NamedTuple):
    """Positions of one micro-batch: from `start`, in the update of positions `update` to `end`."""

    epoch: int
    start: int
    update: int
    end: int


class _Deal(NamedTuple):
    """How the images of an update are dealt out."""

    rows: int
    """Images of one rank in one micro-batch."""
    update: int
    """Images of all ranks and micro-batches."""
    places: NDArray[np.int64]
    """[rows] where those of this rank stand in a micro-batch: the ranks take turns, with one image or with a pair's two."""


class HostBatch(NamedTuple):
    """One micro-batch on its way through DALI."""

    inputs: _Inputs
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    num_real: int
    total: int
    update: int
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
        rank_info: RankInfo,
        *,
        training: bool,
        seed: int = 0,
        epochs: int = 1,
        accumulate: int = 1,
    ) -> None:
        graph.check_decode(cfg, on_gpu=rank_info.device.type == "cuda")
        self.catalog, self.cfg, self.rank_info = catalog, cfg, rank_info
        self.training, self.seed, self.epochs = training, seed, epochs
        self.micro_batches = accumulate if training else 1
        self._mixes = training and cfg.augment.mixes
        self._deals = {batch: self._deal_out(batch) for batch in cfg.batches}
        self._deal = self._deal_of(0)
        self.cursor = Cursor()
        self._bad: dict[str, str] = {}
        self._bad_of_epoch: set[int] = set()
        self._told = 0
        self._being_read: set[int] = set()
        self._rotate = training and cfg.augment.rotate_deg > 0
        self._operators = augment.operators(cfg) if training else []
        self._pipeline: Pipeline | None = None
        self._size_px = 0
        self._pool = ThreadPoolExecutor(_READERS)
        self._reading = 1  # batches at a time: threads take the interpreter from each other, so no more than needed
        self._orders: dict[int, Future[NDArray[np.int64]]] = {}
        self._sample_hashes: Future[NDArray[np.int64]] | None = None
        self._read_of_epoch: list[NDArray[np.int64]] = []
        self._started = Cursor()
        self._ahead: Iterator[HostBatch] = iter(())
        self._in_flight: deque[HostBatch] = deque()

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimizer steps of a whole epoch; for validation, batches."""
        return -(-len(self.catalog) // self._deal_of(epoch).update)

    def seek(self, cursor: Cursor) -> None:
        """Let the next iteration start at `cursor`; takes no time, wherever that is."""
        self.cursor = cursor

    def coverage_sums(self) -> coverage.CoverageSums:
        """What this rank has read since the last iteration began, and what it should have, to the end of the epoch."""
        start, hashes = self._started, self._hashes_of_samples().result()
        order = self._order_of(start.epoch).result()
        deal = self._deal_of(start.epoch)
        firsts = np.arange(start.seen, len(order), deal.rows * self.rank_info.world)
        share = (firsts[:, None] + deal.places).ravel()
        read = np.concatenate([np.empty(0, np.int64), *self._read_of_epoch])
        parts = [read, order[share[share < len(order)]], order[start.seen :]]
        return np.array([number for ids in parts for number in coverage.checksum(hashes[ids])], np.int64)

    @property
    def bad_images(self) -> int:
        """Images of the epoch under way, or the last one, that this rank found unreadable.

        The ranks share an epoch out, so that their sum counts each once; over more epochs they meet each other's.
        """
        return len(self._bad_of_epoch)

    def take_bad(self) -> list[tuple[str, str]]:
        """Path and reason of the files found unreadable since the last call; none is named twice."""
        new = list(self._bad.items())[self._told :]
        self._told += len(new)
        return new

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the cursor to the end of its epoch. The cursor stands behind the update handed out last."""
        size_px = self.cfg.size_at(self.cursor.epoch, self.epochs) if self.training else self.cfg.validation_px
        deal = self._deal_of(self.cursor.epoch)
        kept = self._pipeline if (size_px, deal.rows) == (self._size_px, self._deal.rows) else None
        pipeline = kept or self._build(self._next_inputs, deal.rows, size_px)
        # Kept only once this epoch is read to its end: what an abandoned pipeline has in flight cannot be taken back.
        self._pipeline, self._size_px, self._deal = None, size_px, deal
        self._in_flight.clear()
        self._started, self._read_of_epoch, self._bad_of_epoch = self.cursor, [], set()
        self._ahead = self._read_ahead(self.cursor)
        device = self.rank_info.device
        stream = [torch.cuda.current_stream(device)] if device.type == "cuda" else []
        while True:
            try:
                images = _tensor(*pipeline.run(*stream))
            except StopIteration:
                break
            except RuntimeError as error:
                if not _damaged(error):
                    raise
                images = self._mend(self._in_flight[0], size_px)
            rows = self._in_flight.popleft()
            self.cursor = rows.cursor
            self._read_of_epoch.append(rows.ids[: rows.num_real])
            labels, targets = torch.from_numpy(rows.labels).to(device, non_blocking=True), None
            if self._mixes:
                mixing = mix.draw(self.seed, rows.cursor.epoch, rows.update, self.cfg.augment)
                images, labels, targets = mix.mix(images, labels, len(self.catalog.classes), mixing)
            yield Batch(
                # [B, H, W, 3] seen as [B, 3, H, W]: the same memory, which is what channels-last means.
                images=images.permute(0, 3, 1, 2),
                labels=labels,
                ids=torch.from_numpy(rows.ids),
                num_real=rows.num_real,
                total=rows.total,
                targets=targets,
            )
        pipeline.reset()
        self._pipeline = pipeline

    def _deal_of(self, epoch: int) -> _Deal:
        return self._deals[self.cfg.batch_at(epoch, self.epochs) if self.training else self.cfg.batches[-1]]

    def _deal_out(self, batch: int) -> _Deal:
        """Share updates of so many images among ranks and micro-batches. Raises `UserError`."""
        world = self.rank_info.world
        shares, turn = world * self.micro_batches, 2 if self._mixes else 1
        if self.training and batch % (shares * turn):
            how = " in pairs, as mixup and cutmix need" if self._mixes else ""
            raise UserError(
                f"data.batch: {batch} images cannot be shared{how} by {world} ranks x {self.micro_batches} micro-batches; "
                f"choose a multiple of {shares * turn}"
            )
        rows = -(-batch // shares)
        places = np.arange(rows * world).reshape(-1, world, turn)[:, self.rank_info.rank].ravel()
        return _Deal(rows, rows * shares, places)

    def _build(self, source: Callable[[], _Inputs], batch: int, size_px: int) -> Pipeline:
        device = self.rank_info.device
        return graph.build_graph(
            source,
            batch=batch,
            size_px=size_px,
            rotate=self._rotate,
            operators=self._operators,
            gpu=(device.index or 0) if device.type == "cuda" else None,
            threads=self.cfg.threads or self.rank_info.cores,
            cfg=self.cfg,
        )

    def _mend(self, rows: HostBatch, size_px: int) -> torch.Tensor:
        """The images of a batch that DALI gave up, one by one; the damaged ones are black and do not count."""
        singles = iter([tuple([value] for value in row) for row in zip(*rows.inputs, strict=True)])
        pipeline = self._build(lambda: next(singles), 1, size_px)
        images = []
        for row, sample in enumerate(rows.ids):
            try:
                images.append(_tensor(*pipeline.run()))
            except RuntimeError as error:
                if not _damaged(error):
                    raise
                images.append(torch.zeros(1, size_px, size_px, 3, dtype=torch.uint8, device=self.rank_info.device))
                rows.labels[row] = IGNORE_LABEL
                self._note_bad(int(sample), "its image data are damaged")
        return torch.cat(images)

    def _next_inputs(self) -> _Inputs:
        """DALI's source. The rows stay in flight, and so their bytes alive, until DALI has handed out the images."""
        rows = next(self._ahead)  # its StopIteration ends the epoch for DALI too
        self._in_flight.append(rows)
        return rows.inputs

    def _read_ahead(self, start: Cursor) -> Iterator[HostBatch]:
        """This rank's micro-batches from `start` to the end of the epoch, read by a few threads before they are needed."""
        count, deal = len(self.catalog), self._deal
        order = self._order_of(start.epoch).result()
        micro_batches = (
            _MicroBatch(
                start.epoch, first + micro * deal.rows * self.rank_info.world, first, min(first + deal.update, count)
            )
            for first in range(start.seen, count, deal.update)
            for micro in range(self.micro_batches)
        )
        pending: deque[Future[HostBatch]] = deque()
        for number, micro_batch in enumerate(micro_batches):
            pending.append(self._pool.submit(self._fetch, micro_batch, deal, order))
            if len(pending) > self._reading:
                if number > 2 * graph.PREFETCH and not pending[0].done():
                    self._reading = min(self._reading + 1, _READERS)  # storage is slow here
                yield self._awaited(pending.popleft())
        # Of a million images both take a while: the training must not wait for them, nor its first batch.
        if self.training:
            self._order_of(start.epoch + 1)
            self._hashes_of_samples()
        while pending:
            yield self._awaited(pending.popleft())

    def _awaited(self, rows: Future[HostBatch]) -> HostBatch:
        """The rows, however long they take; what they wait for is said again and again."""
        waited_s = 0.0
        while wait([rows], _PATIENCE_S).not_done:
            waited_s += _PATIENCE_S
            files = [f"{self.catalog.root}/{self.catalog.paths[sample]}" for sample in list(self._being_read)]
            print(
                f"rank {self.rank_info.rank} has waited {waited_s:g} s for {', '.join(files[:3])}"
                f"{' and others' * (len(files) > 3)}; storage does not answer",
                file=sys.stderr,
                flush=True,
            )
        return rows.result()

    def _order_of(self, epoch: int) -> Future[NDArray[np.int64]]:
        """The order of an epoch, drawn in another thread from the first call on; the one before it is kept."""
        if epoch not in self._orders:
            self._orders = {epoch - 1: self._orders[epoch - 1]} if epoch - 1 in self._orders else {}
            self._orders[epoch] = self._pool.submit(self._draw_order, epoch)
        return self._orders[epoch]

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        count = len(self.catalog)
        return sampling.order(self.seed, epoch, count, self.cfg.augment.repeats) if self.training else np.arange(count)

    def _hashes_of_samples(self) -> Future[NDArray[np.int64]]:
        """The hash of every sample, found in another thread from the first call on."""
        if self._sample_hashes is None:
            self._sample_hashes = self._pool.submit(coverage.sample_hashes, self.catalog.paths)
        return self._sample_hashes

    def _fetch(self, micro: _MicroBatch, deal: _Deal, order: NDArray[np.int64]) -> HostBatch:
        positions = micro.start + deal.places
        ids = order[positions % len(order)]
        labels = np.where(positions < micro.end, self.catalog.labels[ids], IGNORE_LABEL)
        sizes = np.empty((deal.rows, 2), np.int32)
        encoded = []
        for row, sample in enumerate(ids):
            image = self._read(int(sample))
            if image is None:
                labels[row] = IGNORE_LABEL
            data, sizes[row] = image or _BLANK
            encoded.append(np.frombuffer(data, np.uint8))
        if self.training:
            u = sampling.uniforms(self.seed, micro.epoch, positions)
            geometry = sampling.training_geometry(u, sizes, self.cfg.augment)
        else:
            geometry = sampling.centre_geometry(sizes, self.cfg.validation_px, self.cfg.eval_crop)
        inputs = [np.ascontiguousarray(geometry.roi[:, :2]), np.ascontiguousarray(geometry.roi[:, 2:])]
        if self._rotate:
            inputs.append(geometry.angle_deg)
        if self._operators:
            u = sampling.uniforms(self.seed, micro.epoch, positions, sampling.LOOK)
            inputs += [operator.draw(u, self._size_px) for operator in self._operators]
        return HostBatch(
            inputs=(encoded, *inputs),
            labels=labels,
            ids=ids,
            num_real=int((positions < micro.end).sum()),
            total=micro.end - micro.update,
            update=micro.update,
            cursor=Cursor(micro.epoch, micro.end),
        )

    def _read(self, sample: int) -> tuple[bytes, Size] | None:
        """The bytes of a sample and its size, or None where they cannot be decoded; `take_bad` then names it."""
        self._being_read.add(sample)
        try:
            data = self.catalog.read(sample)
            return data, inspect(data)
        except OSError as error:
            why = error.strerror or type(error).__name__
        except BadImage as error:
            why = str(error)
        finally:
            self._being_read.discard(sample)
        self._note_bad(sample, why)
        return None

    def _note_bad(self, sample: int, why: str) -> None:
        self._bad.setdefault(self.catalog.paths[sample], why)
        self._bad_of_epoch.add(sample)


def _tensor(output: Any) -> torch.Tensor:
    """DALI's output as a tensor in the same memory."""
    return torch.from_dlpack(output.as_tensor())


def _damaged(error: RuntimeError) -> bool:
    """Whether DALI stumbled over an image, and not over anything else."""
    return "Failed to decode sample" in str(error)


def _blank() -> tuple[bytes, Size]:
    """A grey image for the row of one that cannot be read."""
    size, stream = Size(16, 16), io.BytesIO()
    Image.new("RGB", size, (128, 128, 128)).save(stream, "JPEG")
    return stream.getvalue(), size


_BLANK = _blank()
