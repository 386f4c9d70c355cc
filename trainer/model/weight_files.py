"""Read the residual network in files of other programs, among anything else that they hold."""

import argparse
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path, PosixPath

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.common.errors import UserError, require
from trainer.checkpoint.files import unpickled
from trainer.model.resnet import HEAD

State = dict[str, Tensor]

_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "module", "state")
_NESTED = 4  # wrappers in each other, and no more: a file may contain itself
_MARK = "layer1.0.conv1.weight"  # which each residual network has once
_AVERAGED = "n_averaged"  # a count beside the network in torch's AveragedModel
_LISTED = 3  # names in a message

_NUMPY = {"scalar": np.float64().__reduce__()[0], "_reconstruct": np.empty(0).__reduce__()[0]}
_HARMLESS = (
    argparse.Namespace,  # timm's arguments
    timedelta,  # Composer's clock
    PosixPath,
    np.dtype,
    np.ndarray,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefdSU"),  # and not O, whose elements are anything
    *((value, f"numpy.{core}.multiarray.{name}") for name, value in _NUMPY.items() for core in ("core", "_core")),
)
"""Classes that trainers save beside their weights, and that do nothing when they are read."""


def read_network(path: Path) -> tuple[State, list[str]]:
    """Read the tensors of the residual network in a file, by their names in ours, and the names of the others.

    Raises `UserError`, OSError and SafetensorError.
    """
    return _network(_state_dict(_open(path), path), path)


def deepspeed_file(folder: Path) -> Path | None:
    """Find the file of weights in a folder that DeepSpeed saved; None in any other. Raises `UserError`."""
    latest = folder / "latest"
    inside = folder / Path(latest.read_text().strip()).name if latest.is_file() else folder
    if any(inside.glob("zero_pp_rank_*_model_states.pt")):  # of stage 3, whose "module" is empty
        raise UserError(
            f"model.weights: the weights in {folder} are divided as ZeRO-3 does; join them by DeepSpeed's "
            "zero_to_fp32.py, which lies there, and give the file that it writes"
        )
    file = inside / "mp_rank_00_model_states.pt"
    return file if file.is_file() else None


def few(names: list[str]) -> str:
    """List the first names, for a message."""
    return ", ".join(names[:_LISTED] + ["..."] * (len(names) > _LISTED))


def _open(path: Path) -> object:
    """Read a file. A pickle may hold tensors, containers and what is _HARMLESS, and nothing that runs."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        return unpickled(path, torch.device("cpu"), *_HARMLESS)
    except OSError:
        raise
    except Exception as error:  # a file that is no pickle can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"holds {refused[1]}, which" if refused else "is no PyTorch file of tensors alone, and what else it holds"
        )
        raise UserError(
            f"model.weights: {path} {what} might run code; save its state_dict() with torch.save, or as safetensors"
        ) from None


def _state_dict(content: object, path: Path) -> State:
    """Find the tensors by name, without wrappers; an average is preferred to the weights that it averages."""
    for _ in range(_NESTED):
        inside = content if isinstance(content, Mapping) else {}
        content = next((inside[name] for name in _WRAPPERS if isinstance(inside.get(name), Mapping)), content)
    found = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in found if isinstance(name, str) and isinstance(value, Tensor)}
    require(len(tensors) > 0, f"model.weights: {path} holds no state dict; save a model's state_dict() with torch.save")
    return tensors


def _network(tensors: State, path: Path) -> tuple[State, list[str]]:
    """Find the residual network among tensors under its own names, whatever prefix they have, and the names of all others.

    The head may also be that of a module around the network, as MMPretrain has it.
    """
    prefixes = sorted(name.removesuffix(_MARK) for name in tensors if f".{name}".endswith(f".{_MARK}"))
    require(
        len(prefixes) < 2,
        f"model.weights: {path} holds several networks "
        f"({few([name or 'one without a prefix' for name in prefixes])}); save the state_dict() of one of them",
    )
    prefix = prefixes[0] if prefixes else ""
    around = prefix[: prefix[:-1].rfind(".") + 1]
    heads = [f"{prefix}{HEAD}.", f"{around}head.{HEAD}.", f"{around}{HEAD}."]
    head = next((start for start in heads if f"{start}weight" in tensors), heads[0])
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not head.startswith(prefix):
        state |= {
            f"{HEAD}.{name.removeprefix(head)}": value for name, value in tensors.items() if name.startswith(head)
        }
    beside = [name for name in tensors if not name.startswith((prefix, head)) and name != _AVERAGED]
    state.pop(_AVERAGED, None)
    return state, beside
