"""Items about decoding and augmenting: pixels are right on the device that decodes here, and damage stays where it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import IGNORE_LABEL, Batch, Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.image_headers import BadImage
from data_pipeline.sources.pil_decode import as_rgb, decode
from trainer.check.images import KINDS, broken_files, flipped, picture
from trainer.check.items.common import small_dataset
from trainer.check.results import Found
from trainer.distributed import DistContext, open_dist_context

DECODERS_DIFFER = 3.0
"""Mean difference of pixels, of 255, that two decoders may have: they round, and scale chroma, each in its way."""
KERNELS_DIFFER = 2.0
"""Mean difference of pixels, of 255, that augmentations of the same pixels may have on a GPU and a CPU."""


def decode_kinds() -> Found:
    """Compare files at their own size, so that nothing is resized, with Pillow's pixels; on a GPU with a CPU's too."""
    worst = {"Pillow": ("", 0.0)}
    with one_of_each_kind() as folder, open_dist_context() as ctx:
        cfg = DataConfig(path=str(folder), batch=4, size_px=96, eval_crop=1.0, val_share=0.5)
        catalog = open_catalog(cfg, "train")
        ours = pixels(cfg, ctx, training=False).cpu()
        theirs = [np.asarray(as_rgb(decode(catalog.read(row)))) for row in range(len(catalog))]
        others = {"Pillow": torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2)}
        if ctx.device.type == "cuda":
            others["the CPU"] = pixels(cfg, on_cpu(ctx), training=False)
        for name, other in others.items():
            differences = (ours.float() - other.float()).abs().mean(dim=(1, 2, 3))
            worst[name] = (Path(catalog.paths[int(differences.argmax())]).stem, float(differences.max()))
            kind, difference = worst[name]
            assert difference < DECODERS_DIFFER, f"{kind} differs from {name} by {difference:.2f} of 255 on average"
    told = (f"from {name} at most {value:.2f} of 255 ({kind})" for name, (kind, value) in worst.items())
    return Found(f"{len(KINDS)} kinds; mean difference {', '.join(told)}")


WHOLE = AugmentConfig(min_area=1.0, max_ratio=1.0)
"""The whole of a square image, flipped or not."""
AUGMENTS = {
    "crop": AugmentConfig(),
    "randaugment": AugmentConfig(policy="randaugment"),
    "trivialaugment": AugmentConfig(policy="trivialaugment"),
    "autoaugment": AugmentConfig(policy="autoaugment"),
    "3-augment": AugmentConfig(policy="threeaugment"),
    "simple crop": AugmentConfig(crop="simple"),
    "jitter": AugmentConfig(color_jitter=(0.4, 0.4, 0.4, 0.1)),
    "rotation": AugmentConfig(rotate_deg=20),
    "erasing": AugmentConfig(erase=1.0),
    "colout": AugmentConfig(colout=0.1),
    "mixup": AugmentConfig(mixup=0.2),
    "cutmix": AugmentConfig(cutmix=1.0),
}


def augment() -> Found:
    """Compare two pipelines: on a GPU one there and one on the CPU, else one of a single thread."""
    told = []
    with small_dataset(16, kind="rgb.png") as folder, open_dist_context() as ctx:
        for name, chosen in AUGMENTS.items():
            # All but the crop change the same pixels on both, as PNG is exact and the whole image is of the right size.
            whole = replace(chosen, min_area=1.0, max_ratio=1.0) if name != "crop" else chosen
            cfg = DataConfig(path=str(folder), batch=8, size_px=96, augment=whole)
            ours, again = pixels(cfg, ctx), pixels(replace(cfg, threads=1), ctx)
            assert torch.equal(ours, again), f"{name} gives other pixels the second time"
            plain = pixels(replace(cfg, augment=WHOLE), ctx)
            assert name == "crop" or not torch.equal(ours, plain), f"{name} changes nothing"
            if ctx.device.type == "cuda":
                difference = float((ours.cpu().float() - pixels(cfg, on_cpu(ctx)).float()).abs().mean())
                told.append(f"{name} {difference:.2f}")
                assert difference < KERNELS_DIFFER, f"{name} differs from the CPU's by {difference:.2f} of 255"
    return Found(f"GPU from CPU, mean of 255: {', '.join(told)}" if told else f"{len(AUGMENTS)} repeat to the bit")


FLIPS = 24


def damaged_files() -> Found:
    """Damage files after the scan, as in mid-run: broken ones of every kind, and JPEGs with one flipped bit."""
    broken = broken_files()
    with small_dataset(64) as folder, open_dist_context() as ctx:
        cfg = DataConfig(path=str(folder), batch=8, size_px=64)
        catalog = open_catalog(cfg, "train")
        before = pixels(cfg, ctx, training=False)
        # Two rows in three of the first batches are damaged, none of the last ones.
        contents = list(broken.values())
        damaged = [row for row in range(len(catalog)) if row % 3 < 2][: len(contents) + FLIPS]
        flips = flipped_jpegs(catalog, damaged[len(contents) :])
        for row, content in zip(damaged, [*contents, *flips.values()], strict=True):
            (folder / "train" / catalog.paths[row]).write_bytes(content)
        refused = {*damaged[: len(contents)], *(row for row, content in flips.items() if is_refused(content))}
        ours, labels, named = load_all(cfg, catalog, ctx)
    unnamed = sorted(refused - named)
    assert not unnamed, f"{len(unnamed)} damaged files are not named, row {unnamed[0]} first"
    assert named <= set(damaged), "a file that is whole is named"
    ignored = {row for row, label in enumerate(labels.tolist()) if label == IGNORE_LABEL}
    assert ignored == named, "the rows that do not count are not those that are named"
    whole = [row for row in range(len(labels)) if row not in damaged]
    following = [row for row in whole if row >= 8 * (damaged[-1] // 8 + 1)]
    assert following and torch.equal(ours[following], before[following]), "batches behind damaged ones are others"
    # Beside damage an image is decoded by itself, for which a GPU may choose another of its decoders.
    difference = float((ours[whole].float() - before[whole].float()).abs().mean())
    assert difference == 0 or (ctx.device.type == "cuda" and difference < DECODERS_DIFFER), "rows beside damage differ"
    flipped_named = len(named & set(flips))
    return Found(
        f"{len(broken)} broken kinds named; of {FLIPS} flipped bits {flipped_named} named, "
        f"{FLIPS - flipped_named} decode to other pixels; {len(whole)} rows beside and behind them are right"
    )


def flipped_jpegs(catalog: Catalog, rows: list[int]) -> dict[int, bytes]:
    """Flip a bit of each row's JPEG: in one after the other further behind, headers and tables included."""
    return {
        row: flipped(data, 2 + number * (len(data) - 4) // len(rows))
        for number, row in enumerate(rows)
        for data in [catalog.read(row)]
    }


def is_refused(data: bytes) -> bool:
    """Return True where Pillow finds damage too."""
    try:
        decode(data)
    except BadImage:
        return True
    return False


@contextmanager
def one_of_each_kind() -> Iterator[Path]:
    """Make a folder of two classes, each with a file of each kind, 96 px a side."""
    with TemporaryDirectory(prefix="sluice-check-") as name:
        for number, (kind, encode) in enumerate(KINDS.items()):
            content = encode(picture(number, 96))
            for label in ("all", "again"):
                path = Path(name) / "train" / label / kind
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        yield Path(name)


def on_cpu(ctx: DistContext) -> DistContext:
    return replace(ctx, device=torch.device("cpu"))


def pixels(cfg: DataConfig, ctx: DistContext, *, training: bool = True) -> torch.Tensor:
    """Load [N, 3, H, W] all images of the first epoch for one rank, in their order."""
    batches = copies(Loader(cfg, open_catalog(cfg, "train"), ctx, training=training))
    return torch.cat([batch.images[: batch.num_real] for batch in batches])


def load_all(cfg: DataConfig, catalog: Catalog, ctx: DistContext) -> tuple[torch.Tensor, torch.Tensor, set[int]]:
    """Load images and labels of all rows in their order, and the rows of the files that are named as bad."""
    loader = Loader(cfg, catalog, ctx, training=False)
    batches = copies(loader)
    rows = {path: row for row, path in enumerate(catalog.paths)}
    named = {rows[path] for path, _ in loader.take_bad()}
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches]), named


def copies(loader: Loader) -> list[Batch]:
    """Take all batches of an epoch, each a copy that owns its memory."""
    return [batch._replace(images=batch.images.clone()) for batch in loader]
