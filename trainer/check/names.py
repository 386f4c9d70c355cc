"""Items of the check: where each one is, and what it proves. Nothing heavy is imported here."""

import re
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from trainer.check.results import Found


class Item(NamedTuple):
    module: str
    """Module of `trainer.check.items` that has a function of the item's name."""
    proves: str
    limit_s: float = 180.0
    """Longest time that it may take, in seconds."""


ITEMS = {
    "ranks and devices": Item("communication", "each process has a GPU of its own, by UUID"),
    "decode kinds": Item("decoding", "every kind of file decodes to Pillow's pixels, and on a GPU to those of the CPU"),
    "augment": Item(
        "decoding", "each crop, policy, jitter, rotation, erasing and mixing gives the same pixels from two pipelines"
    ),
    "damaged files": Item("decoding", "each broken kind and a flipped bit amid a batch is named; the rest is right"),
    "held batches": Item("loading", "six batches held under a busy stream stay as they were"),
    "worlds": Item("loading", "pixels are the same at one rank and at two, by each share of the hardware decoder"),
    "loader speed": Item("loading", "images/s of the loader at 224 and 160 px, beside bare decoding"),
    "optimizers": Item("training", "every optimizer takes a finite step in each precision, with and without mixing"),
    "networks and losses": Item(
        "variants",
        "options of the network and of the loss train in bf16 and fp16, and on a GPU compiled as well",
        400.0,
    ),
    "no host sync": Item("training", "a warm step waits for nothing on the GPU"),
    "exact resume": Item("training", "save, load, five steps: the bits of the run that went on"),
    "capture": Item("training", "a state written while training goes on holds the weights of its step"),
    "accumulation": Item("training", "micro-batches add up to the plain gradient, and on a GPU a graph does its step"),
    "fit memory": Item("training", "micro-batches are cut to what memory holds, where it runs out"),
    "deepspeed": Item(
        "training", "DeepSpeed's stages 0 to 2 end at DDP's weights, and each other engine goes on from them"
    ),
    "step speed": Item("speed", "images/s of ResNet-18 and -50, eager, compiled and graphed, with MFU", 600.0),
    "all-reduce": Item("communication", "bandwidth of all ranks together and of each pair, the slowest named"),
    "ranks train": Item(
        "whole_runs",
        "a run by all ranks, with snapshots in memory, and on GPUs with batch norm over all of them",
        300.0,
    ),
    "kill and resume": Item("whole_runs", "fifty steps from real JPEGs: SIGKILL, resume, evaluate", 300.0),
    "validation memory": Item("whole_runs", "memory after the first validation does not grow with further ones"),
    "step gaps": Item("whole_runs", "time between steps, and on a GPU its idle share, in a profile"),
}
"""Name -> item, in the order in which they run."""


def find(name: str) -> Callable[[], Found]:
    """Import the function behind an item."""
    module = import_module(f"trainer.check.items.{ITEMS[name].module}")
    act: Callable[[], Found] = getattr(module, re.sub(r"\W", "_", name))
    return act
