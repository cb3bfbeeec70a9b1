"""PasteMasks' kernel, in Triton's interpreter, against its formula and against what the host does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.paste import mask_crop
from tests.trt_plugins.pasting import pasted
from trt_plugins import aot
from trt_plugins.on_torch import spec_of, start
from trt_plugins.operator import TensorSpec
from trt_plugins.paste_masks import PasteMasks
from trt_plugins.paste_masks.operator import paste_kernel
from trt_plugins.paste_masks.reference import paste_masks

HEIGHT, WIDTH = 37, 300
BOXES = [
    [20.3, 5.7, 95.1, 30.2],
    [-30.0, -10.0, 60.0, 20.0],
    [250.0, 20.0, 340.0, 60.0],
    [0.0, 0.0, 300.0, 37.0],
    [40.0, 10.0, 40.0, 10.0],
    [60.0, 30.0, 50.0, 20.0],
    [400.0, 50.0, 500.0, 70.0],
    [10.4, 10.4, 10.6, 10.6],
]
"""In the frame, over its borders, all of it, without area, turned inside out, outside, and around one pixel's centre."""


def smooth(n: int, grid: int) -> torch.Tensor:
    coarse = 4 * torch.randn(n, 1, 5, 5, generator=torch.Generator().manual_seed(grid))
    return torch.nn.functional.interpolate(coarse, (grid, grid), mode="bilinear")[:, 0]


@pytest.mark.parametrize("grid", [14, 28, 56, 112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_are_those_of_the_formula(grid: int, dtype: torch.dtype) -> None:
    logits, boxes = smooth(len(BOXES), grid).to(dtype), torch.tensor(BOXES)
    masks, expected = pasted(logits, boxes, HEIGHT, WIDTH), paste_masks(logits.numpy(), boxes.numpy(), HEIGHT, WIDTH)
    assert [bool(mask.any()) for mask in expected[4:7]] == [False] * 3 and expected[:4].any(axis=(1, 2)).all()
    # Where the probability is 0.5 to the last bits, either is right.
    assert (masks != expected).sum() <= 3


def test_masks_are_those_of_the_host() -> None:
    """OpenCV rounds where it samples to a 32nd of a cell: pixels at the contour may differ."""
    logits, boxes = smooth(len(BOXES), 28), torch.tensor(BOXES)
    host = np.zeros((len(BOXES), HEIGHT, WIDTH), bool)
    for mask, grid, box in zip(host, logits.numpy(), boxes.numpy(), strict=True):
        x0, y0, crop = mask_crop(grid, box, HEIGHT, WIDTH)
        mask[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
    assert (pasted(logits, boxes, HEIGHT, WIDTH) != host).sum() <= 0.002 * host.sum()


@settings(max_examples=10, deadline=None)
@given(
    st.tuples(*[st.floats(-60, 120, width=32)] * 4),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([-9.0, 9.0]),
)
def test_nothing_is_covered_outside_the_box(box: tuple[float, ...], height: int, width: int, logit: float) -> None:
    boxes = torch.tensor([box])
    masks = pasted(torch.full((1, 14, 14), logit), boxes, height, width)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    inside = ((y >= boxes[0, 1].item()) & (y < boxes[0, 3].item()))[:, None] & (x >= boxes[0, 0].item()) & (x < boxes[0, 2].item())
    assert not (masks[0] & ~inside).any()
    assert masks.any() <= (logit > 0)


def test_no_instance_has_no_bits() -> None:
    assert pasted(torch.zeros(0, 28, 28), torch.zeros(0, 4), HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize("row", [[-1, 0, 64, 8, -5, 0], [0, 0, 4000, 4000, 0, 0], [0, 0, 64, 8, 1 << 30, 0], [0, 0, -40, -3, 2, 7]])
def test_wrong_windows_write_nothing_outside_of_the_bits(row: list[int]) -> None:
    words, guard = 16, 64
    memory = torch.full((guard + words + guard,), 0x5A5A5A5A, dtype=torch.int32)
    operator, logits = PasteMasks(words=words), torch.full((1, 14, 14), 9.0)
    inputs = [logits, torch.tensor([[0.0, 0, 64, 8]]), torch.tensor([row], dtype=torch.int32), torch.tensor([0, -1, 7], dtype=torch.int32)]
    bits = memory[guard : guard + words]
    for launch in operator.launches([spec_of(tensor) for tensor in inputs], [spec_of(bits)]):
        start(launch, inputs, [bits], torch.empty(0, dtype=torch.uint8))
    assert (memory[:guard] == 0x5A5A5A5A).all() and (memory[guard + words :] == 0x5A5A5A5A).all()


def test_the_kernel_compiles_without_spills(tmp_path) -> None:  # type: ignore[no-untyped-def]
    specs = [paste_kernel(grid, "float16") for grid in (14, 112)]
    for kernel in aot.compile_kernels(specs, ["8.7", "9.0"], processes=1, cache=tmp_path).kernels:
        assert kernel.spills in (None, 0) and kernel.shared <= 48 * 1024


LOGITS, BOX, WINDOW, OWNER = (
    TensorSpec((None, 28, 28), "float16"),
    TensorSpec((None, 4), "float32"),
    TensorSpec((None, 6), "int32"),
    TensorSpec((None,), "int32"),
)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([LOGITS], "1 inputs"),
        ([TensorSpec((None, 28, 14), "float16"), BOX, WINDOW, OWNER], "the logits are"),
        ([TensorSpec((None, None, None), "float16"), BOX, WINDOW, OWNER], "G known"),
        ([TensorSpec((3, 28, 28), "int32"), BOX, WINDOW, OWNER], "the logits are .* int32"),
        ([LOGITS, TensorSpec((None, 4), "float16"), WINDOW, OWNER], "the boxes are"),
        ([TensorSpec((3, 28, 28), "float32"), TensorSpec((2, 4), "float32"), WINDOW, OWNER], r"the boxes are \(2, 4\)"),
        ([LOGITS, BOX, TensorSpec((None, 5), "int32"), OWNER], "the windows are"),
        ([LOGITS, BOX, WINDOW, TensorSpec((None,), "int64")], "the owners are"),
    ],
)
def test_wrong_inputs_are_refused(inputs: list[TensorSpec], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PasteMasks(words=8).check_inputs(inputs)


def test_negative_room_is_refused() -> None:
    with pytest.raises(InputError, match="paste: PasteMasks: words is -1"):
        PasteMasks("paste", words=-1)
