"""3x3 convolutions with a quarter of the products, for CPUs: Winograd's minimal filtering F(4x4, 3x3).

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section 4.3: an image is cut into
tiles of 6 x 6 positions that overlap by two. Transformed, they are multiplied with transformed filters, at each of 36 points a
product of matrices over the channels; transformed back, each is a tile of 4 x 4 results. oneDNN has no such kernels for x86.
The transforms are compiled by Numba.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, local
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic
from torch import Tensor

from data_pipeline.common.numba_cache import may_cache

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

TILE = 4  # results along a side
LANES = 8  # channels in a vector
FLOATS = 2 << 20  # of transformed images and results at a time, so that they stay in the processor's cache
_LINE = 16  # floats in a line of that cache

Pairs = Iterable[tuple[Tensor, Tensor]]

# Where the polynomials are evaluated, beside infinity. The paper's 0, 1, -1, 2, -2 round three times as coarsely; powers of these
# are exact, too. For the choice see Barabasz et al. 2020 (arXiv 1803.10986).
_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
_SIDE = len(_POINTS) + 1


def _matrices() -> tuple[Any, Any, Any]:
    """B^T [6,6], G [6,3] and A^T [4,6] of the paper's equation 8: transforms of image, filter and result, along one side."""
    others = [[other for other in _POINTS if other != point] for point in _POINTS]
    image = [[*np.poly(roots)[::-1], 0.0] for roots in others] + [[*np.poly(_POINTS)[::-1]]]
    weights = [1 / np.prod(np.subtract(point, roots)) for point, roots in zip(_POINTS, others, strict=True)]
    filters = np.vstack([np.multiply.outer(weights, np.ones(3)) * np.vander(_POINTS, 3, increasing=True), [0, 0, 1]])
    result = np.hstack([np.vander(_POINTS, TILE, increasing=True).T, np.eye(TILE)[:, -1:]])
    return np.array(image), filters, result


_IMAGE, _FILTER, _RESULT = _matrices()


class Winograd(torch.autograd.Function):
    """Convolve images [B,H,W,inputs] with weights [outputs,inputs,3,3], zeros around them: [B,H,W,outputs].

    All float32, the images contiguous; both numbers of channels are multiples of LANES.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return _convolve(images, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (images, weight), gradient = ctx.saved_tensors, gradients[0].contiguous()
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = _convolve(gradient, weight.flip(2, 3).transpose(0, 1))
        if ctx.needs_input_grad[1]:
            products = _correlate(gradient, images)
            taps = _filter_matrix().T @ products.flatten(1)
            of_weight = taps.view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1)
        return of_images, of_weight


def _convolve(images: Tensor, weight: Tensor) -> Tensor:
    (count, height, width, inputs), outputs = images.shape, len(weight)
    filters = _memory("filters", _SIDE**2, weight.numel() // 9)
    torch.mm(_filter_matrix(), weight.permute(2, 3, 0, 1).reshape(9, -1), out=filters)
    filters = filters.view(_SIDE**2, outputs, inputs).transpose(1, 2)
    results = images.new_empty(count, height + -height % TILE, width + -width % TILE, outputs)

    def convolve(pairs: Pairs) -> None:
        for pixels, result in pairs:
            tiles = _transformed(pixels, _PIXELS)
            products = _planes("products", tiles.shape[1], outputs)
            torch.bmm(tiles, filters, out=products)
            _run(_PRODUCTS, products, result)

    _in_threads(convolve, _shares(images, results))
    return results[:, :height, :width].contiguous()


def _correlate(gradient: Tensor, images: Tensor) -> Tensor:
    """[36,outputs,inputs]: the products of gradients of results [B,H,W,outputs] and of images, summed over all tiles."""
    shares = _shares(gradient, images)
    totals = _memory("totals", len(shares), _SIDE**2, gradient.shape[3], images.shape[3])

    def correlate(pairs: Pairs, total: Tensor) -> None:
        total.zero_()
        for result, pixels in pairs:
            total.baddbmm_(_transformed(result, _GRADIENT).transpose(1, 2), _transformed(pixels, _PIXELS))

    _in_threads(correlate, shares, totals)
    for total in totals[1:]:
        totals[0] += total
    return totals[0]


def _shares(first: Tensor, second: Tensor) -> list[Pairs]:
    """Give each thread its share of the images [B,H,W,C] of both, in pairs of groups whose transforms fit into the cache.

    The groups depend on the shapes and the number of threads alone, so sums over them round the same each time.
    """
    (count, height, width, channels), others = first.shape, second.shape[3]
    tiles, share = -(-height // TILE) * -(-width // TILE), -(-count // torch.get_num_threads())
    floats = max(FLOATS, _SIDE**2 * channels * others)  # the filters are read once a group
    group = max(1, floats // (_SIDE**2 * tiles * (channels + others)))
    return [
        list(zip(ours.split(group), theirs.split(group), strict=True))
        for ours, theirs in zip(first.split(share), second.split(share), strict=True)
    ]


def _in_threads(work: Callable[..., None], shares: list[Pairs], *more: Iterable[Tensor]) -> None:
    """Call `work` for each share, all at the same time."""
    threads = torch.get_num_threads()
    for _ in (map if threads == 1 else _pool(threads).map)(torch.no_grad()(work), shares, *more):
        pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Start threads in which torch computes with one thread each. While they wait they take no time from other programs."""
    pool, all_there = ThreadPoolExecutor(threads, "winograd", _compute_alone), Barrier(threads, timeout=60)
    list(pool.map(lambda _: all_there.wait(), range(threads)))
    torch.set_num_threads(threads)  # threads that start later take the number that was set last
    return pool


def _compute_alone() -> None:
    torch.get_num_threads()  # takes the number that was set last; later it would undo what comes next
    torch.set_num_threads(1)


def _transformed(images: Tensor, kind: int) -> Tensor:
    """[36,tiles,C] of images, or of gradients of results, [B,H,W,C]."""
    (count, height, width, channels), edge = images.shape, 1 if kind == _PIXELS else 0
    below, right = -height % TILE, -width % TILE
    if edge or below or right:
        images = F.pad(images, (0, 0, edge, edge + right, edge, edge + below))
    planes = _planes(str(kind), count * (height + below) // TILE * (width + right) // TILE, channels)
    _run(kind, planes, images)
    return planes


def _planes(use: str, tiles: int, channels: int) -> Tensor:
    """Memory for [36,tiles,C]. Planes lie a line apart, as a cache holds few lines whose addresses end alike."""
    return _memory(use, _SIDE**2, tiles * channels + _LINE)[:, :-_LINE].view(-1, tiles, channels)


def _memory(use: str, *shape: int) -> Tensor:
    """Give floats of this thread that hold nothing, the same ones for the same use: the kernel need not clear new ones."""
    kept, size = _kept.__dict__, math.prod(shape)
    if use not in kept or len(kept[use]) < size:
        kept[use] = torch.empty(size)
    floats: Tensor = kept[use][:size]
    return floats.view(shape)


_kept = local()


@cache
def _filter_matrix() -> Tensor:
    """[36,9]: the transform of a filter along both sides."""
    return torch.tensor(np.kron(_FILTER, _FILTER), dtype=torch.float32)


def _run(kind: int, planes: Tensor, images: Tensor) -> None:
    """Transform one into the other."""
    flat = planes.as_strided((planes.stride(0) * len(planes) - _LINE,), (1,)).detach().numpy()
    _transform(kind, flat, planes.stride(0), images.detach().numpy())


# ---- compiled -------------------------------------------------------------------------------------------------------


def _along_both_sides(matrix: Any) -> Any:
    """Make a compiled function of tiles X that computes matrix @ X @ matrix.T, for LANES channels.

    It takes the source, the place in it, the steps to the next row and column, and the same of the target. Written as LLVM code
    because Numba leaves LLVM's vectoriser of straight-line code off.
    """
    lanes, index = ir.VectorType(ir.FloatType(), LANES), types.intp

    def combine(builder: Any, factors: Any, values: list[Any]) -> Any:
        """Add up the products of factors and vectors. Signs of zeros may change, but what is not finite stays so."""
        flags = ["contract", "reassoc", "nsz"]
        total = ir.Constant(lanes, [0.0] * LANES)
        for factor, value in zip(factors, values, strict=True):
            if factor:
                product = builder.fmul(value, ir.Constant(lanes, [float(factor)] * LANES), flags=flags)
                total = builder.fadd(total, product, flags=flags)
        return total

    @intrinsic
    def transform(
        _: Any, source: Any, start: Any, row: Any, column: Any, target: Any, at: Any, down: Any, right: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def vector(array: int, i: int, j: int) -> Any:
                """Pointer to the channels at row i and column j of the tile in one of the two arrays."""
                data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
                place, *steps = arguments[array + 1 : array + 4]
                for number, step in zip((i, j), steps, strict=True):
                    place = builder.add(place, builder.mul(step, step.type(number)))
                return builder.bitcast(builder.gep(data, [place]), lanes.as_pointer())

            size = range(matrix.shape[1])
            tile = [[builder.load(vector(0, i, j), align=4, typ=lanes) for j in size] for i in size]
            rows = [[combine(builder, factors, [tile[i][j] for i in size]) for j in size] for factors in matrix]
            for i, values in enumerate(rows):
                for j, factors in enumerate(matrix):
                    builder.store(combine(builder, factors, values), vector(4, i, j), align=4)
            return context.get_dummy_value()

        return types.void(source, index, index, index, target, index, index, index), generate

    return transform


_PIXELS, _GRADIENT, _PRODUCTS = range(3)  # what is transformed
_pixels, _gradient, _products = (_along_both_sides(matrix) for matrix in (_IMAGE, _RESULT.T, _RESULT))
_FLOATS, _INT = types.float32, types.intp


@njit(types.void(_INT, _FLOATS[::1], _INT, _FLOATS[:, :, :, ::1]), nogil=True, cache=may_cache(_run, "convolutions"))
def _transform(kind: int, planes: Any, step: int, images: Any) -> None:
    """Transform images into planes, of which the next is `step` further on, or products in these into images."""
    count, height, width, channels = images.shape
    edge = 2 if kind == _PIXELS else 0
    down, across, row, flat = (height - edge) // TILE, (width - edge) // TILE, width * channels, images.reshape(-1)
    for image in range(count):
        for y in range(down):
            for x in range(across):
                start = (image * height + y * TILE) * row + x * TILE * channels
                at = ((image * down + y) * across + x) * channels
                for c in range(0, channels, LANES):
                    if kind == _PIXELS:
                        _pixels(flat, start + c, row, channels, planes, at + c, _SIDE * step, step)
                    elif kind == _GRADIENT:
                        _gradient(flat, start + c, row, channels, planes, at + c, _SIDE * step, step)
                    else:
                        _products(planes, at + c, _SIDE * step, step, flat, start + c, row, channels)
