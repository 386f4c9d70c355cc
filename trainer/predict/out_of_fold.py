"""Write one table of the images that runs held out: each predicted by the runs that were not trained on it."""

import argparse
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.common.worker_pool import progress
from data_pipeline.sources.listing import counted
from trainer.config import Config
from trainer.distributed import open_dist_context
from trainer.predict.class_columns import with_classes
from trainer.predict.cli import open_alike, places_of, predict_all, view_of, write_table
from trainer.scoring import Trained, open_scored


def write_held_out(args: argparse.Namespace, runs: list[tuple[Path, Config]]) -> None:
    """Predict each run's own validation images, and write them all to `args.oof`. Collective. Raises `UserError`.

    An image that several runs held out has the mean of their probabilities.
    """
    first: Trained | None = None
    labels: dict[str, str] = {}
    found: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
    with progress("opening the runs"), open_dist_context() as ctx:
        for folder, cfg in runs:
            trained = ctx.raise_together(partial(open_alike, folder, cfg, ctx, first))
            require(
                not trained.multi_label,
                f"--oof: its table has one class for an image, and those of {folder} may have several; python -m trainer.report "
                "writes probabilities.csv of the images that a run held out",
            )
            first = first or trained
            classes = first.classes
            catalog = ctx.raise_together(partial(open_scored, folder, cfg.data, trained))
            own = predict_all(trained.probabilities, len(classes), catalog, cfg.data, ctx, view_of(args, cfg.data))
            probabilities = own.probabilities[:, places_of(classes, trained)]
            for row in np.flatnonzero(own.readable).tolist():
                name, label = f"{catalog.root}/{catalog.paths[row]}", catalog.classes[int(catalog.labels[row])]
                if labels.setdefault(name, label) != label:
                    raise UserError(
                        f"RUN: {folder} has {name} as {label}, another run as {labels[name]}; give runs of one set"
                    )
                found[name].append(probabilities[row])
        require(len(found) > 0, "RUN: none of the images that the runs held out can be read")
        names = sorted(found)
        mean = np.stack([np.mean(found[name], axis=0) for name in names])
        truth = [labels[name] for name in names]
        predicted = np.array(classes, object)[mean.argmax(axis=1)]
        table = pd.DataFrame({"image": names, "label": truth, "predicted": predicted, "confidence": mean.max(axis=1)})
        whole = with_classes(table, mean, classes)
        ctx.run_on_rank0(lambda: write_table(whole, args.oof, "--oof"))
    if ctx.primary:
        right = (table.predicted == table.label).groupby(table.label).mean()
        top1_pct, macro_pct = 100 * (table.predicted == table.label).mean(), 100 * right.mean()
        print(
            printable(
                f"{args.oof}: {len(table)} images held out by {counted(len(runs), 'run')}: top-1 {top1_pct:.2f} %  "
                f"macro recall {macro_pct:.2f} %"
            )
        )
