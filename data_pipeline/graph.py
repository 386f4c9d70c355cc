"""The DALI graph: encoded bytes in, images of one size out. The only file that names DALI operators.

One definition serves both devices. With a GPU the decoder is "mixed" (the bytes are parsed on the CPU, decoded on the
GPU) and the rest follows on the GPU; without one everything runs in DALI's CPU thread pool.
"""

from collections.abc import Callable
from typing import Any

from nvidia.dali import Pipeline, fn, types

PREFETCH = 2  # batches that DALI works on ahead of the one handed out

Source = Callable[[], tuple[list[Any], ...]]
"""Returns a batch of B: encoded bytes (uint8 vectors), top-left [2], bottom-right [2] and, for `rotate`, angles [] float32."""


def build_graph(source: Source, *, batch: int, size_px: int, rotate: bool, gpu: int | None, threads: int) -> Pipeline:
    """A pipeline whose `run()` gives uint8 RGB images [batch, size_px, size_px, 3] in 0..255.

    The window of each image (see `draws.Geometry`) is cut, mirrored and resized by one operator: triangular filter,
    antialiased, as PIL's BILINEAR. `gpu` is the device's index or None. `source` raises StopIteration at its end.
    """
    device = "cpu" if gpu is None else "gpu"
    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=PREFETCH)
    with pipeline:
        encoded, top_left, bottom_right, *angle = fn.external_source(
            source=source, num_outputs=4 if rotate else 3, no_copy=True
        )
        # Fancy upsampling is what PIL does; the orientation tag is ignored as torchvision ignores it.
        images = fn.decoders.image(
            encoded,
            device="cpu" if gpu is None else "mixed",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,
            adjust_orientation=False,
        )
        images = fn.resize(
            images,
            device=device,
            size=[size_px, size_px],
            roi_start=top_left,
            roi_end=bottom_right,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        if rotate:
            # Nearest neighbour, as torchvision's RandomRotation; linear costs nine times as much on a CPU.
            images = fn.rotate(
                images, device=device, angle=angle[0], keep_size=True, fill_value=0, interp_type=types.INTERP_NN
            )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline
