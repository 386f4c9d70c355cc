"""Files of a checkpoint: their names, and functions that read them."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.common.errors import UserError

WEIGHTS, STATE = "model.safetensors", "training.pt"
METADATA = "sluice"


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights strictly. Raises `UserError` where they belong to another module."""
    from safetensors.torch import load_file  # here, so that an engine without checkpoints needs no more than torch

    with _reading(folder / WEIGHTS):
        module.load_state_dict(load_file(folder / WEIGHTS))


def load_state(file: Path, device: torch.device) -> dict[str, Any]:
    """Read the training state that `packed_state` packed. Raises `UserError` unless it has only tensors and plain values."""
    with _reading(file):
        state: dict[str, Any] = unpickled(file, device)
        return state


def unpickled(file: Path, device: torch.device, *known: Any) -> Any:
    """Read a torch.save file of tensors, containers, plain values and `known` classes. Raises torch's error."""
    with torch.serialization.safe_globals([*known]), warnings.catch_warnings(action="ignore"):
        return torch.load(file, map_location=device, weights_only=True)


def read_metadata(folder: Path) -> dict[str, str]:
    """Read the metadata of a checkpoint's weights: the model's name, and the names of its classes as JSON.

    Raises `UserError` where they cannot be read.
    """
    from safetensors import safe_open

    with _reading(folder / WEIGHTS), safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no table of text")
        return metadata


def read_classes(folder: Path) -> list[str] | None:
    """Read the names of a checkpoint's classes; None where it has none. Raises `UserError`."""
    names = read_metadata(folder).get("classes")
    with _reading(folder / WEIGHTS):
        classes = None if names is None else json.loads(names)
        if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise ValueError("its classes are no list of names")
        return classes


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a foreign file can raise anything
        why = next(iter(str(error).splitlines()), type(error).__name__).partition(". ")[0].rstrip(".: ")
        raise UserError(
            f"{file}: it cannot be loaded ({why}); restore it, or begin anew in another --run.dir"
        ) from None
