"""One rank's share of a split as batches in device memory, from any position, the same at any number of ranks.

Which images a rank reads follows from their positions in the order of an epoch (see `sharding`), and how each is cropped
and changed from its position alone (see `sampling`), so continuing is computing, not replaying. On its way a batch is read
from storage by background threads (see `read_ahead`), decoded and augmented by DALI (see `dali.graph`), and mixed on the
device (see `mixing`).
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline import coverage, mixing, sampling
from data_pipeline.batch import IGNORE_LABEL, Batch, Places, on_device
from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.cursor import Cursor
from data_pipeline.dali import graph
from data_pipeline.host_batch import Fetcher, HostBatch
from data_pipeline.read_ahead import ReadAhead
from data_pipeline.sharding import (
    BatchSharding,
    MicroBatch,
    RankInfo,
    check_batch,
    micro_batches,
    positions_of_rank,
    shard_batch,
    steps_per_epoch,
)
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.storage.lookahead import Lookahead
from data_pipeline.summary import check_shards


class Loader:
    """Batches of one split for one rank.

    Training reads every sample once an epoch, or as often as `cfg.balance` says, in a fresh order. Validation
    (`training=False`) reads the catalog in its own order with a centre crop. Where the images run out, batches are filled
    up with repeated rows that do not count, so that all ranks take the same number of steps and all shapes stay the same.

    Without a `catalog` it is that of `cfg.path`. `epochs` is the length of the run, over which `cfg.size_px` and
    `cfg.batch` may change. Raises `UserError` for options that do not fit the data, the device or the ranks.
    """

    def __init__(
        self,
        cfg: DataConfig,
        catalog: Catalog | None = None,
        rank_info: RankInfo | None = None,
        *,
        training: bool = True,
        seed: int = 0,
        epochs: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.cfg, self.rank_info = cfg, rank_info or RankInfo()
        graph.check_decode(cfg, on_gpu=self.rank_info.device.type == "cuda")
        self.catalog = open_catalog(cfg, "train" if training else "val") if catalog is None else catalog
        self.training, self.seed, self.epochs = training, seed, epochs
        self.micro_batches = accumulate if training else 1
        self.cursor = Cursor()
        if training and cfg.shuffle_shards:
            check_shards(self.catalog, cfg.shuffle_shards)
        require(
            not (training and self.catalog.multi_label and cfg.balance != "none"),
            f"data.balance: {cfg.balance} goes by the one class of an image, and these have several; leave it out, or weigh rare "
            "ones by --optim.class_weights balanced",
        )
        self._pairs = training and cfg.augment.mixes
        # All of them now, so that a batch which the ranks cannot share is refused before the first epoch.
        self._shardings = {batch: self._shard(batch) for batch in cfg.batches}
        self._reader = ReadAhead(self.catalog, self.rank_info.rank)
        self._fetcher = Fetcher(self.catalog, cfg, self._reader.read, training=training, seed=seed)
        self._orders: dict[int, Future[NDArray[np.int64]]] = {}
        self._sample_hashes: Future[NDArray[np.int64]] | None = None
        self._bad: dict[str, str] = {}
        self._reported = 0
        self._epoch: _Epoch | None = None
        self._idle: graph.ImagePipeline | None = None  # of the last epoch that was read to its end

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimizer steps of a whole epoch; for validation, batches."""
        return steps_per_epoch(self._sharding_of(epoch), len(self.catalog))

    def shapes(self) -> list[tuple[int, int]]:
        """Rows and size in pixels of all micro-batches of the run, each once."""
        epochs = range(self.epochs if self.training else 1)
        return list(dict.fromkeys((self._sharding_of(epoch).rows, self._size_of(epoch)) for epoch in epochs))

    def seek(self, cursor: Cursor) -> None:
        """Let the next iteration start at `cursor`; takes no time, wherever that is."""
        self.cursor = cursor

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the cursor to the end of its epoch. The cursor stands behind the step handed out last.

        A loader has one cursor: once the first batch is taken, the iteration before this one raises RuntimeError.
        """
        # Two iterations would take turns in one queue, and each would lack what the other one got.
        if self._epoch:
            self._epoch.end()
        self._epoch = epoch = _Epoch(self, self.cursor)
        yield from epoch

    def coverage_sums(self) -> coverage.CoverageSums:
        """Counts and checksums of what this rank has read since the last iteration began, of what it should read to the epoch's
        end, and of what all ranks should.
        """
        assert self._epoch, "nothing has been read"
        start, order = self._epoch.start, self._epoch.order
        hashes = self._hashes_of_samples().result()
        share = positions_of_rank(self._epoch.sharding, start.seen, len(order))
        parts = [self._epoch.read_ids(), order[share], order[start.seen :]]
        return np.array([number for ids in parts for number in coverage.checksum(hashes[ids])], np.int64)

    @property
    def bad_images(self) -> int:
        """Images of the epoch under way, or the last one, that this rank found unreadable.

        The ranks share an epoch out, so that their sum counts each once; over more epochs they meet each other's.
        """
        return len(self._epoch.bad) if self._epoch else 0

    def take_bad(self) -> list[tuple[str, str]]:
        """Path and reason of the files found unreadable since the last call; none is named twice."""
        new = list(self._bad.items())[self._reported :]
        self._reported += len(new)
        return new

    def _sharding_of(self, epoch: int) -> BatchSharding:
        return self._shardings[self.cfg.batch_at(epoch, self.epochs) if self.training else self.cfg.batches[-1]]

    def _shard(self, batch: int) -> BatchSharding:
        rank, world = self.rank_info.rank, self.rank_info.world
        if self.training:
            check_batch(batch, world, self.micro_batches, pairs=self._pairs)
        return shard_batch(batch, rank, world, micro_batches=self.micro_batches, pairs=self._pairs)

    def _size_of(self, epoch: int) -> int:
        return self.cfg.size_at(epoch, self.epochs) if self.training else self.cfg.validation_px

    def _order_of(self, epoch: int) -> Future[NDArray[np.int64]]:
        """The order of an epoch, drawn in another thread from the first call on; the one before it is kept."""
        if epoch not in self._orders:
            self._orders = {epoch - 1: self._orders[epoch - 1]} if epoch - 1 in self._orders else {}
            self._orders[epoch] = self._reader.in_background(self._draw_order, epoch)
        return self._orders[epoch]

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        if not self.training:
            return np.arange(len(self.catalog))
        cfg, labels = self.cfg, self.catalog.labels
        shards = self.catalog.spans[:, 0] if cfg.shuffle_shards else None
        return sampling.epoch_order(
            self.seed, epoch, labels, cfg.augment.repeats, cfg.balance, shards, cfg.shuffle_shards
        )

    def _hashes_of_samples(self) -> Future[NDArray[np.int64]]:
        """The hash of every sample, found in another thread from the first call on."""
        if self._sample_hashes is None:
            self._sample_hashes = self._reader.in_background(coverage.sample_hashes, self.catalog.paths)
        return self._sample_hashes

    def _prepare(self, epoch: int) -> None:
        """Begin what the end of this epoch and the next one need: of a million images it takes a while."""
        if self.training:
            self._order_of(epoch + 1)
            self._hashes_of_samples()

    def _take_pipeline(self, rows: int, size_px: int) -> graph.ImagePipeline:
        """The pipeline that an epoch left behind, if it fits, or a new one."""
        idle, self._idle = self._idle, None
        if idle and idle.shape == (rows, size_px):
            return idle
        del idle  # before memory for another one is taken
        return self._build(rows, size_px)

    def _build(self, rows: int, size_px: int) -> graph.ImagePipeline:
        return graph.ImagePipeline(
            batch=rows,
            size_px=size_px,
            shift=self._fetcher.shifts,
            rotate=self._fetcher.rotates,
            operators=self._fetcher.operators,
            device=self.rank_info.device,
            threads=self.cfg.threads or self.rank_info.cores,
            cfg=self.cfg,
        )


class _Epoch(Iterator[Batch]):
    """Batches of one rank from `start` to the end of its epoch; owns pipeline, queue and bad images."""

    def __init__(self, loader: Loader, start: Cursor) -> None:
        self._loader, self.start = loader, start
        # Everything that the position decides: the share of this rank, the order, the size of the images.
        self.sharding = loader._sharding_of(start.epoch)
        self.order = loader._order_of(start.epoch).result()
        self.bad: set[int] = set()
        self._size_px = loader._size_of(start.epoch)
        self._mixes = loader.training and loader.cfg.augment.mixes_in(start.epoch, loader.epochs)
        # What has been handed out, and what DALI still works on.
        self._read: list[NDArray[np.int64]] = []
        self._in_flight: deque[HostBatch] = deque()
        self._finished = False
        # Reading and decoding begin now, ahead of the first batch.
        self._lookahead = loader._reader.in_background(self._look_ahead)
        self._pipeline: graph.ImagePipeline | None = loader._take_pipeline(self.sharding.rows, self._size_px)
        self._pipeline.feed(self._inputs())

    def __next__(self) -> Batch:
        if self._finished:
            raise StopIteration
        if not self._pipeline:
            raise RuntimeError("another iteration of this Loader has begun; two at a time need a Loader each")
        try:
            images = self._decoded(self._pipeline)
        except StopIteration:
            self._finish()
            raise
        # DALI hands batches out in the order in which it was fed.
        host_batch = self._in_flight.popleft()
        return self._hand_out(images, host_batch)

    def end(self) -> None:
        """Give up unread batches; those in flight in a pipeline cannot be taken back, so it is dropped too."""
        self._pipeline = None

    def read_ids(self) -> NDArray[np.int64]:
        """[N] samples of the batches handed out so far, without padding."""
        return np.concatenate([np.empty(0, np.int64), *self._read])

    def _decoded(self, pipeline: graph.ImagePipeline) -> torch.Tensor:
        """Decode the next batch; of huge images DALI decodes a few at a time."""
        parts: list[torch.Tensor] = []
        damaged = False
        while not parts or len(parts) < len(self._in_flight[0].inputs):
            try:
                parts.append(pipeline.run())
            except graph.DamagedImage:
                damaged = True
                parts.append(torch.empty(0))
            if len(self._in_flight[0].inputs) > 1:
                parts[-1] = parts[-1].clone()  # the next part may take its memory
        if damaged:
            return self._mend(self._in_flight[0])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _finish(self) -> None:
        assert self._pipeline
        self._loader._idle = self._pipeline
        self._finished, self._pipeline = True, None

    def _hand_out(self, images: torch.Tensor, host_batch: HostBatch) -> Batch:
        """Make the batch of `images` [B, H, W, 3] uint8, mixed if the options ask for it."""
        loader, micro_batch = self._loader, host_batch.micro_batch

        # Record which images have been read now, and which could not be.
        loader.cursor = Cursor(self.start.epoch, micro_batch.end)
        self._read.append(host_batch.real_ids)
        for sample, why in host_batch.bad.items():
            # One that comes again in the epoch counts where it came first, so on one rank.
            if self.start.seen + int((self.order[self.start.seen :] == sample).argmax()) in micro_batch.positions:
                self.bad.add(sample)
            loader._bad.setdefault(loader.catalog.paths[sample], why)

        # Leave rows and columns out, on the device and the same in the whole step.
        if loader.training and loader.cfg.augment.colout:
            side_px = loader.cfg.augment.seen_px(self._size_px)
            images = mixing.thin_out(images, loader.seed, self.start.epoch, micro_batch.start, side_px)

        # Look up several classes. Mix on the device, with one draw for the whole step on all ranks.
        device, catalog = images.device, loader.catalog
        labels, targets = on_device(host_batch.labels, device), None
        drawn = None
        if self._mixes:
            drawn = mixing.draw(loader.seed, self.start.epoch, micro_batch.start, loader.cfg.augment)
        if drawn or catalog.multi_label:
            targets = on_device(catalog.targets_of(host_batch.labels), device)
        if drawn and targets is not None:
            images, labels, targets = mixing.mix(images, labels, targets, drawn)

        return Batch(
            # [B, H, W, 3] seen as [B, 3, H, W] is the same memory: channels-last.
            images=images.permute(0, 3, 1, 2),
            labels=labels,
            ids=torch.from_numpy(host_batch.ids),
            num_real=micro_batch.num_real,
            total=micro_batch.end - micro_batch.start,
            targets=targets,
            places=Places(loader.seed, self.start.epoch, micro_batch.positions) if loader.training else None,
            multi_label=catalog.multi_label,
        )

    def _inputs(self) -> Iterator[graph.Inputs]:
        """Yield DALI's inputs. Their batches stay in flight, and so their bytes alive, until DALI has handed out the images."""

        def fetch(micro_batch: MicroBatch) -> HostBatch:
            ahead = self._lookahead.result() if self._lookahead.done() else None
            if ahead:
                ahead.reach(micro_batch.start)
            return self._loader._fetcher.fetch(micro_batch, self.start.epoch, self.order, self._size_px)

        for host_batch in self._loader._reader.fetched(fetch, self._micro_batches()):
            self._in_flight.append(host_batch)
            yield from host_batch.inputs

    def _look_ahead(self) -> Lookahead | None:
        positions = positions_of_rank(self.sharding, self.start.seen, len(self.order))
        return self._loader.catalog.look_ahead(self.order[positions], positions)

    def _micro_batches(self) -> Iterator[MicroBatch]:
        yield from micro_batches(self.sharding, self.start.seen, len(self.order))
        self._loader._prepare(self.start.epoch)  # now the last batch is under way, and does not wait for this

    def _mend(self, host_batch: HostBatch) -> torch.Tensor:
        """Decode one by one the images of a batch that DALI gave up; damaged ones are black and do not count."""
        # A pipeline for single images, as DALI does not tell which image of a batch is damaged.
        pipeline = self._loader._build(1, self._size_px)
        pipeline.feed(
            tuple([values[row]] for values in inputs) for inputs in host_batch.inputs for row in range(len(inputs[0]))
        )
        images = []
        for row, sample in enumerate(host_batch.ids.tolist()):
            try:
                images.append(pipeline.run())
            except graph.DamagedImage:
                shape, device = (1, self._size_px, self._size_px, 3), self._loader.rank_info.device
                images.append(torch.zeros(shape, dtype=torch.uint8, device=device))
                host_batch.labels[row] = IGNORE_LABEL
                host_batch.bad[sample] = "its image data are damaged"
        return torch.cat(images)
