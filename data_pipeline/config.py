"""Every option of the data: where it lies, how it is cut and augmented, how it is batched."""

from dataclasses import dataclass, field

from data_pipeline.errors import UserError


def require(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`."""
    if not ok:
        raise UserError(message)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to a training image. Every draw is a function of (seed, epoch, position), see `draws`."""

    min_area: float = 0.35
    """Smallest share of the image's area that a random crop keeps (Szegedy et al. 2014 use 0.08; short runs like more)."""
    max_area: float = 1.0
    """Largest share of the image's area that a random crop keeps."""
    max_ratio: float = 4 / 3
    """Most extreme width:height ratio of a crop; its inverse is the least."""
    flip: float = 0.5
    """Chance of a horizontal flip."""
    rotate_deg: float = 0.0
    """Rotation by a uniform angle in ± this many degrees, corners filled with black; 0 leaves it out."""

    def __post_init__(self) -> None:
        require(
            0 < self.min_area <= self.max_area <= 1,
            f"data.augment.min_area, max_area: {self.min_area}, {self.max_area} must satisfy 0 < min_area <= max_area <= 1",
        )
        require(self.max_ratio >= 1, f"data.augment.max_ratio: {self.max_ratio} is below 1; give a ratio such as 1.333")
        require(0 <= self.flip <= 1, f"data.augment.flip: {self.flip} is not a chance; give a number from 0 to 1")
        require(
            0 <= self.rotate_deg <= 180,
            f"data.augment.rotate_deg: {self.rotate_deg} is out of range; give degrees from 0 to 180",
        )


@dataclass(frozen=True)
class DataConfig:
    """Which images, at which size, in which batches."""

    path: str = "builtin"
    """Folder with train/CLASS/ and val/CLASS/, or with CLASS/ folders only (see val_share); "builtin" is the built-in set."""
    val_share: float = 0.1
    """Share held out for validation when the folder has no train/ and val/: decided by a hash of each file's path."""
    batch: int = 64
    """Global batch: images per weight update, over all ranks and micro-batches."""
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
    threads: int | None = None
    """Decoding threads of each rank; its share of the processors it may use if not given."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        require(self.path != "", 'data.path: it is empty; give a folder of images or "builtin"')
        require(0 < self.val_share <= 1, f"data.val_share: {self.val_share} is not a share; give a number in (0, 1]")
        require(self.batch > 0, f"data.batch: {self.batch} is not positive; give the number of images per update")
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
            self.threads is None or self.threads > 0,
            f"data.threads: {self.threads} is not positive; leave it out to use the processors there are",
        )

    @property
    def sizes_px(self) -> list[int]:
        return [self.size_px] if isinstance(self.size_px, int) else self.size_px

    @property
    def validation_px(self) -> int:
        return self.eval_size_px or self.sizes_px[-1]

    def size_at(self, epoch: int, epochs: int) -> int:
        """Training side in pixels in `epoch` (from 0) of a run of `epochs`."""
        sizes = self.sizes_px
        return sizes[min(epoch * len(sizes) // epochs, len(sizes) - 1)]
