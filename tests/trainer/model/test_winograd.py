"""Winograd's convolutions against torch's in double precision."""

import sys
from collections.abc import Iterator

import numba
import pytest
import torch
from torch import Tensor, nn

from trainer.model import conv_matmul, winograd
from trainer.model.conv_matmul import Convolution

ROUNDING = 5e-6  # of the largest; torch's own convolutions in fp32 come to 2e-6


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def convolution(inputs: int, outputs: int) -> Convolution:
    torch.manual_seed(0)
    return Convolution(inputs, outputs, 3, padding=1, bias=False).to(memory_format=torch.channels_last)


def images(count: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randn(count, channels, height, width).contiguous(memory_format=torch.channels_last)


def results(layer: nn.Conv2d, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of pixels and weights for a fixed gradient of the output."""
    pixels = pixels.clone().requires_grad_()
    layer.zero_grad()
    output = layer(pixels)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    assert pixels.grad is not None and layer.weight.grad is not None
    return output.detach(), pixels.grad, layer.weight.grad


def backward_of(layer: nn.Conv2d, pixels: Tensor) -> str:
    function = layer(pixels).grad_fn
    before = function.next_functions[0][0]
    return f"{type(function).__name__} {type(before).__name__}"


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=ROUNDING * float(wanted.abs().max()))


@pytest.mark.parametrize("size", [(4, 4), (3, 3), (8, 4), (7, 6), (12, 16), (13, 15)])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 24), (32, 64)])
@pytest.mark.parametrize("floats", [winograd.FLOATS, 1], ids=["all_images_at_once", "few_at_a_time"])
def test_output_and_gradients_are_torchs_within_rounding(
    inputs: int, outputs: int, size: tuple[int, int], floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "FLOATS", floats)
    ours, pixels = convolution(inputs, outputs), images(7, inputs, *size)
    assert ours._takes_winograd(pixels)
    theirs = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    mine = results(ours, pixels)
    for got, wanted in zip(mine, results(theirs, pixels.double()), strict=True):
        assert_equal(got, wanted)
    for got, again in zip(mine, results(ours, pixels), strict=True):
        assert torch.equal(got, again)
    output, _, weight = mine
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_each_of_several_threads_computes_alone() -> None:
    threads = torch.get_num_threads()
    results(convolution(16, 16), images(6, 16, 9, 9))
    if threads > 1:
        pool = winograd._pool(threads)
        assert set(pool.map(lambda _: torch.get_num_threads(), range(20))) == {1}
    assert torch.get_num_threads() == threads


def test_a_compiler_sees_one_graph() -> None:
    layer, pixels = convolution(16, 16), images(4, 16, 8, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels), layer(pixels), rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_stays_so() -> None:
    pixels = images(1, 8, 8, 8)
    pixels[0, 0, 2, 2] = torch.nan
    assert convolution(8, 8)(pixels)[0, :, 2, 2].isnan().all()


def test_only_training_in_fp32_on_images_that_fill_the_tiles_takes_it() -> None:
    layer, pixels = convolution(16, 16), images(4, 16, 8, 8)
    assert backward_of(layer, pixels) == "PermuteBackward0 WinogradBackward"
    for height, width in [(2, 2), (1, 9), (5, 5)]:
        assert "Winograd" not in backward_of(layer, images(4, 16, height, width))
    assert not layer._takes_winograd(images(4, 16, 8, 8).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer._takes_winograd(pixels)
    assert not layer.eval()._takes_winograd(pixels)
    assert not Convolution(16, 16, 3, 2, padding=1, bias=False)._takes_winograd(pixels)
    assert not Convolution(12, 16, 3, padding=1, bias=False)._takes_winograd(images(4, 12, 8, 8))
    few = images(1, 512, 4, 4)
    assert not Convolution(512, 512, 3, padding=1, bias=False)._takes_winograd(
        few
    )  # transforming the filters costs more


def test_where_numba_may_not_compile_torch_convolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    monkeypatch.delitem(sys.modules, "trainer.model.winograd", raising=False)
    conv_matmul._winograd.cache_clear()
    try:
        assert "Winograd" not in backward_of(convolution(16, 16), images(4, 16, 8, 8))
    finally:
        conv_matmul._winograd.cache_clear()


def test_without_numba_torch_convolves_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conv_matmul._winograd.cache_clear()
    monkeypatch.setitem(sys.modules, "trainer.model.winograd", None)
    layer, pixels = convolution(16, 16), images(4, 16, 8, 8)
    try:
        for _ in range(2):
            assert "Winograd" not in backward_of(layer, pixels)
    finally:
        conv_matmul._winograd.cache_clear()
    assert capsys.readouterr().err.count("torch convolves") == 1
