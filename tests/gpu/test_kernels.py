"""The kernels on a GPU at the sizes of r50 and lite0, against torchvision's operators and the operators' PyTorch references.

What DeformConv, Proposals and Detections do at their commonest sizes stands in their own tests, also marked `gpu`. `scripts/gpu_checks.sh`
runs this file under NVIDIA's compute-sanitizer too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from dynamask.config import LITE0, R50, ModelConfig
from dynamask.detector import CANDIDATES_PER_DETECTION, RPN_NMS_THRESHOLD
from dynamask.msm import Budget
from runtime.bench import random_boxes
from runtime.graph import GRIDS
from tests.trt_plugins.pasting import pasted
from trt_plugins.deform_conv import DeformConv
from trt_plugins.deform_conv.reference import deform_conv, packed_inputs
from trt_plugins.detections import Detections
from trt_plugins.detections.reference import detect
from trt_plugins.msm_route import MsmRoute
from trt_plugins.msm_route.reference import msm_route
from trt_plugins.on_torch import run
from trt_plugins.paste_masks.reference import paste_masks
from trt_plugins.proposals import Proposals
from trt_plugins.proposals.reference import propose
from trt_plugins.roi_align import RoiAlign
from trt_plugins.roi_align.reference import roi_align

pytestmark = pytest.mark.gpu

STRIDES = (4, 8, 16, 32, 64)
COSTS = (0.231, 0.543, 0.904, 1.363)
PRESETS = pytest.mark.parametrize("preset", [R50, LITE0], ids=lambda preset: preset.preset)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
COUNTS = pytest.mark.parametrize("n", [0, 1, 100])
BATCHES = pytest.mark.parametrize("batch", [1, 3])


class Tolerance(NamedTuple):
    """Of values around 1: float16 rounds the output, and in DeformConv the samples."""

    atol: float
    rtol: float


TOLERANCES = {torch.float32: Tolerance(2e-4, 2e-4), torch.float16: Tolerance(4e-3, 4e-3)}


def _random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def _boxes(preset: ModelConfig, n: int) -> Tensor:
    return torch.from_numpy(random_boxes(n, *preset.canvas, np.random.default_rng(n))).reshape(n, 4).cuda()


def _sizes(preset: ModelConfig) -> list[tuple[int, int]]:
    return [(-(-preset.canvas[0] // stride), -(-preset.canvas[1] // stride)) for stride in STRIDES]


def _finest_map(preset: ModelConfig, batch: int = 1) -> Tensor:
    return torch.empty(batch, 1, *_sizes(preset)[0], device="cuda")


def _detections(preset: ModelConfig, score_threshold: float, nms_threshold: float) -> Detections:
    limits: dict[str, Any] = {"proposals": preset.proposals, "stride": STRIDES[0], "detections": preset.detections}
    limits["candidates"] = CANDIDATES_PER_DETECTION * preset.detections
    return Detections(**limits, score_threshold=score_threshold, nms_threshold=nms_threshold)


def _close(found: Tensor, expected: Tensor) -> None:
    atol, rtol = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=rtol)


@DTYPES
@COUNTS
@pytest.mark.parametrize(("groups", "modulated"), [(1, False), (2, True)], ids=["version 1", "version 2, groups"])
def test_deform_conv(groups: int, modulated: bool, n: int, dtype: torch.dtype) -> None:
    channels, size, taps = 64, 56, 9 * groups
    convolution: dict[str, Any] = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
    weight = _random(channels, channels, 3, 3, dtype=dtype, seed=1) / (9 * channels) ** 0.5
    inputs = [_random(n, channels, size, size, dtype=dtype), weight, _random(n, 2 * taps, size, size, dtype=dtype, seed=2)]
    inputs += [
        _random(channels, dtype=dtype, seed=3),
        *([_random(n, taps, size, size, dtype=dtype, seed=4).sigmoid()] if modulated else []),
    ]
    [y] = run(DeformConv(kernel_shape=(3, 3), **convolution, offset_group=groups, relu=1), packed_inputs(inputs, groups))
    if n == 0:
        assert y.shape == (0, channels, size, size)
    else:
        _close(y, deform_conv(*inputs, **convolution, relu=True))


@PRESETS
@DTYPES
@COUNTS
@pytest.mark.parametrize(("size", "aligned"), [(7, 0), (14, 1)], ids=["box region", "mask region"])
def test_roi_align_on_a_pyramid(preset: ModelConfig, size: int, aligned: int, n: int, dtype: torch.dtype) -> None:
    maps = [_random(1, preset.fpn_channels, *level, dtype=dtype, seed=seed) for seed, level in enumerate(_sizes(preset)[:4])]
    operator = RoiAlign(strides=STRIDES[:4], size=size, samples=2, aligned=aligned, canonical_size=7.0 * preset.anchor_sizes[0])
    rois = _boxes(preset, n)
    if n:
        rois[0] = torch.tensor([-30.0, -20.0, 2.0 * preset.canvas[1], 40.0])
    [regions] = run(operator, [*maps, rois])
    _close(regions, roi_align(maps, rois, **operator.values))


@DTYPES
@pytest.mark.parametrize("placed", [False, True])
def test_roi_align_of_a_batch(placed: bool, dtype: torch.dtype) -> None:
    maps = [_random(3, LITE0.fpn_channels, *level, dtype=dtype, seed=seed) for seed, level in enumerate(_sizes(LITE0)[:4])]
    values: dict[str, Any] = {"strides": STRIDES[:4], "size": 7, "samples": 2, "aligned": 1, "canonical_size": 224.0}
    operator = RoiAlign(**values, per_image=20)
    places = torch.randint(60, (60,), generator=torch.Generator().manual_seed(0)).cuda() if placed else None
    rois = _boxes(LITE0, 60)
    [regions] = run(operator, [*maps, rois, *([] if places is None else [places])])
    _close(regions, roi_align(maps, rois, **operator.values, places=places))


@PRESETS
@DTYPES
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_roi_align_of_a_stage(preset: ModelConfig, stage: int, dtype: torch.dtype) -> None:
    stride = (32, 16, 8, 4)[stage]
    operator = RoiAlign(strides=(stride,), size=GRIDS[stage], samples=1, aligned=1)
    lateral = _random(1, preset.stage_channels[stage], preset.canvas[0] // stride, preset.canvas[1] // stride, dtype=dtype)
    rois = _boxes(preset, 50)
    [regions] = run(operator, [lateral, rois])
    _close(regions, roi_align([lateral], rois, **operator.values))


@DTYPES
@BATCHES
def test_proposals(batch: int, dtype: torch.dtype) -> None:
    """lite0's; deltas are 0, so that boxes and their IoUs are the same to the bit."""
    cells = torch.stack(AnchorGenerator(tuple((size,) for size in LITE0.anchor_sizes), ((0.5, 1.0, 2.0),) * 5).cell_anchors)
    logits = [_random(batch, 3, *size, dtype=dtype, seed=seed) for seed, size in enumerate(_sizes(LITE0))]
    deltas = [torch.zeros(batch, 12, *size, dtype=dtype, device="cuda") for size in _sizes(LITE0)]
    limits: dict[str, Any] = {"per_level": LITE0.proposals_per_level, "proposals": LITE0.proposals, "nms_threshold": RPN_NMS_THRESHOLD}
    operator = Proposals(strides=STRIDES, **limits)
    found = run(operator, [*logits, *deltas, cells.cuda()])
    on_cpu = [x.cpu() for x in (*logits, *deltas)]
    wanted = propose(on_cpu[:5], on_cpu[5:], cells, **operator.values)
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got.cpu(), expected)


@DTYPES
@pytest.mark.parametrize("counts", [[0], [1], [LITE0.proposals], [LITE0.proposals, 0, 20]], ids=str)
def test_detections(counts: list[int], dtype: torch.dtype) -> None:
    """lite0's; deltas are 0 and corners whole numbers, so that IoUs are the same to the bit."""
    rows, classes = LITE0.proposals * len(counts), 80
    operator = _detections(LITE0, LITE0.score_threshold, LITE0.nms_threshold)
    logits, deltas = 2 * _random(rows, classes + 1, dtype=dtype), torch.zeros(rows, 4 * (classes + 1), dtype=dtype, device="cuda")
    boxes = _boxes(LITE0, rows).round()
    count = torch.tensor(counts, dtype=torch.int32, device="cuda")
    inputs = [logits, deltas, boxes, count, torch.tensor(0.1, device="cuda"), _finest_map(LITE0, len(counts))]
    found = run(operator, inputs)
    reference: Callable[..., tuple[Tensor, ...]] = detect
    for got, expected in zip(found, reference(*(x.cpu() for x in inputs), **operator.values), strict=True):
        torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=0)


@PRESETS
@DTYPES
@pytest.mark.parametrize(("n", "batch"), [(0, 1), (1, 1), (100, 1), (100, 8)])
@pytest.mark.parametrize(("budget", "total"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.6), (0.7, 0.6)])
def test_msm_route(preset: ModelConfig, budget: float, total: float, n: int, batch: int, dtype: torch.dtype) -> None:
    operator = MsmRoute(batch=batch, stride=STRIDES[0], detections=preset.detections)
    n *= batch
    override = torch.tensor([-1, -1, -1, 0, 1, 2, 3, 4] * n, dtype=torch.int64)[:n]
    slots = torch.randperm(preset.detections * batch, generator=torch.Generator().manual_seed(n))[:n]
    inputs = [_random(n, 4, dtype=dtype), _boxes(preset, n), override.cuda(), slots.cuda()]
    limits = Budget(torch.tensor(budget), torch.tensor(total * n), torch.tensor([COSTS, [0.1, 0.2, 0.2, 0.5]]))
    inputs += [*(tensor.cuda() for tensor in limits), _finest_map(preset, batch)]
    reference: Callable[..., list[Tensor]] = msm_route
    expected = reference(*(x.cpu() for x in inputs), stride=STRIDES[0], detections=preset.detections)
    for name, got, wanted in zip(operator.outputs, run(operator, inputs), expected, strict=True):
        assert torch.equal(got.cpu(), wanted), name


@PRESETS
@DTYPES
@COUNTS
@pytest.mark.parametrize("grid", GRIDS)
def test_paste_masks(preset: ModelConfig, grid: int, n: int, dtype: torch.dtype) -> None:
    height, width = preset.canvas[0] - 3, preset.canvas[1] - 3
    logits = 4 * torch.nn.functional.interpolate(_random(max(n, 1), 1, 5, 5), (grid, grid), mode="bilinear")[:n, 0].to(dtype)
    boxes = _boxes(preset, n)
    expected = paste_masks(logits.cpu().numpy(), boxes.cpu().numpy(), height, width)
    # Where the probability is 0.5 to the last bits, either is right.
    assert (pasted(logits, boxes, height, width) != expected).sum() <= 1e-4 * expected.sum()


def _again(preset: ModelConfig) -> dict[str, Callable[[], list[Tensor]]]:
    x = packed_inputs([_random(20, 32, 112, 112), _random(32, 32, 3, 3), _random(20, 18, 112, 112), _random(32)])
    convolution = DeformConv(kernel_shape=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1), dilations=(1, 1), offset_group=1)
    cells = AnchorGenerator(tuple((size,) for size in preset.anchor_sizes), ((0.5, 1.0, 2.0),) * 5).cell_anchors
    maps = [_random(1, channels, *size, seed=seed) for channels in (3, 12) for seed, size in enumerate(_sizes(preset))]
    limits: dict[str, Any] = {"per_level": preset.proposals_per_level, "proposals": preset.proposals, "nms_threshold": RPN_NMS_THRESHOLD}
    proposals, detections = Proposals(strides=STRIDES, **limits), _detections(preset, 0.05, 0.5)
    rows = preset.proposals
    boxes = [2 * _random(rows, 81), _random(rows, 324), _boxes(preset, rows), torch.tensor([rows], dtype=torch.int32).cuda()]
    return {
        "DeformConv": lambda: run(convolution, x),
        "Proposals": lambda: run(proposals, [*maps, torch.stack(cells).cuda()]),
        "Detections": lambda: run(detections, [*boxes, torch.zeros((), device="cuda"), _finest_map(preset)]),
    }


@pytest.mark.parametrize("name", ["DeformConv", "Proposals", "Detections"])
def test_the_same_inputs_give_the_same_bits(name: str) -> None:
    """Memory is filled with garbage before every run: a race, or a read of what was not written, would show."""
    call = _again(R50)[name]
    first = call()
    for _ in range(20):
        assert all(torch.equal(got, expected) for got, expected in zip(call(), first, strict=True))
