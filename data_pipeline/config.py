"""Options of the data: its place, its splits, cropping and augmentation, batches."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from data_pipeline.common.address import is_address, parse_address
from data_pipeline.common.errors import require

T = TypeVar("T")

FREE = {"resume": "free"}
"""Metadata of an option, or of a section of options, that a resumed run may change."""


def free(default: T) -> T:
    """Make a field with this default that a resumed run may change, because it does not change the weights."""
    found: T = field(default=default, metadata=FREE)
    return found


Decode = Literal["auto", "gpu", "cpu"]
Labels = Literal["auto", "single", "multi"]
Balance = Literal["none", "sqrt", "uniform"]
Crop = Literal["resized", "simple"]
Policy = Literal["none", "randaugment", "trivialaugment", "autoaugment", "threeaugment"]


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to a training image. Every draw is a function of (seed, epoch, position), see `sampling`.

    They happen in this order: crop and flips, rotation, policy, colour jitter, erasing, ColOut, mixup or cutmix. A change that is
    off costs nothing.
    """

    crop: Crop = "resized"
    """Random crop: resized, a window of random area and ratio; or simple, a square out of the image whose short side is resized
    to data.size_px, with a rim of 4 pixels that mirrors it (Touvron et al. 2022, arXiv 2204.07118, section 3.2)."""
    min_area: float = 0.35
    """Smallest share of the image's area that a random crop keeps (Szegedy et al. 2014: 0.08; short runs need more)."""
    max_area: float = 1.0
    """Largest share of the image's area that a random crop keeps."""
    max_ratio: float = 4 / 3
    """Largest width:height ratio of a crop; the smallest is its inverse."""
    flip: float = 0.5
    """Chance of a horizontal flip."""
    vertical_flip: float = 0.0
    """Chance of a vertical flip."""
    rotate_deg: float = 0.0
    """Rotation by a uniform angle in ± this many degrees, corners filled with black; 0 turns it off."""
    policy: Policy = "none"
    """RandAugment (Cubuk et al. 2020), TrivialAugmentWide (Müller and Hutter 2021), AutoAugment's policy for ImageNet
    (Cubuk et al. 2019), or 3-Augment (Touvron et al. 2022): grey, solarised or blurred, each with the same chance."""
    randaugment_n: int = 2
    """Number of operations that RandAugment applies to an image, 1 to 4."""
    randaugment_m: int = 9
    """Magnitude of RandAugment's operations, 0 to 30; timm counts from 0 to 10."""
    randaugment_std: float = 0.0
    """Standard deviation of normal noise on that magnitude, new for each operation, as timm's mstd; 0 is off."""
    randaugment_chance: float = 1.0
    """Chance of each operation to be applied; timm's is 0.5."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strengths b, c, s, h as in torchvision: brightness, contrast and saturation are multiplied by a uniform factor in
    1 ± b, 1 ± c, 1 ± s (never below 0), and the hue is turned by a uniform share in ± h of the colour circle."""
    erase: float = 0.0
    """Chance that a random rectangle gets the colour data.mean (Zhong et al. 2017): .02 to .33 of the area, ratio .3 to 3.3."""
    colout: float = 0.0
    """Share of the rows and of the columns that each optimizer step leaves out of its images, others each time, so that the
    network sees smaller ones (Composer's ColOut). 0 is off."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018): blend images in pairs, and their labels, with a share from Beta(alpha, alpha)."""
    cutmix: float = 0.0
    """Alpha of cutmix (Yun et al. 2019): swap a rectangle between images in pairs; its share of the area is drawn from
    Beta(alpha, alpha). With mixup also on, each optimizer step uses one of the two."""
    mix_chance: float = 1.0
    """Chance that the images of an optimizer step are mixed at all, where mixup or cutmix is on."""
    cutmix_chance: float = 0.5
    """Chance that it is by cutmix, where both are on."""
    mix_until: float = 1.0
    """Share of the epochs, from 0 to 1, in which images are mixed: with 0.9 those of the last tenth stay as they are."""
    repeats: int = 1
    """Number of times that an image stands in the order, each time augmented anew (Hoffer et al. 2020). An epoch keeps its
    length: it reads 1 of `repeats` images, and `repeats` epochs in a row read each image equally often."""

    def __post_init__(self) -> None:
        require(
            0 < self.min_area <= self.max_area <= 1,
            f"data.augment.min_area, max_area: {self.min_area}, {self.max_area} must satisfy 0 < min_area <= max_area <= 1",
        )
        require(
            1 <= self.max_ratio <= 100,
            f"data.augment.max_ratio: {self.max_ratio} is not from 1 to 100; give a ratio such as 1.333",
        )
        require(0 <= self.flip <= 1, f"data.augment.flip: {self.flip} is not a chance; give a number from 0 to 1")
        require(
            0 <= self.vertical_flip <= 1,
            f"data.augment.vertical_flip: {self.vertical_flip} is not a chance; give a number from 0 to 1",
        )
        require(
            0 <= self.rotate_deg <= 180,
            f"data.augment.rotate_deg: {self.rotate_deg} is out of range; give degrees from 0 to 180",
        )
        require(
            self.policy in get_args(Policy),
            f"data.augment.policy: {self.policy!r} is unknown; choose one of {', '.join(get_args(Policy))}",
        )
        require(
            1 <= self.randaugment_n <= 4,
            f"data.augment.randaugment_n: {self.randaugment_n} is out of range; give a number from 1 to 4",
        )
        require(
            0 <= self.randaugment_m <= 30,
            f"data.augment.randaugment_m: {self.randaugment_m} is out of range; give a number from 0 to 30",
        )
        jitter = self.color_jitter
        require(
            len(jitter) == 4 and min(jitter) >= 0 and jitter[3] <= 0.5,
            f"data.augment.color_jitter: {jitter} does not fit; give brightness, contrast, saturation from 0, hue from 0 to 0.5",
        )
        require(0 <= self.erase <= 1, f"data.augment.erase: {self.erase} is not a chance; give a number from 0 to 1")
        require(
            0 <= self.colout < 1, f"data.augment.colout: {self.colout} is no share; give a number from 0 to below 1"
        )
        require(
            self.mixup >= 0, f"data.augment.mixup: {self.mixup} is negative; give an alpha such as 0.2, or 0 for off"
        )
        require(
            self.cutmix >= 0, f"data.augment.cutmix: {self.cutmix} is negative; give an alpha such as 1, or 0 for off"
        )
        require(
            self.crop in get_args(Crop),
            f"data.augment.crop: {self.crop!r} is unknown; choose one of {', '.join(get_args(Crop))}",
        )
        require(
            0 <= self.randaugment_std <= 30,
            f"data.augment.randaugment_std: {self.randaugment_std} is out of range; give a number from 0 to 30",
        )
        for name in ("randaugment_chance", "mix_chance", "cutmix_chance", "mix_until"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.augment.{name}: {value} is out of range; give a number from 0 to 1")
        require(self.repeats >= 1, f"data.augment.repeats: {self.repeats} is below 1; give 1 for every image once")

    @property
    def mixes(self) -> bool:
        """True where images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    def seen_px(self, size_px: int) -> int:
        """Side of what the network sees of training images of `size_px`, of which ColOut may leave a part out."""
        return int((1 - self.colout) * size_px)

    def mixes_in(self, epoch: int, epochs: int) -> bool:
        """Return True where images are mixed in `epoch` (from 0) of a run of `epochs`."""
        return self.mixes and (self.mix_until == 1 or epoch < round(self.mix_until * epochs))


@dataclass(frozen=True)
class DataConfig:
    """Dataset, image size and batch size."""

    path: str = free("builtin")
    """Folder with train/CLASS/ and val/CLASS/ (or other usual names), or with CLASS/ folders only (see val_share); or *.tar
    shards in WebDataset layout in place of the CLASS/ folders; a pack; a CSV or Parquet table of images and labels, or a
    folder with one; ImageNet's tars, a zip file of class folders, or Parquet that holds its images. "builtin" is the built-in
    set; imagenette, cifar10, flowers102, oxford_pets and food101 are downloaded once, unless a file or folder of that name
    exists. Packs are also read from s3://bucket/folder, gs:// and https://, shards
    from the first two."""
    cache_gb: float = free(50.0)
    """Most GB on this machine's disk for what is read from such an address, shared by all runs; the least recently used makes
    room. 0 keeps nothing."""
    images: str | None = free(None)
    """Folder of the images that a table names; the table's own folder if not given, anywhere below it."""
    image_column: str | None = None
    """Column of a table with the images' names; suffixes may be missing. If not given: found by the files that exist."""
    label_column: str | None = None
    """Column of a table with the classes. If not given: found by its usual names, or the only column left."""
    labels: Labels = "auto"
    """Classes of an image in a table: single, one; multi, several or none, in columns of 0 and 1, or in one column as lists
    divided by |, ;, a comma or a space. auto takes several where nothing else is certain, and says so at the start."""
    split_column: str | None = None
    """Column of a table with train or val. If not given: one named "split" or alike, one whose cells all name splits, or a flag
    such as is_train; else the images' folders where these are splits; else val_share decides."""
    val_share: float = 0.1
    """Share of each class held out for validation where the data has no validation part: those whose paths have the
    smallest hashes, and at least one image of a class of two or more."""
    fold: str | None = None
    """Fold for validation in place of val_share, as 2/5: the second of five parts of each class, by the hashes of the paths.
    The same images are in one fold at any seed, and each in exactly one."""
    group: str | None = None
    """Images that val_share and fold must not divide between training and validation, as those of one patient or video: the
    column of a table that names it, or the level of the folder that holds them, 1 for those in the images' folder."""
    balance: Balance = "none"
    """Images that an epoch takes of each class: none takes all once; sqrt as many as the square root of their number asks
    for; uniform the same of every class. A small class's images then come several times, a large one's in turn, epoch by
    epoch; the epoch keeps its length."""
    on_error: Literal["skip", "fail"] = free("skip")
    """Reaction to an image that cannot be decoded: skip names it once and does not count it; fail ends the run."""
    max_bad_share: float = free(0.01)
    """Share of images that may be skipped; with more the run ends."""
    quarantine: str | None = None
    """List of files to leave out, as `python -m data_pipeline.verify --quarantine FILE` writes it: one path in a line,
    relative to data.path."""
    shuffle_shards: int = 0
    """Number of shards whose images are mixed at a time, the shards in random order: for sets that are larger than the cache.
    0 mixes all images of an epoch."""
    batch: int | list[int] = 64
    """Global batch: images in an optimizer step, over all ranks and micro-batches. A list gives each of its batches an
    equal share of the epochs, in order, as data.size_px does."""
    size_px: int | list[int] = 64
    """Side of the training images in pixels; a list gives each of its sizes an equal share of the epochs, in order."""
    eval_size_px: int | None = None
    """Side of the validation images in pixels; the last training size if not given."""
    eval_crop: float = 0.875
    """Validation resizes the short side to eval_size_px / eval_crop, then crops the centre (0.875 is 224 of 256)."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of R, G, B that normalisation subtracts, for pixels in 0..1."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of R, G, B that normalisation divides by, for pixels in 0..1."""
    decode: Decode = "auto"
    """Device that decodes and resizes images: auto is the GPU if there is one. cpu spares the GPU where processors are idle."""
    hw_decoder_load: float = 0.75
    """Share of a batch that goes to the decoder for JPEG which an A100 or H100 has; its cores decode the rest. With 0 they
    decode all of it, so that no image's decoder depends on the batch that it is in, and so on the number of ranks."""
    preallocate_width_hint: int = 0
    """Width in pixels of the largest images, to reserve that decoder's memory once; 0 lets it grow."""
    preallocate_height_hint: int = 0
    """Height in pixels of the largest images, for the same purpose."""
    threads: int | None = free(None)
    """Decoding threads of each rank; if not given, its share of the processors it may use."""
    prefetch: int = free(2)
    """Batches that DALI works on ahead of the one handed out; more of them bridge slow ones, and take memory."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        require(self.path != "", 'data.path: it is empty; give a folder of images or "builtin"')
        if is_address(self.path):
            parse_address(self.path, "data.path")
        require(
            0 <= self.cache_gb < math.inf,
            f"data.cache_gb: {self.cache_gb} is out of range; give GB of disk, or 0 to keep nothing",
        )
        require(
            self.labels in get_args(Labels),
            f"data.labels: {self.labels!r} is unknown; choose one of {', '.join(get_args(Labels))}",
        )
        require(
            self.balance in get_args(Balance),
            f"data.balance: {self.balance!r} is unknown; choose one of {', '.join(get_args(Balance))}",
        )
        require(
            self.on_error in ("skip", "fail"), f"data.on_error: {self.on_error!r} is unknown; choose one of skip, fail"
        )
        require(
            0 <= self.max_bad_share <= 1,
            f"data.max_bad_share: {self.max_bad_share} is not a share; give a number from 0 to 1",
        )
        require(self.quarantine != "", "data.quarantine: it is empty; give a list that verify wrote, or leave it out")
        require(0 < self.val_share <= 1, f"data.val_share: {self.val_share} is not a share; give a number in (0, 1]")
        require(self.group != "", "data.group: it is empty; give a column or a level of folders, or leave it out")
        if self.fold is not None:
            parts = re.fullmatch(r"(\d+)/(\d+)", self.fold)
            require(
                parts is not None and 1 <= int(parts[1]) <= int(parts[2]) and int(parts[2]) > 1,
                f"data.fold: {self.fold!r} is no fold; give its number and how many there are, as 2/5",
            )
        require(
            len(self.batches) > 0 and min(self.batches) > 0,
            f"data.batch: {self.batch} is not positive; give the number of images per optimizer step",
        )
        require(
            self.shuffle_shards >= 0,
            f"data.shuffle_shards: {self.shuffle_shards} is negative; give a number of shards, or 0 to mix all images",
        )
        sizes = self.sizes_px + ([] if self.eval_size_px is None else [self.eval_size_px])
        require(
            len(self.sizes_px) > 0 and all(8 <= size <= 4096 for size in sizes),
            f"data.size_px, eval_size_px: {self.size_px}, {self.eval_size_px} must be 8 to 4096 pixels",
        )
        require(0 < self.eval_crop <= 1, f"data.eval_crop: {self.eval_crop} is not a share; give a number in (0, 1]")
        for name, triple in (("mean", self.mean), ("std", self.std)):
            require(len(triple) == 3, f"data.{name}: {triple} has {len(triple)} numbers; give three, for R, G, B")
        require(min(self.std) > 0, f"data.std: {self.std} must be positive")
        require(
            self.decode in get_args(Decode),
            f"data.decode: {self.decode!r} is unknown; choose one of {', '.join(get_args(Decode))}",
        )
        require(
            0 <= self.hw_decoder_load <= 1,
            f"data.hw_decoder_load: {self.hw_decoder_load} is not a share; give a number from 0 to 1",
        )
        hints = (self.preallocate_width_hint, self.preallocate_height_hint)
        require(min(hints) >= 0, f"data.preallocate_width_hint, preallocate_height_hint: {hints} must not be negative")
        require(self.prefetch > 0, f"data.prefetch: {self.prefetch} is not positive; give 1 batch or more")
        require(
            self.threads is None or self.threads > 0,
            f"data.threads: {self.threads} is not positive; leave it out to use the processors there are",
        )

    @property
    def batches(self) -> list[int]:
        return [self.batch] if isinstance(self.batch, int) else self.batch

    @property
    def sizes_px(self) -> list[int]:
        return [self.size_px] if isinstance(self.size_px, int) else self.size_px

    @property
    def validation_px(self) -> int:
        return self.eval_size_px or self.sizes_px[-1]

    def size_at(self, epoch: int, epochs: int) -> int:
        """Side of the training images in pixels in `epoch` (from 0) of a run of `epochs`."""
        return _share_of(self.sizes_px, epoch, epochs)

    def batch_at(self, epoch: int, epochs: int) -> int:
        """Images in an optimizer step in `epoch` (from 0) of a run of `epochs`."""
        return _share_of(self.batches, epoch, epochs)


def _share_of(values: list[int], epoch: int, epochs: int) -> int:
    """Pick the value whose equal share of the epochs includes `epoch`."""
    return values[min(epoch * len(values) // epochs, len(values) - 1)]
