"""Workspaces at a profile's largest sizes hold every smaller run, and grids and places stay within CUDA's and the kernels' limits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trt_plugins.detections import Detections
from trt_plugins.operator import Operator, TensorSpec
from trt_plugins.proposals import Proposals

STRIDES = (4, 8, 16, 32, 64)
LARGEST = (16, 1344, 1344)
"""Images, height and width."""
SIDES = st.integers(1, 1344 // 32).map(lambda cells: 32 * cells)


def proposals(images: int, height: int, width: int, per_level: int) -> tuple[Operator, list[TensorSpec]]:
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    maps = [TensorSpec((images, channels, *size), "float16") for channels in (3, 12) for size in sizes]
    operator = Proposals(strides=STRIDES, per_level=per_level, proposals=1000, nms_threshold=0.7)
    return operator, [*maps, TensorSpec((5, 3, 4), "float32")]


def detections(images: int, height: int, width: int, classes: int) -> tuple[Operator, list[TensorSpec]]:
    operator = Detections(proposals=1000, stride=4, detections=100, candidates=1000, score_threshold=0.05, nms_threshold=0.5)
    rows = 1000 * images
    shapes: list[tuple[int, ...]] = [(rows, classes + 1), (rows, 4 * classes + 4), (rows, 4)]
    inputs = [TensorSpec(shape, "float32") for shape in shapes]
    return operator, [
        *inputs,
        TensorSpec((images,), "int32"),
        TensorSpec((), "float32"),
        TensorSpec((images, 64, height // 4, width // 4), "float32"),
    ]


@pytest.mark.parametrize(
    ("make", "argument"),
    [(proposals, 100), (proposals, 1000), (proposals, 4096), (detections, 80), (detections, 1203)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@settings(max_examples=30, deadline=None)
@given(images=st.integers(1, LARGEST[0]), height=SIDES, width=SIDES)
def test_the_largest_run_has_the_largest_workspace(make: object, argument: int, images: int, height: int, width: int) -> None:
    assert callable(make)
    largest, smaller = make(*LARGEST, argument), make(images, height, width, argument)
    most = largest[0].workspace(largest[1]).bytes
    assert smaller[0].workspace(smaller[1]).bytes <= most
    for operator, inputs in (largest, smaller):
        assert all(math.prod(spec.shape) < 2**31 for spec in inputs)
        for launch in operator.launches(inputs, operator.max_output_specs(inputs)):
            x, y, z = launch.grid
            assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16
