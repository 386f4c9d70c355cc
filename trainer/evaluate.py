"""Scores over a whole split: every sample once, whatever the number of ranks and the batch.

python -m trainer.evaluate RUN [--flip] [--data.path FOLDER]
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from data_pipeline.common.cli import parse_known
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError
from data_pipeline.loader import IGNORE_LABEL, Cursor, Loader
from data_pipeline.sources.catalog import open_catalog
from trainer.checkpoint.store import Store
from trainer.config import Config, load_run, run_folder
from trainer.distributed import Machine, open_machine
from trainer.engine.base import Normalise, Predictor, count, load_weights, read_metadata
from trainer.model.resnet import build_resnet
from trainer.tracking.meter import Scores


class Trained(NamedTuple):
    """A run's chosen weights, ready for use."""

    checkpoint: Path
    classes: list[str]
    predict: Predictor


def open_trained(folder: Path, cfg: Config, machine: Machine) -> Trained:
    """The network with the weights that the run in `folder` is judged by. Raises `UserError`.

    Where `engine.precision` is auto, a CPU computes in fp32, so that weights score the same on another one.
    """
    checkpoint = Store(folder).chosen()
    if checkpoint is None:
        raise UserError(f"{folder} has no complete checkpoint yet; train it first")
    metadata = read_metadata(checkpoint)
    if metadata["model"] != cfg.model.name:
        raise UserError(f"model.name: {folder} holds a {metadata['model']}, not a {cfg.model.name}")
    classes = json.loads(metadata["classes"])
    network = build_resnet(cfg.model, len(classes)).to(machine.device).to(memory_format=torch.channels_last)
    load_weights(network, checkpoint)
    normalise = Normalise(cfg.data.mean, cfg.data.std, machine.device)
    by_hardware = cfg.engine.precision == "auto" and machine.device.type == "cpu"
    engine = replace(cfg.engine, precision="fp32") if by_hardware else cfg.engine
    return Trained(checkpoint.resolve(), classes, Predictor(network, normalise, engine, machine.device))


def evaluate(predict: Callable[[torch.Tensor], torch.Tensor], loader: Loader, machine: Machine) -> Scores:
    """Score `predict` (images to logits [B, classes]) on everything that `loader` holds. Collective."""
    sums = torch.zeros(4, dtype=torch.float64, device=machine.device)
    loader.seek(Cursor())
    for batch in loader:
        logits = predict(batch.images)
        loss = functional.cross_entropy(logits, batch.labels, ignore_index=IGNORE_LABEL, reduction="sum")
        sums += count(logits, batch.labels, loss)
    total = machine.sum(sums).tolist()
    if not total[3]:
        raise UserError("data.path: none of the validation images could be read")
    return Scores.of(total)


def with_mirror(predict: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`predict` of each image and its mirror image: the logarithm of the mean of their probabilities."""

    def both(images: torch.Tensor) -> torch.Tensor:
        mirrored = images.flip(3).contiguous(memory_format=torch.channels_last)
        return (predict(images).softmax(dim=1) + predict(mirrored).softmax(dim=1)).div(2).log()

    return both


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description="Score a run's best weights on its validation images.",
        epilog="Besides, --data.path FOLDER and the other options of python -m trainer.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="The run folder; it comes first.")
    parser.add_argument("--flip", action="store_true", help="Average over each image and its mirror image.")
    args, options = parse_known(parser, sys.argv[1:])
    folder, _ = run_folder(sys.argv[1:], parser.prog)
    cfg = load_run(folder, options)
    with open_machine() as machine:
        trained = machine.agree(lambda: open_trained(folder, cfg, machine))
        catalog = machine.agree(lambda: open_catalog(cfg.data, "val", trained.classes))
        loader = Loader(catalog, cfg.data, machine, training=False)
        scores = evaluate(with_mirror(trained.predict) if args.flip else trained.predict, loader, machine)
    if machine.primary:
        views = ", with mirror images," if args.flip else ""
        print(
            f"{trained.checkpoint}{views} on {scores.images} of {len(catalog) + len(catalog.bad)} images in {catalog.root}: "
            f"loss {scores.loss:.4f}  top-1 {scores.top1_pct:.2f} %  top-5 {scores.top5_pct:.2f} %"
        )


if __name__ == "__main__":
    run_command(main)
