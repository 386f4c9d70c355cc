"""Images per second of a recipe: the loader alone, the computation alone on synthetic images, and end to end.

    torchrun --nproc_per_node=2 -m trainer.bench [--config RECIPE] [--OPTION VALUE ...]

The three are measured in turn, round after round, in the same processes, so that a machine which slows down slows them
all. The first steps of each turn do not count: they live on what was fetched before.
"""

import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from data_pipeline.catalog import open_catalog
from data_pipeline.command import run_command
from data_pipeline.loader import Batch, Cursor, Loader
from trainer.config import Config, load
from trainer.loop import build_engine
from trainer.machine import Machine, open_machine

ROUNDS, STEPS, SKIPPED = 9, 14, 4


def measure(cfg: Config, machine: Machine) -> dict[str, list[float]]:
    """Images per second over all ranks, one figure a round, at the recipe's last resolution. Collective."""
    catalog = machine.agree(lambda: open_catalog(cfg.data, "train"))
    loader = Loader(catalog, cfg.data, machine, training=True, seed=cfg.run.seed, epochs=cfg.run.epochs)
    batches = _endless(loader, cfg.run.epochs - 1)
    engine = build_engine(cfg, len(catalog.classes), machine)
    batch = next(batches)
    synthetic = batch._replace(images=torch.randint_like(batch.images, 256))
    turns: dict[str, Callable[[], object]] = {
        "loader": lambda: next(batches),
        "compute": lambda: engine.step([synthetic], 1e-3),
        "end to end": lambda: engine.step([next(batches)], 1e-3),
    }
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(ROUNDS):
        for name, act in turns.items():
            for _ in range(SKIPPED):
                act()
            machine.barrier()
            start = time.perf_counter()
            for _ in range(STEPS - SKIPPED):
                act()
            machine.barrier()
            rates[name].append(cfg.data.batch * (STEPS - SKIPPED) / (time.perf_counter() - start))
    return rates


def _endless(loader: Loader, epoch: int) -> Iterator[Batch]:
    while True:
        loader.seek(Cursor(epoch))
        yield from loader


def main() -> None:
    cfg = load(sys.argv[1:])
    with open_machine() as machine:
        rates = measure(cfg, machine)
    if machine.primary:
        for name, values in rates.items():
            print(f"{name:<11} {median(values):8.1f} images/s  ({min(values):.1f} to {max(values):.1f})")
        ratios = [both / alone for both, alone in zip(rates["end to end"], rates["compute"], strict=True)]
        print(
            f"end to end / compute: {median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f}), "
            f"medians and ranges of {ROUNDS} interleaved rounds of {STEPS - SKIPPED} steps"
        )


if __name__ == "__main__":
    run_command(main)
