"""Training and prediction from Python: `train(cfg)`, and `load_run(RUN).predict(images)`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.sources.catalog import Catalog
from data_pipeline.sources.listing import UNLABELLED
from trainer.config import Config
from trainer.config import load_run as read_config
from trainer.distributed import DistContext, open_dist_context
from trainer.loop import fit
from trainer.predict.cli import View, predict_all
from trainer.resilience.signals import StopFlag
from trainer.scoring import Trained, open_trained
from trainer.setup.start import join_run

ImageLike = str | Path | NDArray[np.uint8]
"""A JPEG, PNG, WebP or BMP file, or RGB pixels [H, W, 3] uint8."""


class Prediction(NamedTuple):
    """Classes and probabilities that a network gives N images."""

    labels: list[str] | list[list[str]]
    """[N] name of the likeliest class; where images may have several, the names of those that reach their thresholds."""
    probabilities: NDArray[np.float32]
    """[N, C] in the order of `TrainedRun.classes`."""


class TrainedRun:
    """A run's chosen weights (the best by `run.best_by`, else the last), ready to predict."""

    def __init__(self, folder: Path, cfg: Config, trained: Trained, ctx: DistContext) -> None:
        self.folder, self.config, self.classes = folder, cfg, trained.classes
        self._trained, self._machine = trained, ctx

    def predict(self, images: Sequence[ImageLike]) -> Prediction:
        """Classify images as validation does: resized, centre-cropped and normalised with the run's own options.

        Raises:
            UserError: an image cannot be read, or an array is no uint8 [H, W, 3].
        """
        if not images:
            return Prediction([], np.empty((0, len(self.classes)), np.float32))
        with TemporaryDirectory() as beside:
            paths = [_file_of(image, Path(beside) / f"{row}.png", row) for row, image in enumerate(images)]
            catalog = Catalog(Path("/"), paths, np.full(len(paths), UNLABELLED), self.classes, bad={})
            found = predict_all(
                self._trained.probabilities, len(self.classes), catalog, self.config.data, self._machine, View()
            )
        unreadable = [paths[row] for row in np.flatnonzero(~found.readable)]
        if unreadable:
            raise UserError(f"images: {unreadable[0]} cannot be read; mend it, or leave it out")
        if self._trained.multi_label:
            said = found.probabilities >= self._trained.thresholds
            return Prediction([[self.classes[c] for c in np.flatnonzero(row)] for row in said], found.probabilities)
        best = found.probabilities.argmax(axis=1)
        return Prediction([self.classes[row] for row in best], found.probabilities)


def load_run(folder: str | Path) -> TrainedRun:
    """Open the run in `folder` with its chosen weights, on a GPU where there is one.

    Raises:
        UserError: the folder holds no run, or no complete checkpoint.
    """
    folder = Path(folder)
    cfg = read_config(folder, [])
    with open_dist_context(device=cfg.engine.device) as ctx:
        alone = replace(ctx, rank=0, world=1)  # each process that calls this predicts for itself
        return TrainedRun(folder, cfg, open_trained(folder, cfg, alone), alone)


def train(cfg: Config) -> Path:
    """Train, or resume, as `python -m trainer` does with the same options; returns the run folder.

    Signals that ask to stop (SIGTERM, SIGINT, SIGUSR2) are obeyed, so call it in the main thread.

    Raises:
            UserError: an option or a file that the caller can correct.
    """
    with StopFlag() as stop, join_run(cfg) as ctx:
        fit(cfg, ctx, stop)
    return cfg.folder


def _file_of(image: ImageLike, beside: Path, row: int) -> str:
    """Return the path of an image; pixels are written to `beside` first, without loss."""
    if isinstance(image, str | Path):
        return str(Path(image).absolute())
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"images: number {row} is {image.dtype} {list(image.shape)}; give RGB pixels [H, W, 3] uint8")
    Image.fromarray(image).save(beside)
    return str(beside)
