"""The optimizer's state by parameter, whichever engine saved it on however many ranks: read whole, and divided anew."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import require
from trainer.checkpoint.files import load_state

SHARD = "optimizer-{rank}.pt"
"""Name of the file with a rank's part of the optimizer's state, as DeepSpeed's engine writes it."""

Moments = dict[str, dict[str, Any]]
"""State of an optimizer for each parameter, by its name: tensors of the parameter's shape, and single values."""


class Entry(NamedTuple):
    """A parameter that the optimizer changes."""

    name: str
    shape: torch.Size


Groups = list[list[Entry]]
"""Parameters in the optimizer's order, by its groups."""


class Piece(NamedTuple):
    """Elements of a parameter that a rank has in its part of a group."""

    entry: Entry
    start: int
    """First of them in the parameter, laid out row by row."""
    at: int
    """First of them in the part."""
    size: int


def groups_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> Groups:
    """List what an optimizer changes. Call it before an engine divides the weights."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[Entry(names[id(p)], p.shape) for p in group["params"]] for group in optimizer.param_groups]


def pieces(group: list[Entry], stage: int, rank: int, world: int, part_size: int) -> Iterator[Piece]:
    """Find what a rank's part of a group holds at ZeRO's `stage`.

    1 and 2 lay a group end to end and cut it into equal parts of `part_size` elements; 3 cuts each parameter (Rajbhandari
    et al. 2020, arXiv 1910.02054, section 5; as DeepSpeed's stage_1_and_2.py and partition_parameters.py do it).
    """
    at = 0  # in the whole group, or at stage 3 in the part
    for entry in group:
        size = entry.shape.numel()
        if stage == 3:
            share = -(-size // world)
            start, end = min(rank * share, size), min((rank + 1) * share, size)
            yield Piece(entry, start, at, end - start)
            at += share
        else:
            start, end = (min(max(edge * part_size - at, 0), size) for edge in (rank, rank + 1))
            yield Piece(entry, start, at + start - rank * part_size, end - start)
            at += size


def read_whole(folder: Path, state: Mapping[str, Any], groups: Groups, device: torch.device) -> Moments:
    """Read a checkpoint's optimizer state, of which `state` is the training state. Raises `UserError`."""
    if state.get("engine") != "deepspeed":  # DDP
        saved = state["optimizer"]["state"]
        order = [number for group in state["optimizer"]["param_groups"] for number in group["params"]]
        return _by_name([saved.get(number, {}) for number in order], groups, folder)
    stage, world = state["zero_stage"], state["world"]
    shards = [
        load_state(folder / SHARD.format(rank=rank), device)["optimizer"] for rank in range(world if stage else 1)
    ]
    if stage == 0:
        return _by_name(shards[0], groups, folder)
    used = [group for group in groups if group]
    require(
        all(len(shard) == len(used) for shard in shards),
        f"{folder}: it has the optimizer's state for {len(shards[0])} groups of weights, and there are {len(used)}; give "
        "another --run.dir",
    )
    moments: Moments = {}
    for number, group in enumerate(used):
        for rank, shard in enumerate(shards):
            _collect(moments, shard[number], group, stage, rank, world)
    return moments


def part_of(moments: Moments, group: list[Entry], stage: int, rank: int, world: int, part: Tensor) -> dict[str, Any]:
    """Make what the optimizer keeps for `part`, a rank's part of a group at ZeRO's `stage`. Padding has zeros."""
    state: dict[str, Any] = {}
    for entry, start, at, size in pieces(group, stage, rank, world, part.numel()):
        for key, value in moments.get(entry.name, {}).items():
            if isinstance(value, Tensor) and value.ndim:
                flat = state.setdefault(key, torch.zeros_like(part, requires_grad=False))
                flat[at : at + size] = value.reshape(-1)[start : start + size]
            else:
                state[key] = value.clone() if isinstance(value, Tensor) else value
    return state


def adopt(optimizer: torch.optim.Optimizer, moments: Moments, names: Mapping[str, Tensor]) -> None:
    """Give an optimizer of whole parameters, `names`, what `moments` has for them, each laid out in memory as its parameter."""

    def own(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        # A single value, as AdamW counts its steps in, may be that of a whole group: each parameter counts by itself.
        return torch.empty_like(parameter, requires_grad=False).copy_(value) if value.ndim else value.clone()

    for name, kept in moments.items():
        optimizer.state[names[name]] = {key: own(value, names[name]) for key, value in kept.items()}


def group_steps(optimizer: torch.optim.Optimizer) -> list[Tensor | None]:
    """List the steps that each group has counted, where an optimizer counts by groups, as LAMB does; else None."""
    return [group.get("step") for group in optimizer.param_groups]


def adopt_group_steps(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Let an optimizer go on from what a checkpoint's `state` has of `group_steps`."""
    if state.get("engine") == "deepspeed":
        steps = state.get("group_steps", ())  # older ones have none
    else:
        steps = [group.get("step") for group in state["optimizer"]["param_groups"]]
    for group, step in zip(optimizer.param_groups, steps, strict=False):
        if step is not None:
            group["step"] = step.cpu()  # where it is read, so that no step waits for a GPU


def loss_scale(state: Mapping[str, Any]) -> tuple[float, int] | None:
    """Return a checkpoint's loss scale and the optimizer steps since it changed; None where the run had none."""
    if state.get("engine") == "deepspeed":
        return (state["scale"], state["clean_updates"]) if state["scale"] != 1 else None
    return (state["scaler"]["scale"], state["scaler"]["_growth_tracker"]) if state["scaler"] else None


def _by_name(states: list[dict[str, Any]], groups: Groups, folder: Path) -> Moments:
    entries = [entry for group in groups for entry in group]
    require(
        len(states) == len(entries),
        f"{folder}: it has the optimizer's state for {len(states)} weights, and there are {len(entries)}; give another --run.dir",
    )
    return {entry.name: dict(state) for entry, state in zip(entries, states, strict=True) if state}


def _collect(moments: Moments, part: Mapping[str, Any], group: list[Entry], stage: int, rank: int, world: int) -> None:
    """Add a rank's part of a group to the whole."""
    for key, value in part.items():
        flat = isinstance(value, Tensor) and value.ndim
        for entry, start, at, size in pieces(group, stage, rank, world, value.numel() if flat else 0):
            kept = moments.setdefault(entry.name, {})
            if flat:
                whole = kept.setdefault(key, torch.zeros(entry.shape, dtype=value.dtype, device=value.device))
                whole.view(-1)[start : start + size] = value[at : at + size]
            else:
                kept[key] = value
