"""Times the kernels on an NVIDIA GPU, beside torchvision's operators and inside the mask branch, at the sizes of the preset r50.

A contender's calls are captured in a CUDA graph, repeated until a replay lasts `MIN_REPLAY_MS`. A run is one replay between two events,
from an idle GPU; so the time contains neither Python nor launches. Contenders that read sizes back in Python cannot be captured: their runs
are calls between two events, and the time contains Python's ("calls"). The contenders of a case take turns, in a rotating order. Calls
cycle through enough sets of inputs to exceed the GPU's cache, at most `MAX_SETS`; inputs that do not exceed it stay in the cache, as they
do in an engine.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, deform_conv2d, roi_align

from dynamask.config import R50
from dynamask.detector import CANDIDATES_PER_DETECTION, RPN_NMS_THRESHOLD
from runtime.errors import InputError
from runtime.paste import Crop, covered_pixels, mask_crop
from runtime.timing import take_turns
from trt_plugins.deform_conv import DeformConv
from trt_plugins.detections import Detections
from trt_plugins.msm_route import MsmRoute
from trt_plugins.on_torch import spec_of, start
from trt_plugins.operator import Operator, TensorSpec
from trt_plugins.paste_masks import PasteMasks
from trt_plugins.proposals import Proposals
from trt_plugins.roi_align import RoiAlign
from trt_plugins.roi_align.reference import pyramid_level
from trt_plugins.roi_align.reference import roi_align as reference_roi_align

CANVAS = (800, 1344)
STRIDES = (4, 8, 16, 32, 64)
PYRAMID_CHANNELS = 256
STAGES = ((256, 14), (128, 28), (64, 56), (32, 112))
"""Channels and grid of the r-FPN's stages."""
CROP_STRIDES = (16, 8, 4)
"""Strides of the maps that the stages after the first crop from."""
ANCHOR_SIZES = (32, 64, 128, 256, 512)
CANONICAL_SIZE = 224.0
CLASSES = 80
PROPOSALS = 1000
"""Anchors kept on each level, and proposals in all."""
NMS_THRESHOLDS = {"Proposals": RPN_NMS_THRESHOLD, "Detections": R50.nms_threshold}
SCORE_THRESHOLD = 0.05

KERNEL = "kernel"
"""The contender that a case's others are compared with."""
ROUTED, LARGEST = "mask branch, routed", "mask branch, all at 112"
MIN_REPLAY_MS = 2.0
"""The shortest replay: the start of one, some microseconds, does not count then."""
MAX_SETS = 16
PRECISIONS = (torch.float16, torch.float32)

PLAIN = DeformConv(strides=(1, 1), pads=(1, 1, 1, 1), dilations=(1, 1), offset_group=1)
REGION = RoiAlign(strides=STRIDES[:4], size=STAGES[0][1], samples=2, aligned=1, canonical_size=CANONICAL_SIZE)
CROPS = [RoiAlign(strides=(stride,), size=grid, samples=1, aligned=1) for stride, (_, grid) in zip(CROP_STRIDES, STAGES[1:], strict=True)]

Eager = Callable[[nn.Module, Sequence[Tensor], Tensor, Tensor, Tensor], Sequence[Tensor]]
"""PyTorch's mask branch on (branch, P2..P5, boxes `[n, 4]`, labels `[n]`, override `[n]`): the mask logits at each grid."""


class Work(NamedTuple):
    """The least work of an operator, independent of its implementation."""

    bytes: int
    """Every input read once, every output written once."""
    operations: int
    """Two for each product of the matrices; sampling is not in it."""


class Ceilings(NamedTuple):
    """The GPU's measured peak rates."""

    bandwidth: float
    """Bytes a second, read and written, of a large copy."""
    rates: Mapping[str, float]
    """Type -> operations a second of a large matrix product, in float32 without TF32."""


class Floor(NamedTuple):
    """The lower bound of a kernel's time."""

    ms: float
    limit: str
    """`memory` or `arithmetic`."""


@dataclass(frozen=True)
class Contender:
    """An implementation to time."""

    calls: Sequence[Callable[[], object]]
    """The same on each set of inputs."""
    graph: bool = True
    """Whether a CUDA graph can hold it: it does not wait for the GPU."""


class Case(NamedTuple):
    """Contenders that compute the same."""

    name: str
    dtype: torch.dtype
    contenders: Mapping[str, Contender]
    """`KERNEL` first."""
    work: Work | None = None
    error: float | None = None
    """Of the kernel, by `relative_error`, from torchvision in float32."""


class Batch(NamedTuple):
    """One run of a contender."""

    launch: Callable[[], object]
    calls: int


def bench_kernels(branch: nn.Module, eager: Eager, boxes: Tensor, counts: Sequence[int], runs: int = 100) -> dict[str, Any]:
    """Time every operator, and the mask branch with the kernels in it.

    Args:
        branch: r50's mask branch for `CLASSES` classes (`dynamask.model.MaskBranch`), in evaluation mode; it is left as it is.
        eager: the branch in PyTorch, for peer; in float16 it is called under autocast, where torchvision's operators work in float32.
        boxes: `[n, 4] float32`, the instances', xyxy in pixels of `CANVAS`.
        counts: how many of them end at 14, 28, 56 and 112.
        runs: of every contender; medians are given.

    Returns:
        `instances`, `distribution`, `runs`, `device` (`name`, `compute_capability`, `cache_bytes`), `tf32` of PyTorch's convolutions and
        matrix products, `ceilings` (`bandwidth` bytes/s, `rates` by type, operations/s), and `cases`: each with `name`, `dtype`, `error`
        (or None), `times` by contender (`median_ms`, `p10_ms`, `p90_ms`, `calls` in a run, `timing` graph or calls), `speedup` (each
        other contender's median over the kernel's), and for DeformConv `bytes`, `operations`, `floor_ms`, `limit`, `roofline_share`;
        and `routed_over_largest`, which is of the mask branch.

    Raises:
        InputError: there is no GPU, Triton's interpreter is on, or there are no boxes or too few runs.
    """
    if runs < 2 or not len(boxes) or sum(counts) != len(boxes):
        raise InputError(f"{len(boxes)} instances, {list(counts)} at the grids, and {runs} runs: give some boxes, all counted, and 2 runs.")
    check_gpu()
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    torch.manual_seed(0)
    with torch.inference_mode():
        ceilings = measure_ceilings(runs)
        cases = [_measured(case, ceilings, runs) for case in _cases(copy.deepcopy(branch).to(device), eager, boxes.to(device), counts)]
    return {
        "instances": len(boxes),
        "distribution": list(counts),
        "runs": runs,
        "device": {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cache_bytes": properties.L2_cache_size,
        },
        "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32},
        "ceilings": {"bandwidth": ceilings.bandwidth, "rates": dict(ceilings.rates)},
        "cases": cases,
        "routed_over_largest": routed_over_largest(cases),
    }


def check_gpu() -> None:
    """Check that kernels can run on a GPU.

    Raises:
        InputError: PyTorch finds no GPU, or Triton's interpreter is on.
    """
    if not torch.cuda.is_available():
        raise InputError("The kernels are timed on an NVIDIA GPU, and PyTorch finds none here; run this where there is one.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET=1 is in the environment, so that Triton would interpret its kernels; unset it and start again.")


def deform_conv_work(inputs: Sequence[Tensor], outputs: Tensor) -> Work:
    """A DeformConv's work from its inputs, x, weight `[O, C, kh, kw]`, ..., and its output `[n, O, Ho, Wo]`."""
    _, channels, *kernel = inputs[1].shape
    return Work(_bytes([*inputs, outputs]), 2 * outputs.numel() * channels * math.prod(kernel))


def roofline(work: Work, dtype: str, ceilings: Ceilings) -> Floor:
    """The longer of moving the bytes and doing the operations (Williams et al., CACM 2009)."""
    memory, arithmetic = work.bytes / ceilings.bandwidth, work.operations / ceilings.rates[dtype]
    return Floor(1000 * max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic")


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile of two times or more."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {"median_ms": statistics.median(times), "p10_ms": deciles[0], "p90_ms": deciles[-1]}


def routed_over_largest(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Type -> contender -> the mask branch's median when routed over that with all instances at 112."""
    routed, largest = ({case["dtype"]: case["times"] for case in cases if case["name"].startswith(name)} for name in (ROUTED, LARGEST))
    return {
        dtype: {name: each["median_ms"] / largest[dtype][name]["median_ms"] for name, each in times.items()}
        for dtype, times in routed.items()
    }


def input_sets(size: int, cache: int) -> int:
    """The number of sets of inputs and outputs, `size` bytes each, that exceed twice a cache of `cache` bytes; at most `MAX_SETS`."""
    return min(max(-(-2 * cache // size), 1), MAX_SETS)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value, in float32."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def launch(operator: Operator, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The operator's outputs, data-dependent ones with room for their largest size: nothing is filled, and nothing waits for the GPU."""
    specs = [spec_of(tensor) for tensor in inputs]
    output_specs, device = operator.max_output_specs(specs), inputs[0].device
    outputs = [torch.empty(_shape(spec), dtype=getattr(torch, spec.dtype), device=device) for spec in output_specs]
    workspace = torch.empty(operator.workspace(specs).bytes, dtype=torch.uint8, device=device)
    for each in operator.launches(specs, output_specs):
        start(each, inputs, outputs, workspace)
    return outputs


class KernelDeformConv2d(nn.Module):
    """`dynamask.deform_conv.DeformConv2d` by the kernel: (x `[n, C, H, W]`, offset `[n, 18, H, W]`) -> `[n, O, H, W]`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return launch(PLAIN, [x, self.weight, offset, self.bias])[0]  # type: ignore[list-item]


def with_kernels(branch: nn.Module) -> Any:
    """A copy of the mask branch whose deformable convolutions are the kernel's."""
    branch = copy.deepcopy(branch)
    for stage in branch.rfpn.stages:  # type: ignore[union-attr]
        stage.align, stage.attend = KernelDeformConv2d(stage.align), KernelDeformConv2d(stage.attend)
    return branch


def routed_masks(
    branch: Any, route: MsmRoute, pyramid: Sequence[Tensor], boxes: Tensor, labels: Tensor, override: Tensor, counts: Sequence[int]
) -> list[Tensor]:
    """The mask branch as an engine runs it: regions by RoiAlign, stages and their instances by MsmRoute.

    Args:
        branch: of `with_kernels`.
        route: for as many slots as there are boxes, of stride 4.
        pyramid: P2..P5, `[1, C, H_l, W_l]`.
        boxes: `[n, 4] float32`, xyxy in pixels of the canvas.
        labels: `[n] int64`.
        override: `[n] int64`, the grid of each.
        counts: how many instances end at each grid; given, so that the sizes that MsmRoute writes need not be read back.

    Returns:
        The mask logits at each grid, `[n_g, G, G]`.
    """
    [region] = launch(REGION, [*pyramid, boxes])
    budget, slots = boxes.new_zeros(()), torch.arange(len(boxes), device=boxes.device)
    lists = dict(zip(route.outputs, launch(route, [branch.msm(region), boxes, override, slots, budget, pyramid[0]]), strict=True))
    laterals, feature, logits = branch.rfpn.lateral(pyramid), branch.rfpn.tiny(region), []
    for k, (_, grid) in enumerate(STAGES):
        if k > 0:
            continuing = lists[f"continue_{grid}"][: sum(counts[k:])]
            feature, boxes = feature.index_select(0, continuing), boxes.index_select(0, continuing)
            feature = branch.rfpn.stages[k - 1](feature, launch(CROPS[k - 1], [laterals[k - 1], boxes])[0])
        exiting, slots_out = (lists[f"{name}_{grid}"][: counts[k]] for name in ("exit", "slots"))
        logits.append(branch.heads.mask_logits(k, feature.index_select(0, exiting), labels.index_select(0, slots_out)))
    return logits


def call_times(contenders: Mapping[str, Contender], runs: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """By contender: the milliseconds of a call in each of its runs, and the number of calls in a run. They take turns."""
    batches = {name: _batch(contender) for name, contender in contenders.items()}
    times = take_turns({name: batch.launch for name, batch in batches.items()}, runs, warm_up=0, elapsed_ms=_elapsed_ms)
    calls = {name: batch.calls for name, batch in batches.items()}
    return {name: [time / calls[name] for time in values] for name, values in times.items()}, calls


def measure_ceilings(runs: int) -> Ceilings:
    """A copy of 512 MiB, and cuBLAS's products of square matrices, of 8192 in float16 and of 4096 in float32 without TF32."""
    source = torch.randn(1 << 27, device="cuda")
    sizes = {torch.float16: 8192, torch.float32: 4096}
    contenders = {"copy": Contender([_bound(torch.empty_like(source).copy_, source)])}
    for dtype, size in sizes.items():
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        contenders[_name(dtype)] = Contender([_bound(torch.mm, a, b)])
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        times, _ = call_times(contenders, runs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    seconds = {name: statistics.median(values) / 1000 for name, values in times.items()}
    return Ceilings(2 * source.nbytes / seconds["copy"], {_name(d): 2 * size**3 / seconds[_name(d)] for d, size in sizes.items()})


def _batch(contender: Contender) -> Batch:
    for call in (*contender.calls, *contender.calls):
        call()
    torch.cuda.synchronize()
    if not contender.graph:
        return Batch(lambda: [call() for call in contender.calls], len(contender.calls))
    once = _captured(contender.calls)
    repeats = max(1, math.ceil(MIN_REPLAY_MS / statistics.median(_elapsed_ms(once) for _ in range(5))))
    return Batch(_captured(list(contender.calls) * repeats), len(contender.calls) * repeats)


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _elapsed_ms(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _measured(case: Case, ceilings: Ceilings, runs: int) -> dict[str, Any]:
    times, calls = call_times(case.contenders, runs)
    figures: dict[str, dict[str, Any]] = {
        name: {**summary(values), "calls": calls[name], "timing": "graph" if case.contenders[name].graph else "calls"}
        for name, values in times.items()
    }
    ours = figures[KERNEL]["median_ms"]
    result: dict[str, Any] = {
        "name": case.name,
        "dtype": _name(case.dtype),
        "error": case.error,
        "times": figures,
        "speedup": {name: each["median_ms"] / ours for name, each in figures.items() if name != KERNEL},
    }
    if case.work is not None:
        floor = roofline(case.work, _name(case.dtype), ceilings)
        result |= {**case.work._asdict(), "floor_ms": floor.ms, "limit": floor.limit, "roofline_share": floor.ms / ours}
    return result


def _cases(branch: nn.Module, eager: Eager, boxes: Tensor, counts: Sequence[int]) -> Iterator[Case]:
    """All cases, one after the other, so that each can use the memory of the one before."""
    proposals = near(boxes, PROPOSALS)
    for dtype in PRECISIONS:
        for channels, grid in STAGES:
            yield _deform_conv(len(boxes), channels, grid, dtype)
    for dtype in PRECISIONS:
        box_region = RoiAlign(strides=STRIDES[:4], size=7, samples=2, aligned=0, canonical_size=CANONICAL_SIZE)
        yield _roi_align("box region", box_region, PYRAMID_CHANNELS, proposals, dtype)
        yield _roi_align("mask region", REGION, PYRAMID_CHANNELS, boxes, dtype)
        for (channels, _), operator in zip(STAGES[1:], CROPS, strict=True):
            yield _roi_align("crop", operator, channels, boxes, dtype)
    for dtype in PRECISIONS:
        yield _proposals(dtype)
    for dtype in PRECISIONS:
        yield _detections(proposals, len(boxes), dtype)
    costs = tuple(branch.costs.tolist())  # type: ignore[operator]
    route = MsmRoute(stride=STRIDES[0], detections=len(boxes), costs=costs)
    for budget in (0.0, costs[-1] / 2):
        yield _msm_route(route, boxes, budget)
    yield _paste_masks(boxes, counts)
    largest = [0, 0, 0, len(boxes)]
    for dtype in PRECISIONS:
        for name, spread in ((ROUTED, list(counts)), (LARGEST, largest)):
            yield _mask_branch(name, branch, eager, route, boxes, spread, dtype)


def near(boxes: Tensor, count: int) -> Tensor:
    """`count` boxes `[count, 4]` on the canvas that lie, some pixels off, where `boxes [n, 4]` are, as proposals do."""
    clusters = boxes[torch.arange(count, device=boxes.device) % len(boxes)]
    corner, side = clusters[:, :2], clusters[:, 2:] - clusters[:, :2]
    corner = corner + 0.1 * side * torch.randn_like(corner)
    moved = torch.cat([corner, corner + side * torch.exp(0.1 * torch.randn_like(side))], dim=1)
    height, width = CANVAS
    return moved.clamp(min=0).minimum(moved.new_tensor([width, height, width, height]))


def _deform_conv(n: int, channels: int, grid: int, dtype: torch.dtype) -> Case:
    def draw() -> list[Tensor]:
        x, offset = (_random(n, size, grid, grid, dtype=dtype) for size in (channels, 18))
        weight = _random(channels, channels, 3, 3, dtype=dtype) / math.sqrt(9 * channels)
        return [x, weight, offset, _random(channels, dtype=dtype)]

    inputs = draw()
    y = launch(PLAIN, inputs)[0]
    work = deform_conv_work(inputs, y)
    error = relative_error(y, _torchvision_deform_conv(*(tensor.float() for tensor in inputs)))
    sets = _sets(draw, inputs, work.bytes)
    peer_dtype = _peer_dtype(inputs, dtype)
    peers = sets if peer_dtype == dtype else [[tensor.to(peer_dtype) for tensor in each] for each in sets]
    contenders = {
        KERNEL: Contender([_bound(launch, PLAIN, each) for each in sets]),
        f"torchvision, {_name(peer_dtype)}": Contender([_bound(_torchvision_deform_conv, *each) for each in peers]),
    }
    return Case(f"DeformConv {channels} @ {grid}", dtype, contenders, work, error)


def _torchvision_deform_conv(x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
    return deform_conv2d(x, offset, weight, bias, padding=1)


def _peer_dtype(inputs: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """float32 where this torchvision has no kernel for the type."""
    try:
        _torchvision_deform_conv(*inputs)
    except RuntimeError:
        return torch.float32
    return dtype


def _roi_align(name: str, operator: RoiAlign, channels: int, rois: Tensor, dtype: torch.dtype) -> Case:
    values = operator.values
    strides, levels, size = values["strides"], len(values["strides"]), values["size"]

    def draw() -> list[Tensor]:
        return [_random(1, channels, -(-CANVAS[0] // stride), -(-CANVAS[1] // stride), dtype=dtype) for stride in strides]

    maps = draw()
    [regions] = launch(operator, [*maps, rois])
    error = relative_error(regions, reference_roi_align(maps, rois, **values))
    level = torch.tensor([pyramid_level(roi, levels, values["canonical_size"]) if levels > 1 else 0 for roi in rois.cpu()])
    with_image = torch.cat([torch.zeros_like(rois[:, :1]), rois], dim=1).to(dtype)
    split = [with_image[(level == index).to(rois.device)] for index in range(levels)]

    def by_level(maps: Sequence[Tensor]) -> list[Tensor]:
        """torchvision wants the RoIs in the maps' type; they are split beforehand, and the crops stay apart."""
        return [
            roi_align(feature, part, size, 1 / stride, values["samples"], bool(values["aligned"]))
            for feature, part, stride in zip(maps, split, strides, strict=True)
            if len(part)
        ]

    sets = _sets(draw, maps, _bytes([*maps, regions]))
    contenders = {
        KERNEL: Contender([_bound(launch, operator, [*each, rois]) for each in sets]),
        "torchvision by level": Contender([_bound(by_level, each) for each in sets]),
    }
    if levels > 1 and not values["aligned"]:
        names = [str(index) for index in range(levels)]
        pooler = MultiScaleRoIAlign(names, size, values["samples"], canonical_scale=values["canonical_size"])
        named = [{str(index): feature for index, feature in enumerate(each)} for each in sets]
        contenders["torchvision MultiScaleRoIAlign"] = Contender(
            [_bound(pooler, each, [rois.to(dtype)], [CANVAS]) for each in named], graph=False
        )
    return Case(f"RoiAlign, {name}: {len(rois)} × {channels} @ {size}", dtype, contenders, error=error)


def _proposals(dtype: torch.dtype) -> Case:
    sizes = [(-(-CANVAS[0] // stride), -(-CANVAS[1] // stride)) for stride in STRIDES]
    generator = AnchorGenerator(tuple((size,) for size in ANCHOR_SIZES), ((0.5, 1.0, 2.0),) * len(STRIDES))
    image = ImageList(torch.empty(1, 3, *CANVAS, device="cuda"), [CANVAS])
    anchors = generator(image, [torch.empty(1, 1, *size, device="cuda") for size in sizes])
    cells = torch.stack([cell.to("cuda") for cell in generator.cell_anchors])
    threshold = NMS_THRESHOLDS["Proposals"]
    operator = Proposals(strides=STRIDES, per_level=PROPOSALS, proposals=PROPOSALS, nms_threshold=threshold)
    limits = {"training": PROPOSALS, "testing": PROPOSALS}
    rpn = RegionProposalNetwork(generator, nn.Identity(), 0.7, 0.3, 256, 0.5, limits, limits, threshold).eval()

    def draw() -> list[Tensor]:
        """Logits that are alike in neighbouring cells, as a network's are."""
        logits = [torch.nn.functional.interpolate(_random(1, 3, -(-h // 8), -(-w // 8)), (h, w), mode="bilinear") for h, w in sizes]
        logits = [logit + 0.1 * torch.randn_like(logit) for logit in logits]
        return [x.to(dtype) for x in (*logits, *(0.3 * _random(1, 12, *size) for size in sizes))]

    def torchvision(maps: Sequence[Tensor]) -> object:
        """The region proposal network's own, in float32, from anchors that are there already."""
        logits, deltas = ([x.float() for x in part] for part in (maps[: len(sizes)], maps[len(sizes) :]))
        per_level = [logit.numel() for logit in logits]
        objectness, flat = concat_box_prediction_layers(logits, deltas)
        boxes = rpn.box_coder.decode(flat, anchors).view(1, -1, 4)
        return rpn.filter_proposals(boxes, objectness, [CANVAS], per_level)

    maps = draw()
    sets = _sets(draw, maps, _bytes(maps))
    return Case(f"Proposals: {PROPOSALS}", dtype, _against_calls(operator, [[*each, cells] for each in sets], sets, torchvision))


def _detections(proposals: Tensor, slots: int, dtype: torch.dtype) -> Case:
    rows, threshold = len(proposals), NMS_THRESHOLDS["Detections"]
    limits: dict[str, Any] = {"proposals": rows, "detections": slots, "candidates": CANDIDATES_PER_DETECTION * slots}
    limits |= {"score_threshold": SCORE_THRESHOLD, "nms_threshold": threshold}
    operator = Detections(stride=STRIDES[0], **limits)
    heads = RoIHeads(nn.Identity(), None, None, 0.5, 0.5, 512, 0.25, None, SCORE_THRESHOLD, threshold, slots).eval()
    count, no_score = torch.tensor([rows], dtype=torch.int32, device="cuda"), torch.zeros((), device="cuda")

    def draw() -> list[Tensor]:
        """Proposals of the same object lean to the same class, some more than others."""
        logits = _random(rows, CLASSES + 1)
        index = torch.arange(rows, device="cuda")
        logits[index, 1 + index % slots % CLASSES] += 4 + 2 * _random(rows)
        return [logits.to(dtype), _random(rows, 4 * (CLASSES + 1), dtype=dtype)]

    def torchvision(inputs: Sequence[Tensor]) -> object:
        """The RoI heads' own, in float32."""
        return heads.postprocess_detections(*(x.float() for x in inputs), [proposals], [CANVAS])

    outputs = draw()
    sets = _sets(draw, outputs, _bytes(outputs))
    ours = [[*each, proposals, count, no_score, _finest_map()] for each in sets]
    return Case(f"Detections: {slots} of {rows} × {CLASSES}", dtype, _against_calls(operator, ours, sets, torchvision))


def _against_calls(
    operator: Operator, ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]], peer: Callable[[Sequence[Tensor]], object]
) -> dict[str, Contender]:
    """An operator against a peer that cannot be captured: ours is called from Python too, for comparison."""
    calls = [_bound(launch, operator, each) for each in ours]
    return {
        KERNEL: Contender(calls),
        "kernel, called": Contender(calls, graph=False),
        "torchvision": Contender([_bound(peer, each) for each in theirs], graph=False),
    }


def _msm_route(route: MsmRoute, boxes: Tensor, budget: float) -> Case:
    n = len(boxes)
    override = torch.full((n,), -1, device="cuda")
    inputs = [_random(n, 4), boxes, override, torch.arange(n, device="cuda"), torch.tensor(budget, device="cuda"), _finest_map()]
    name = "MsmRoute" if budget == 0 else f"MsmRoute, budget {budget:.2f}"
    return Case(name, torch.float32, {KERNEL: Contender([_bound(launch, route, inputs)])})


def _mask_branch(
    name: str, branch: nn.Module, eager: Eager, route: MsmRoute, boxes: Tensor, counts: Sequence[int], dtype: torch.dtype
) -> Case:
    peer = copy.deepcopy(branch).to(dtype)
    ours = with_kernels(peer)
    pyramid = [_random(1, PYRAMID_CHANNELS, CANVAS[0] // stride, CANVAS[1] // stride, dtype=dtype) for stride in STRIDES[:4]]
    labels = torch.randint(CLASSES, (len(boxes),), device="cuda")
    override = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[torch.randperm(len(boxes))].to("cuda")

    def by_kernels() -> list[Tensor]:
        return routed_masks(ours, route, pyramid, boxes, labels, override, counts)

    def by_pytorch() -> Sequence[Tensor]:
        with torch.autocast("cuda", torch.float16, enabled=dtype == torch.float16):
            return eager(peer, pyramid, boxes, labels, override)

    exact = eager(branch, [feature.float() for feature in pyramid], boxes, labels, override)
    error = max(relative_error(x, y) for x, y in zip(by_kernels(), exact, strict=True) if len(y))
    contenders = {
        KERNEL: Contender([by_kernels]),
        "kernel, called": Contender([by_kernels], graph=False),
        "PyTorch eager": Contender([by_pytorch], graph=False),
    }
    return Case(f"{name}: {' / '.join(map(str, counts))}", dtype, contenders, error=error)


def _paste_masks(boxes: Tensor, counts: Sequence[int]) -> Case:
    """From logits on the GPU to the crops that the host hands out, in a frame as large as the canvas."""
    height, width = CANVAS
    operator, parts = PasteMasks(height=height, width=width), boxes.split(list(counts))
    each_box = boxes.cpu().numpy()

    def draw() -> list[Tensor]:
        coarse = (4 * _random(1, max(count, 1), 5, 5) for count in counts)
        return [
            nn.functional.interpolate(x, (grid, grid), mode="bilinear")[0, :count]
            for x, (_, grid), count in zip(coarse, STAGES, counts, strict=True)
        ]

    def on_gpu(logits: Sequence[Tensor]) -> list[Tensor]:
        return [launch(operator, [x, part])[0] for x, part in zip(logits, parts, strict=True) if len(part)]

    def to_host(logits: Sequence[Tensor]) -> list[Crop]:
        masks = [mask for bits in on_gpu(logits) for mask in bits.cpu().numpy()]
        return [_crop_of_bits(mask, box, width) for mask, box in zip(masks, each_box, strict=True)]

    def on_host(logits: Sequence[Tensor]) -> list[Crop]:
        masks = [mask for x in logits for mask in x.cpu().numpy()]
        return [mask_crop(mask, box, height, width) for mask, box in zip(masks, each_box, strict=True)]

    logits = draw()
    sets = _sets(draw, logits, _bytes([*logits, *on_gpu(logits)]))
    contenders = {
        KERNEL: Contender([_bound(on_gpu, each) for each in sets]),
        "kernel, crops on the host": Contender([_bound(to_host, each) for each in sets], graph=False),
        "all on the host": Contender([_bound(on_host, each) for each in sets], graph=False),
    }
    return Case(f"PasteMasks: {' / '.join(map(str, counts))}", torch.float32, contenders)


def _crop_of_bits(bits: npt.NDArray[np.int32], box: npt.NDArray[np.float32], width: int) -> Crop:
    """The pixels whose centres are in the box, of a mask `[height, words]`: `runtime.paste.mask_crop`'s."""
    left, top, right, bottom = covered_pixels(box, len(bits), width)
    first = left // 32
    words = np.ascontiguousarray(bits[top:bottom, first : -(-right // 32)])
    pixels = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").view(bool)
    return left, top, pixels[:, left - 32 * first : right - 32 * first]


def _finest_map() -> Tensor:
    """One channel of P2: operators read the canvas from its shape."""
    return torch.empty(1, 1, CANVAS[0] // STRIDES[0], CANVAS[1] // STRIDES[0], device="cuda")


def _sets(draw: Callable[[], list[Tensor]], first: list[Tensor], size: int) -> list[list[Tensor]]:
    """The first set of inputs, and more sets until they exceed the cache."""
    cache = torch.cuda.get_device_properties(first[0].device).L2_cache_size
    return [first, *(draw() for _ in range(input_sets(size, cache) - 1))]


def _bound(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device="cuda", dtype=dtype)


def _shape(spec: TensorSpec) -> list[int]:
    return [spec.size(axis) for axis in range(len(spec.shape))]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
