"""Decode, cut, resize and augment in DALI: encoded bytes in, images of one size out. Only this and `augment` name DALI operators.

One definition serves both devices. With a GPU the decoder is "mixed" (the bytes are parsed on the CPU, decoded on the
GPU) and the rest follows on the GPU. Without one everything runs in DALI's CPU thread pool. A third way: the CPU decodes
and resizes for a GPU that does the rest.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, ops, pipeline_def, types
from nvidia.dali.backend import TensorCPU, TensorListCPU
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

from data_pipeline.common.errors import require
from data_pipeline.common.launcher import warn_on_rank0
from data_pipeline.config import DataConfig
from data_pipeline.dali.augment import Operator
from data_pipeline.sampling import RIM_PX

if TYPE_CHECKING:
    from data_pipeline.dali.cpu_resize import Addresses

# A pool gives memory for larger CPU buffers: malloc would return it to the system and fetch it anew, at ten page
# faults an image. DALI reads this when it first allocates.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "65536")

# A forked process has none of DALI's threads, and crashes where it collects a pipeline as garbage.
os.register_at_fork(after_in_child=gc.freeze)

_DEFAULTS = DataConfig()

Inputs = tuple[Any, ...]
"""A batch of B: encoded bytes (uint8 vectors), top-left [2], bottom-right [2], pixels [2] int32 for `shift`, angles [] float32
for `rotate`, and the draws of each operator; each as a `TensorListCPU` or in another form that DALI takes for a batch."""
Source = Callable[[], Inputs]


def inputs_of(encoded: list[bytes], *tables: NDArray[Any]) -> Inputs:
    """Wrap encoded images and arrays [B, ...] for DALI, without a copy.

    DALI would do the same with lists and arrays, in the thread that runs the pipeline, for 7 us an image.
    """
    streams = TensorListCPU([TensorCPU(stream) for stream in encoded], contiguous=False)  # type: ignore[call-overload]
    return (streams, *(TensorListCPU(np.ascontiguousarray(table)) for table in tables))


class DamagedImage(Exception):
    """An image of the batch cannot be decoded."""


class ImagePipeline:
    """A DALI graph that turns the batches of a source into images of one size, a few batches ahead of the caller."""

    def __init__(
        self,
        *,
        batch: int,
        size_px: int,
        shift: bool = False,
        rotate: bool,
        operators: Sequence[Operator],
        device: torch.device,
        threads: int,
        cfg: DataConfig,
    ) -> None:
        self.shape = batch, size_px
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()  # DALI takes memory of its own, and torch may hold all of it for tensors to come
        self._feed = _Feed()
        self._pipeline = build_graph(
            self._feed.next_inputs,
            batch=batch,
            size_px=size_px,
            shift=shift,
            rotate=rotate,
            operators=operators,
            gpu=(device.index or 0) if device.type == "cuda" else None,
            threads=threads,
            cfg=cfg,
        )

    def feed(self, source: Iterator[Inputs]) -> None:
        """Take the next images from `source`. All images of the source before must have been handed out."""
        self._feed.source = source

    def run(self) -> torch.Tensor:
        """Return images [B, S, S, 3] uint8 in 0..255 of the next batch, in DALI's memory on the device.

        Raises StopIteration behind the last batch, and `DamagedImage` in place of a batch that holds one.
        """
        stream = [torch.cuda.current_stream(self._device)] if self._device.type == "cuda" else []
        try:
            (images,) = self._pipeline.run(*stream)
        except StopIteration:
            self._pipeline.reset()
            raise
        except RuntimeError as error:
            if "Failed to decode sample" in str(error):
                raise DamagedImage from error
            raise
        return torch.from_dlpack(images.as_tensor())


class _Feed:
    """Source of a pipeline, which a following epoch replaces by its own.

    An object beside the pipeline, because a pipeline in a circle of objects is freed late.
    """

    source: Iterator[Inputs] = iter(())

    def next_inputs(self) -> Inputs:
        return next(self.source)


def build_graph(
    source: Source,
    *,
    batch: int,
    size_px: int,
    shift: bool = False,
    rotate: bool,
    operators: Sequence[Operator],
    gpu: int | None,
    threads: int,
    cfg: DataConfig = _DEFAULTS,
) -> Pipeline:
    """Build a pipeline whose `run()` gives uint8 RGB images [batch, size_px, size_px, 3] in 0..255.

    `gpu` is the device's index or None; `cfg` chooses the decoder. `source` raises StopIteration at its end.
    Raises `UserError` for decoding on a GPU that is not there.
    """
    check_decode(cfg, on_gpu=gpu is not None)
    # Conditionals let the images of a batch go through different operations of a policy.
    pipeline = pipeline_def(images_of, enable_conditionals=True)(
        source,
        size_px=size_px,
        shift=shift,
        rotate=rotate,
        operators=operators,
        on_gpu=gpu is not None,
        cfg=cfg,
        kernel=cpu_kernel() if gpu is None or cfg.decode == "cpu" else None,
        batch_size=batch,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=cfg.prefetch,
    )
    pipeline.build()
    _remove_generated_files()
    return pipeline


def _remove_generated_files() -> None:
    """Remove the files of DALI's rewritten operators, which it imports from the temporary folder.

    DALI removes them when the process ends, but a killed process would leave them there. Once imported nothing reads them.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file") and module.__file__:
            Path(module.__file__).unlink(missing_ok=True)


def check_decode(cfg: DataConfig, *, on_gpu: bool) -> None:
    """Raise `UserError` for decoding on a GPU that is not there."""
    require(cfg.decode != "gpu" or on_gpu, "data.decode: gpu, but there is no GPU here; give auto or cpu")


@cache
def cpu_kernel() -> "Addresses | None":
    """Load our resize, faster than DALI's on a CPU; None, and one line with the reason, where numba does not work."""
    try:
        from data_pipeline.dali import cpu_resize as kernel

        return kernel.compiled()
    except Exception as error:  # numba raises a hundred kinds of errors, and DALI's resize works too
        why = " ".join(f"{type(error).__name__}: {error}".split())
        warn_on_rank0(f"numba does not work here, so DALI resizes, which takes longer ({why})")
        return None


def images_of(
    source: Source,
    *,
    size_px: int,
    shift: bool = False,
    rotate: bool,
    operators: Sequence[Operator],
    on_gpu: bool,
    cfg: DataConfig = _DEFAULTS,
    kernel: "Addresses | None" = None,
) -> DataNode:
    """Connect the operators; to be called within a pipeline.

    One operator cuts, mirrors and resizes the window of each image (see `sampling.Geometry`): triangular filter,
    antialiased, as PIL's BILINEAR. It is DALI's, or on a CPU `kernel`.
    """
    device = "gpu" if on_gpu else "cpu"
    decode_on_gpu = on_gpu and cfg.decode != "cpu"
    encoded, top_left, bottom_right, *changes = fn.external_source(
        # In the order of `inputs_of`; a batch's bytes stay alive in the loader, so they are not copied.
        source=source,
        num_outputs=3 + shift + rotate + len(operators),
        no_copy=True,
    )
    shifts, angle, draws = changes[:shift], changes[shift : shift + rotate], changes[shift + rotate :]

    # Decode whole images.
    # Fancy upsampling matches PIL; the orientation tag is ignored as in torchvision.
    # To decode only the windows took 1.1 to 1.2 times as long on a CPU, and damage beside them would go unseen.
    images = fn.decoders.image(
        encoded,
        device="mixed" if decode_on_gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
        adjust_orientation=False,
        **(_hardware_decoder(cfg) if decode_on_gpu else {}),
    )

    # Cut, mirror and resize on the device that decoded; from then on all work is on the device that trains.
    if kernel:
        images = _resize(images, top_left, bottom_right, size_px, kernel)
    else:
        images = fn.resize(
            images,
            device="gpu" if decode_on_gpu else "cpu",
            size=[size_px, size_px],
            roi_start=top_left,
            roi_end=bottom_right,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
    if on_gpu and not decode_on_gpu:
        images = images.gpu()

    # Augment images of their final size.
    if shift:
        images = _shift(images, shifts[0], size_px)
    if rotate:
        # Nearest neighbour, as torchvision's RandomRotation; linear costs nine times as much on a CPU.
        images = fn.rotate(
            images, device=device, angle=angle[0], keep_size=True, fill_value=0, interp_type=types.INTERP_NN
        )
    for number, operator in enumerate(operators):
        images = operator.apply(images, draws[number], size_px)
    return images


def _shift(images: DataNode, shift: DataNode, size_px: int) -> DataNode:
    """Move the window of each image down and to the right, by up to RIM_PX, over a rim that mirrors the image."""
    for axis in (0, 1):
        before, after = (
            fn.flip(
                fn.slice(images, start=[start], shape=[RIM_PX], axes=[axis]),
                vertical=int(axis == 0),
                horizontal=int(axis == 1),
            )
            for start in (1, size_px - 1 - RIM_PX)  # the outermost pixels are not repeated
        )
        images = fn.cat(before, images, after, axis=axis)
    return fn.slice(images, shift + RIM_PX, [size_px, size_px], axes=[0, 1])


def _hardware_decoder(cfg: DataConfig) -> dict[str, Any]:
    """Arguments for a GPU with a JPEG decoder (A100, H100); other GPUs ignore them."""
    return {
        "hw_decoder_load": cfg.hw_decoder_load,
        "preallocate_width_hint": cfg.preallocate_width_hint,
        "preallocate_height_hint": cfg.preallocate_height_hint,
    }


@do_not_convert
def _resize(
    images: DataNode, top_left: DataNode, bottom_right: DataNode, size_px: int, kernel: "Addresses"
) -> DataNode:
    """Resize the window of each image by `kernel`.

    The kernel is called by its addresses: DALI's plugin for numba would compile wrappers for each pipeline, which takes
    seconds.
    """
    operator = ops.python_op_factory("Resize", "NumbaFuncImpl", generated=False)  # type: ignore[attr-defined]
    call = operator(
        _module="data_pipeline.dali.cpu_resize",
        _display_name="resize",
        run_fn=kernel.run,
        setup_fn=kernel.setup,
        in_types=[types.UINT8, types.FLOAT, types.FLOAT, types.UINT8],
        ins_ndim=[3, 1, 1, 1],
        out_types=[types.UINT8],
        outs_ndim=[3],
    )
    images = call(images, top_left, bottom_right, types.Constant([0] * size_px, dtype=types.UINT8))
    return fn.reshape(images, layout="HWC")
