"""Cut, mirror and resize decoded images on the CPU, as machine code that DALI's threads call.

DALI's own resize costs a CPU more than the decoding of the image. This one makes each output row in two steps: it
blends the source rows, in one long vector, and then the pixels of that row, each a vector of four lanes. The
filter is the triangle of PIL's BILINEAR, widened by the factor of reduction, which sees the pixels around the window as
`Image.resize(box=...)` does; levels differ from PIL's by at most 1, as PIL rounds between the two steps.

Numba compiles it once on a machine, in some three seconds, into a cache beside this file or in the user's cache folder.
A cache to which others may write is not used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from data_pipeline.common.numba_cache import may_cache

_LANES = ir.VectorType(ir.FloatType(), 4)

Floats = NDArray[np.float32]
Index = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Addresses(NamedTuple):
    """Addresses of two functions in C's calling convention, for DALI's operator that calls functions compiled by numba."""

    setup: int
    """Function that gives the output its shape [S, S, 3]."""
    run: int
    """Function with inputs: image [H, W, 3] uint8; top, left [2] float32; bottom, right [2] float32; anything of shape [S]."""


def compiled() -> Addresses:
    """Compile, or load from the cache. Raises whatever numba raises where it cannot."""
    return Addresses(_compile(_SETUP, _setup), _compile(_RUN, _run))


def _compile(signature: Any, function: Callable[..., None]) -> int:
    address: int = cfunc(signature, **_OPTIONS)(function).address
    return address


_OPTIONS: dict[str, Any] = {
    "cache": may_cache(_compile, "the CPU's resize"),
    "fastmath": True,
    "error_model": "numpy",
}


@njit(**_OPTIONS)
def _triangle(start: float, stop: float, size: int, limit: int) -> tuple[Index, Floats]:
    """Compute weights by which `size` outputs blend `limit` inputs under start...stop; start > stop mirrors.

    Returns the first input [size] and the weights [size, taps] of it and those that follow.
    """
    low, scale = min(start, stop), abs(stop - start) / size
    support = max(scale, 1.0)
    taps = max(min(int(np.ceil(2 * support)), limit), 1)
    first = np.empty(size, np.int64)
    weights = np.empty((size, taps), np.float32)
    for number in range(size):
        centre = low + (number + 0.5) * scale
        output = size - 1 - number if start > stop else number
        first[output] = min(max(int(np.floor(centre - support + 0.5)), 0), limit - taps)
        for tap in range(taps):
            weights[output, tap] = max(1 - abs(first[output] + tap + 0.5 - centre) / support, 0.0)
        weights[output] /= weights[output].sum()
    return first, weights


@intrinsic
def _blend_pixels(
    typing: Any, out: Any, at: Any, row: Any, first: Any, weights: Any, output: Any, taps: Any
) -> tuple[Any, Any]:
    """Set out[at : at + 4] = weights[output] @ row[first : first + 3 * taps] as pixels; the fourth lane is waste.

    Written as LLVM code because numba leaves LLVM's vectoriser of straight-line code off: five times as fast as the loop.
    """
    signature = types.void(out, types.int64, row, types.int64, weights, types.int64, types.int64)
    return signature, _emit_blend


def _emit_blend(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    out, row, weights = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 4))
    _, at, _, first, _, output, taps = args
    weights = builder.gep(weights, [builder.mul(output, taps)])
    total = cgutils.alloca_once_value(builder, ir.Constant(_LANES, [0.0] * 4))
    with cgutils.for_range(builder, taps) as loop:
        weight = builder.insert_element(
            ir.Constant(_LANES, ir.Undefined), builder.load(builder.gep(weights, [loop.index])), ir.IntType(32)(0)
        )
        weight = builder.shuffle_vector(weight, weight, ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4))
        pixel = builder.gep(row, [builder.add(first, builder.mul(loop.index, ir.IntType(64)(3)))])
        pixel = builder.load(builder.bitcast(pixel, _LANES.as_pointer()), align=4)
        product = builder.fmul(weight, pixel, flags=("fast",))
        builder.store(builder.fadd(builder.load(total), product, flags=("fast",)), total)
    builder.store(builder.load(total), builder.bitcast(builder.gep(out, [at]), _LANES.as_pointer()), align=4)
    return context.get_dummy_value()


@njit(**_OPTIONS)
def _blend_rows(out: Floats, rows: Bytes, weights: Floats) -> None:
    out[:] = 0
    for tap in range(len(weights)):
        weight, row = weights[tap], rows[tap]
        for i in range(len(out)):
            out[i] += weight * np.float32(row[i])


@njit(**_OPTIONS)
def _blend_columns(out: Floats, row: Floats, first: Index, weights: Floats, taps: int) -> None:
    for x in range(len(first)):
        _blend_pixels(out, 3 * x, row, first[x], weights, x, taps)


@njit(**_OPTIONS)
def _resize(out: Bytes, image: Bytes, top: float, left: float, bottom: float, right: float) -> None:
    """Fill `out` [S, 3 * S] with a window of `image` [H, 3 * W]."""
    size, height, width = len(out), len(image), image.shape[1] // 3
    # Compute weights of rows and columns, and the part of the image that they touch.
    top_row, row_weights = _triangle(top, bottom, size, height)
    column, column_weights = _triangle(left, right, size, width)
    taps = column_weights.shape[1]
    leftmost = column.min()
    image = image[:, 3 * leftmost : 3 * (column.max() + taps)]
    column = 3 * (column - leftmost)
    # Fill row by row: down, then across, then to the nearest level.
    padded = np.zeros(image.shape[1] + 1, np.float32)  # as pixels are read in vectors of four
    blended = np.empty(3 * size + 1, np.float32)
    for y in range(size):
        _blend_rows(padded[:-1], image[top_row[y] : top_row[y] + len(row_weights[y])], row_weights[y])
        _blend_columns(blended, padded, column, column_weights, taps)
        for i in range(3 * size):
            out[y, i] = np.uint8(np.int32(blended[i] + np.float32(0.5)))


_SHAPES = types.CPointer(types.CPointer(types.int64))
_DATA = types.CPointer(types.voidptr)
_RANKS = types.CPointer(types.int32)
_SETUP = types.void(_SHAPES, _RANKS, types.int32, _SHAPES, _RANKS, types.int32, types.int32)
_RUN = types.void(_DATA, _SHAPES, _RANKS, types.int32, _DATA, _SHAPES, _RANKS, types.int32)


def _setup(out_shapes: Any, out_ranks: Any, outs: int, in_shapes: Any, in_ranks: Any, ins: int, batch: int) -> None:
    for sample in range(batch):
        image, start, stop, size = [in_shapes[number * batch + sample] for number in range(4)]
        fits = image[0] * image[1] > 0 and image[2] == 3 and start[0] == stop[0] == 2
        out = out_shapes[sample]
        out[0], out[1], out[2] = size[0] if fits else -1, size[0], 3  # DALI raises where a size is negative


def _run(
    outs: Any, out_shapes: Any, out_ranks: Any, out_count: int, ins: Any, in_shapes: Any, in_ranks: Any, in_count: int
) -> None:
    size, height, width = out_shapes[0][0], in_shapes[0][0], in_shapes[0][1]
    image, out = carray(ins[0], (height, 3 * width), np.uint8), carray(outs[0], (size, 3 * size), np.uint8)
    start, stop = carray(ins[1], 2, np.float32), carray(ins[2], 2, np.float32)
    _resize(out, image, start[0], start[1], stop[0], stop[1])
