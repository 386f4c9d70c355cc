"""What a checkpoint holds, copied in a moment so that training goes on while it is written."""

import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from trainer.checkpoint.files import METADATA
from trainer.checkpoint.store import Stamp, StateWriter, write_stamped

Content = bytes | memoryview


class HostCopy:
    """Copies of tensors in memory of the host that is used anew each time: the pages are there, and pinned for a GPU."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def of(self, tree: Any, place: str = "") -> Any:
        """`tree`, of dicts, lists and tuples, with a copy of every tensor in it; `place` tells trees apart.

        The copies are there after `wait`, and until the same place is copied again.
        """
        match tree:
            case Tensor():
                return self._tensor(tree, place)
            case Mapping():
                # A pickle tells equal keys that are one object from others; equal states shall make equal files.
                return {
                    sys.intern(key) if isinstance(key, str) else key: self.of(value, f"{place}/{key}")
                    for key, value in tree.items()
                }
            case list() | tuple():
                return type(tree)(self.of(value, f"{place}/{number}") for number, value in enumerate(tree))
        return tree

    def wait(self) -> None:
        """Until the GPU has copied what it was asked to; on a CPU it is done. For any thread."""
        if self._copied:
            self._copied.synchronize()

    def _tensor(self, tensor: Tensor, place: str) -> Tensor:
        tensor = tensor.detach()
        memory = self._memory.get(place)
        if memory is None or (memory.shape, memory.dtype, memory.stride()) != (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        ):
            memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._memory[place] = memory
        if tensor.is_cpu:
            # torch shares a copy out among threads, which on busy processors took four times as long (ResNet-50: 46 ms).
            np.copyto(memory.numpy(), tensor.numpy())
        else:
            memory.copy_(tensor, non_blocking=True)
            # Updates come later on the same stream, so they wait for the copies, and nothing here does.
            self._copied = self._copied or torch.cuda.Event()
            self._copied.record()
        return memory


def packed_weights(weights: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A file of every tensor under its name, readable by `files.load_weights` and `files.read_metadata`."""
    whole = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    # A single entry, since safetensors writes several in random order: equal weights make equal files.
    return save(whole, {METADATA: json.dumps(metadata)})


def packed_state(state: dict[str, Any]) -> memoryview:
    """A file of tensors and plain values. It is written by Python and not by torch, whose error names no full disk."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def writer(files: Mapping[str, Callable[[], Content]], ready: Callable[[], None] = lambda: None) -> StateWriter:
    """What writes `files`, by name, into a folder, each packed when it is its turn, and none before `ready()`."""

    def write(folder: Path) -> dict[str, Stamp]:
        ready()
        return {name: write_stamped(folder / name, content()) for name, content in files.items()}

    return write
