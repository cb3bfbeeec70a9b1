"""DeformConv's kernels, in Triton's interpreter, against torchvision's operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.errors import InputError
from trt_plugins.deform_conv import DeformConv
from trt_plugins.deform_conv.operator import pack_weight, tiling
from trt_plugins.deform_conv.reference import deform_conv, packed_inputs, unpacked_weight
from trt_plugins.on_torch import run, spec_of
from trt_plugins.operator import TensorSpec

PLAIN: dict[str, Any] = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
SINGLE: dict[str, Any] = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}


def _inputs(
    shape: Sequence[int],
    outputs: int,
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
    modulated: bool = False,
    convolution: dict[str, Any] = PLAIN,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """x of `shape`, and the rest so that values of y are around 1 and many samples lie outside."""
    n, channels, *size = shape
    generator = torch.Generator().manual_seed(0)
    taps = groups * kernel[0] * kernel[1]
    height, width = F.conv2d(
        torch.zeros(1, 1, *size),
        torch.zeros(1, 1, *kernel),
        stride=convolution["strides"],
        padding=convolution["pads"][:2],
        dilation=convolution["dilations"],
    ).shape[2:]
    x = torch.randn(n, channels, *size, generator=generator)
    weight = torch.randn(outputs, channels, *kernel, generator=generator) / math.sqrt(channels * kernel[0] * kernel[1])
    offset = 2 * torch.randn(n, 2 * taps, height, width, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    mask = torch.rand(n, taps, height, width, generator=generator)
    return [tensor.to(dtype) for tensor in ([x, weight, offset, bias, mask] if modulated else [x, weight, offset, bias])]


def _run(
    inputs: Sequence[Tensor],
    groups: int = 1,
    kernel: tuple[int, int] = (3, 3),
    convolution: dict[str, Any] = PLAIN,
    relu: int = 0,
) -> list[Tensor]:
    operator = DeformConv(kernel_shape=kernel, **convolution, offset_group=groups, relu=relu)
    return run(operator, packed_inputs(inputs, groups))


def _half_bound(inputs: Sequence[Tensor], expected: Tensor, convolution: dict[str, Any]) -> Tensor:
    """What float16 may differ by from a float32 result: samples and y are rounded once each, by 2^-11 of themselves."""
    x, weight, offset, bias, *mask = inputs
    products = deform_conv(x.abs().float(), weight.abs().float(), offset, torch.zeros_like(bias), *mask, **convolution)
    return 1.01 * 2.0**-11 * (products + expected.float().abs()) + 1e-5


@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "groups", "modulated", "convolution", "relu"),
    [
        ((2, 8, 12, 13), 8, (3, 3), 1, False, PLAIN, 1),
        ((1, 48, 5, 4), 20, (3, 3), 2, True, PLAIN, 0),
        ((1, 9, 9, 8), 5, (3, 2), 3, False, {"strides": (2, 1), "pads": (2, 1, 2, 1), "dilations": (2, 1)}, 0),
        ((1, 4, 7, 9), 3, (1, 3), 1, True, {"strides": (1, 3), "pads": (0, 2, 0, 2), "dilations": (1, 2)}, 1),
        ((1, 32, 3, 3), 130, (1, 1), 1, False, SINGLE, 0),
    ],
    ids=["many-tiles", "groups-and-mask", "stride-and-dilation", "wide-kernel", "two-blocks-of-outputs"],
)
def test_agrees_with_torchvision(
    shape: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, int],
    groups: int,
    modulated: bool,
    convolution: dict[str, Any],
    relu: int,
) -> None:
    inputs = _inputs(shape, outputs, kernel, groups, modulated, convolution)
    [y] = _run(inputs, groups, kernel, convolution, relu)
    # float32 sums of at most 432 terms, in another order.
    torch.testing.assert_close(y, deform_conv(*inputs, **convolution, relu=bool(relu)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("groups", "modulated"), [(1, False), (2, True)])
def test_half_differs_by_its_roundings_alone(groups: int, modulated: bool) -> None:
    inputs = _inputs((1, 40, 6, 7), 24, groups=groups, modulated=modulated, dtype=torch.float16)
    [y] = _run(inputs, groups)
    assert y.dtype == torch.float16
    expected = deform_conv(*(tensor.float() for tensor in inputs), **PLAIN)
    assert ((y.float() - expected).abs() <= _half_bound(inputs, expected, PLAIN)).all()


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    offset=st.lists(
        st.one_of(
            st.floats(-7, 7, width=32),
            st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 1e9, -1e9, 3e38, -3e38, math.inf, -math.inf]),
        ),
        min_size=50,
        max_size=50,
    ),
)
def test_samples_fade_to_zero_beyond_the_border(size: tuple[int, int], offset: list[float]) -> None:
    height, width = size
    x = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor(offset)[: 2 * height * width].view(1, 2, height, width)
    inputs = [x, torch.ones(1, 2, 1, 1), offsets, torch.zeros(1)]
    [y] = _run(inputs, kernel=(1, 1), convolution=SINGLE)
    torch.testing.assert_close(y, deform_conv(*inputs, **SINGLE), atol=1e-5, rtol=1e-5)


def test_without_offsets_it_is_a_convolution() -> None:
    x, weight, offset, bias = _inputs((1, 6, 5, 6), 7)
    [y] = _run([x, weight, torch.zeros_like(offset), bias])
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("outputs", "channels", "kernel", "groups"), [(5, 6, (3, 2), 3), (130, 32, (1, 1), 1), (8, 34, (3, 3), 2)])
def test_a_packed_weight_has_each_item_in_its_place_and_zeros(
    outputs: int, channels: int, kernel: tuple[int, int], groups: int, dtype: npt.DTypeLike
) -> None:
    weight = np.arange(1, outputs * channels * math.prod(kernel) + 1).reshape(outputs, channels, *kernel).astype(dtype)
    packed = pack_weight(weight, groups)
    each, width = channels // groups, kernel[1]
    assert packed.dtype == dtype and packed.shape[2] % 16 == 0 and np.count_nonzero(packed) == weight.size
    for group, tap, channel, output in np.ndindex(groups, math.prod(kernel), each, outputs):
        assert packed[group, tap, channel, output] == weight[output, group * each + channel, tap // width, tap % width]
    torch.testing.assert_close(unpacked_weight(torch.from_numpy(packed), channels, outputs, kernel), torch.from_numpy(weight))


def test_offsets_of_any_content_read_within_the_map() -> None:
    """Memory of any content is what plugins are timed on while an engine is built."""
    memory = torch.full((3, 4, 5, 6), math.nan)
    memory[1] = 1.0
    _, weight, offset, bias = _inputs((1, 4, 5, 6), 8)
    offset[0, :, 0] = math.nan
    offset[0, :, 2], offset[0, :, 3] = 3e38, -3e38
    [y] = _run([memory[1:2], weight, offset, bias])
    # A NaN offset gives NaN where its pixel is, and a place beyond the map 0.
    assert y[:, :, 0].isnan().all() and y[:, :, 1:].isfinite().all()


def test_no_instance_launches_nothing() -> None:
    inputs = packed_inputs(_inputs((0, 8, 6, 5), 4))
    operator = DeformConv(**PLAIN, kernel_shape=(3, 3), offset_group=1)
    [y] = run(operator, inputs)
    assert y.shape == (0, 4, 6, 5)
    [launch] = operator.launches([spec_of(tensor) for tensor in inputs], [spec_of(y)])
    assert launch.grid[0] == 0


@given(outputs=st.integers(1, 2000), half=st.booleans())
def test_tiles_hold_at_most_64_sums_a_thread_and_take_all_outputs_up_to_128(outputs: int, half: bool) -> None:
    tile = tiling(outputs, "float16" if half else "float32")
    assert tile.block_p * tile.block_o <= 64 * 32 * tile.num_warps
    assert tile.block_o >= min(outputs, 128)
    # What a GPU without more than the 48 KB that every kernel may take needs to turn the tile on its way out.
    assert tile.block_p * tile.block_o * (2 if half else 4) <= 48 * 1024


def test_the_number_of_instances_alone_may_be_unknown_when_an_engine_is_built() -> None:
    specs = [spec_of(tensor) for tensor in packed_inputs(_inputs((3, 8, 6, 5), 4))]
    varying = [TensorSpec((None, *spec.shape[1:]), spec.dtype) if index in (0, 2) else spec for index, spec in enumerate(specs)]
    operator = DeformConv(**PLAIN, kernel_shape=(3, 3), offset_group=1)
    operator.check_inputs(varying)
    symbolic = [["n", *spec.shape[1:]] if index in (0, 2) else [*spec.shape] for index, spec in enumerate(specs)]
    assert operator.output_shapes(symbolic) == [["n", 4, 6, 5]]
    assert operator.kernels(varying) == operator.kernels(specs), "what is compiled beforehand is what is launched"
    assert operator.workspace(varying).bytes == operator.workspace(specs).bytes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({0: (2, 8, 1, 5)}, "x is 2 x 8 x 1 x 5; give at least 2 rows"),
        ({0: (2, 8, None, 5)}, "x is 2 x 8 x n x 5; give 4 sizes"),
        ({0: (2, 7, 6, 5)}, "x has 7 channels; give a multiple of offset_group 2"),
        ({0: (2, 8, 2**15, 2**15)}, "offset is 2 x 36 x 6 x 5; give 2 x 36 x 32768 x 32768"),
        (
            {0: (2, 8, 2**15, 2**15), 2: (2, 36, 2**15, 2**15), 4: (2, 18, 2**15, 2**15)},
            "x is 8 x 32768 x 32768 for an instance; give fewer than 2",
        ),
        ({0: (2, 8, 2, 2), 1: (2, 81, 16, 8)}, "weight is 2 x 81 x 16 x 8; give 2 x 9 x 16 x 8"),
        ({1: (4, 8, 3, 3)}, "weight is 4 x 8 x 3 x 3; give 2 x 9 x 16 x 8"),
        ({1: (2, 9, 16)}, "weight is 2 x 9 x 16; give 4 sizes"),
        ({2: (2, 18, 6, 5)}, "offset is 2 x 18 x 6 x 5; give 2 x 36 x 6 x 5"),
        ({2: (3, 36, 6, 5)}, "offset is 3 x 36 x 6 x 5; give 2 x 36 x 6 x 5"),
        ({3: (9,)}, "weight is 2 x 9 x 16 x 8; give 2 x 9 x 16 x 16"),
        ({4: (2, 18, 5, 6)}, "mask is 2 x 18 x 5 x 6; give 2 x 18 x 6 x 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[int, tuple[int | None, ...]], sentence: str) -> None:
    specs = [spec_of(tensor) for tensor in packed_inputs(_inputs((2, 8, 6, 5), 4, groups=2, modulated=True), 2)]
    DeformConv("conv1", **PLAIN, kernel_shape=(3, 3), offset_group=2).check_inputs(specs)
    changed = [TensorSpec(change.get(index, spec.shape), spec.dtype) for index, spec in enumerate(specs)]
    with pytest.raises(InputError, match=f"^conv1: DeformConv: {sentence}"):
        DeformConv("conv1", **PLAIN, kernel_shape=(3, 3), offset_group=2).check_inputs(changed)


def test_types_and_a_number_of_inputs_that_do_not_fit_are_refused() -> None:
    specs = [spec_of(tensor) for tensor in packed_inputs(_inputs((1, 4, 4, 4), 4))]
    operator = DeformConv("conv1", **PLAIN, kernel_shape=(3, 3), offset_group=1)
    with pytest.raises(InputError, match="conv1: DeformConv: it has 3 inputs"):
        operator.check_inputs(specs[:3])
    with pytest.raises(InputError, match="conv1: DeformConv: offset is float16"):
        operator.check_inputs([*specs[:2], TensorSpec(specs[2].shape, "float16"), specs[3]])
    with pytest.raises(InputError, match="conv1: DeformConv: x is int32"):
        operator.check_inputs([TensorSpec(spec.shape, "int32") for spec in specs])


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel_shape": (3,)},
        {"strides": (1,)},
        {"strides": (0, 1)},
        {"dilations": (1, -1)},
        {"pads": (1, 1)},
        {"pads": (1, 1, 0, 1)},
        {"offset_group": 0},
        {"relu": 2},
    ],
    ids=str,
)
def test_attributes_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^conv1: DeformConv: {next(iter(wrong))} is "):
        DeformConv("conv1", **{**PLAIN, "kernel_shape": (3, 3), "offset_group": 1, **wrong})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "size"), [(256, 14), (128, 28), (64, 56), (32, 112), (32, 28), (16, 56), (8, 112)])
def test_the_models_shapes_agree_with_torchvision_on_a_gpu(channels: int, size: int, dtype: torch.dtype) -> None:
    inputs = [tensor.cuda() for tensor in _inputs((5, channels, size, size), channels, dtype=dtype)]
    [y] = _run(inputs)
    expected = deform_conv(*(tensor.float() for tensor in inputs), **PLAIN)
    if dtype == torch.float16:
        assert ((y.float() - expected).abs() <= _half_bound(inputs, expected, PLAIN)).all()
    else:
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
