"""Items about the loader: batches stay as they are, follow from their position alone, and come fast."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]

from data_pipeline.bench.peers import bare_decoder
from data_pipeline.config import DataConfig
from data_pipeline.loader import Cursor, Loader
from data_pipeline.sources.catalog import open_catalog
from trainer.check.items import common
from trainer.check.items.common import rate, small_dataset, synchronize
from trainer.check.items.decoding import copies, pixels
from trainer.check.results import Found
from trainer.distributed import DistContext, open_dist_context

HELD = 6


def held_batches() -> Found:
    """Hold batches while the device is busy and more are read; and read others late, when their memory may be in use again."""
    with small_dataset() as folder, open_dist_context() as ctx:
        cfg = DataConfig(path=str(folder), batch=4, size_px=64)
        catalog = open_catalog(cfg, "train")
        right = [batch.images for batch in copies(Loader(cfg, catalog, ctx, training=False))]
        synchronize(ctx)

        held = []
        for batch in Loader(cfg, catalog, ctx, training=False):
            keep_busy(ctx)
            held.append(batch.images)
            if len(held) == HELD:
                break
        synchronize(ctx)
        changed = [number for number, images in enumerate(held) if not torch.equal(images, right[number])]
        assert not changed, f"batch {changed[0]} changed while it was held"

        sums = []
        for batch in Loader(cfg, catalog, ctx, training=False):
            keep_busy(ctx)
            sums.append(batch.images.long().sum())  # behind the work above, when the batch has been let go
        late = [number for number, total in enumerate(sums) if total != right[number].long().sum()]
        assert not late, f"batch {late[0]} changed before the device had read it"
    return Found(f"{HELD} held, {len(sums)} read late")


def keep_busy(ctx: DistContext) -> None:
    """Give the device work for some milliseconds, for which nothing waits on a GPU."""
    side, repeats = (4096, 10) if ctx.device.type == "cuda" else (256, 4)
    values = torch.ones(side, side, device=ctx.device)
    for _ in range(repeats):
        values = values @ values / side


def worlds() -> Found:
    """On a GPU with a decoder for JPEG, the share that it gets decides which images it decodes: only with 0 is it none."""
    told = []
    with small_dataset() as folder, open_dist_context() as ctx:
        for share in (0.0, 0.75, 1.0):
            cfg = DataConfig(path=str(folder), batch=8, size_px=64, hw_decoder_load=share)
            alone = pixels(cfg, ctx)
            ranks = [pixels(cfg, replace(ctx, rank=rank, world=2)) for rank in range(2)]
            together = torch.stack(ranks, dim=1).flatten(0, 1)  # two ranks take turns, image by image
            difference = float((alone.float() - together.float()).abs().mean())
            may_differ = ctx.device.type == "cuda" and share > 0
            assert may_differ or difference == 0, f"pixels differ by {difference:.4f} of 255 at a share of {share:g}"
            told.append(f"{share:g}: {'the same bits' if difference == 0 else f'{difference:.4f} of 255 apart'}")
    return Found(f"one rank and two, by the hardware decoder's share: {', '.join(told)}")


def loader_speed() -> Found:
    figures: dict[str, float] = {}
    count = common.SCALE.images
    with small_dataset(count, 256) as folder, open_dist_context() as ctx:
        for size_px in (224, 160):
            cfg = DataConfig(path=str(folder), batch=min(count // 4, 256), size_px=size_px)
            loader = Loader(cfg, open_catalog(cfg, "train"), ctx, training=True, epochs=1 << 20)
            read_epoch = partial(read, loader, iter(range(1 << 20)))
            read_epoch()
            figures[f"loader at {size_px} px, images/s"] = rate(read_epoch, ctx)
        figures |= bare_decoding(folder, ctx)
    told = ", ".join(f"{name.removesuffix(', images/s')} {value:.0f}" for name, value in figures.items())
    return Found(f"images/s: {told}", figures)


def read(loader: Loader, epochs: Iterator[int]) -> float:
    """Read the next of the epochs; returns its number of images."""
    loader.seek(Cursor(next(epochs)))
    return float(sum(batch.num_real for batch in loader))


def bare_decoding(folder: Path, ctx: DistContext) -> dict[str, float]:
    """Measure decoding alone: by one core, and on a GPU by nvJPEG through torchvision, where it has that."""
    files = sorted(folder.glob("train/*/*.jpg"))
    streams = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files]
    decode, few = bare_decoder(), streams[:512]

    def by_one_core() -> float:
        return float(sum(decode(stream) for stream in few))

    def on_gpu() -> float:
        for at in range(0, len(streams), 256):
            decode_jpeg(streams[at : at + 256], ImageReadMode.RGB, device=ctx.device)
        return float(len(streams))

    figures = {"bare decoding by one core, images/s": rate(by_one_core, ctx, rounds=1)}
    if ctx.device.type == "cuda":
        try:
            on_gpu()
        except RuntimeError:  # torchvision may be built without nvJPEG
            return figures
        figures["bare decoding by nvJPEG, images/s"] = rate(on_gpu, ctx)
    return figures
