"""PasteMasks' kernel, in Triton's interpreter, against its formula and against what the host does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.paste import mask_crop
from trt_plugins import aot
from trt_plugins.on_torch import run
from trt_plugins.operator import TensorSpec
from trt_plugins.paste_masks import PasteMasks
from trt_plugins.paste_masks.reference import paste_masks, unpack

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


def pasted(logits: torch.Tensor, boxes: torch.Tensor, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    [bits] = run(PasteMasks(height=height, width=width), [logits, boxes])
    assert bits.shape == (len(boxes), height, -(-width // 32))
    whole = unpack(bits.numpy(), 32 * bits.shape[2])
    assert not whole[:, :, width:].any(), "nothing beyond the frame"
    return whole[:, :, :width]


@pytest.mark.parametrize("grid", [14, 28, 56, 112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_are_those_of_the_formula(grid: int, dtype: torch.dtype) -> None:
    logits, boxes = smooth(len(BOXES), grid).to(dtype), torch.tensor(BOXES)
    masks, expected = pasted(logits, boxes), paste_masks(logits.numpy(), boxes.numpy(), HEIGHT, WIDTH)
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
    assert (pasted(logits, boxes) != host).sum() <= 0.002 * host.sum()


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
    assert pasted(torch.zeros(0, 28, 28), torch.zeros(0, 4)).shape == (0, HEIGHT, WIDTH)


def test_the_kernel_compiles_without_spills(tmp_path) -> None:  # type: ignore[no-untyped-def]
    specs = [
        spec
        for grid in (14, 112)
        for spec in PasteMasks(height=720, width=1280).kernels(
            [TensorSpec((None, grid, grid), "float16"), TensorSpec((None, 4), "float32")]
        )
    ]
    for kernel in aot.compile_kernels(specs, ["8.7", "9.0"], processes=1, cache=tmp_path).kernels:
        assert kernel.spills in (None, 0) and kernel.shared <= 48 * 1024


LOGITS, GOOD = TensorSpec((None, 28, 28), "float16"), TensorSpec((None, 4), "float32")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([LOGITS], "1 inputs"),
        ([TensorSpec((None, 28, 14), "float16"), GOOD], "the logits are"),
        ([TensorSpec((None, None, None), "float16"), GOOD], "G known"),
        ([TensorSpec((3, 28, 28), "int32"), GOOD], "the logits are .* int32"),
        ([LOGITS, TensorSpec((None, 4), "float16")], "the boxes are"),
        ([TensorSpec((3, 28, 28), "float32"), TensorSpec((2, 4), "float32")], r"the boxes are \(2, 4\)"),
    ],
)
def test_wrong_inputs_are_refused(inputs: list[TensorSpec], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PasteMasks(height=720, width=1280).check_inputs(inputs)


def test_a_frame_without_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="paste: PasteMasks: width is 0"):
        PasteMasks("paste", height=720, width=0)
