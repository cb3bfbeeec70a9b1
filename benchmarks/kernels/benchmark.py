"""Times the kernels on an NVIDIA GPU, beside torchvision's operators and inside the mask branch, at the sizes of the preset r50."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.kernels import deform_conv, detections, mask_branch, paste_masks, proposals, roi_align, sizes
from benchmarks.kernels.case import KERNEL, Case, type_name
from benchmarks.kernels.mask_branch import LARGEST, ROUTED, Eager
from benchmarks.kernels.roofline import Ceilings, measure_ceilings, roofline
from benchmarks.kernels.timing import call_times, summary
from dynamask.mask_branch import MaskBranch
from dynamask.msm import Budget
from runtime.errors import InputError
from trt_plugins.msm_route import MsmRoute
from trt_plugins.roi_align import RoiAlign


def bench_kernels(branch: nn.Module, eager: Eager, boxes: Tensor, counts: Sequence[int], runs: int = 100) -> dict[str, Any]:
    """Time every operator, and the mask branch with the kernels in it.

    Args:
        branch: r50's mask branch for `sizes.CLASSES` classes (`dynamask.mask_branch`), in evaluation mode; it is not changed.
        eager: the branch in PyTorch, to compare with. In float16 it runs under autocast, where torchvision's operators work in float32.
        boxes: `[n, 4] float32`, of the instances, xyxy in pixels of `sizes.CANVAS`.
        counts: the number of instances that exit at 14, 28, 56 and 112.
        runs: the number of runs of each contender; the results are medians.

    Returns:
        `instances`, `distribution`, `runs`, `device` (`name`, `compute_capability`, `cache_bytes`), `tf32` of PyTorch's convolutions and
        matrix products, `ceilings` (`bandwidth` bytes/s, `rates` by type, operations/s), and `cases`: each with `name`, `dtype`, `error`
        (or None), `times` by contender (`median_ms`, `p10_ms`, `p90_ms`, `calls` in a run, `timing` graph or calls), `speedup` (each
        other contender's median over the kernel's), and for DeformConv `bytes`, `operations`, `floor_ms`, `limit`, `roofline_share`.
        `routed_over_largest` is the mask branch's time when routed, over that with all instances at 112.

    Raises:
        InputError: there is no GPU, Triton's interpreter is on, or there are no boxes or too few runs.
    """
    if runs < 2 or not len(boxes) or sum(counts) != len(boxes):
        raise InputError(
            f"{len(boxes)} instances, {list(counts)} at the grids, and {runs} runs: give some boxes, all counted, and at least 2 runs."
        )
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


def routed_over_largest(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Type -> contender -> the mask branch's median when routed over that with all instances at 112."""
    routed, largest = ({case["dtype"]: case["times"] for case in cases if case["name"].startswith(name)} for name in (ROUTED, LARGEST))
    return {
        dtype: {name: each["median_ms"] / largest[dtype][name]["median_ms"] for name, each in times.items()}
        for dtype, times in routed.items()
    }


def _measured(case: Case, ceilings: Ceilings, runs: int) -> dict[str, Any]:
    times, calls = call_times(case.contenders, runs)
    figures: dict[str, dict[str, Any]] = {
        name: {**summary(values), "calls": calls[name], "timing": "graph" if case.contenders[name].graph else "calls"}
        for name, values in times.items()
    }
    ours = figures[KERNEL]["median_ms"]
    result: dict[str, Any] = {
        "name": case.name,
        "dtype": type_name(case.dtype),
        "error": case.error,
        "times": figures,
        "speedup": {name: each["median_ms"] / ours for name, each in figures.items() if name != KERNEL},
    }
    if case.work is not None:
        floor = roofline(case.work, type_name(case.dtype), ceilings)
        result |= {**case.work._asdict(), "floor_ms": floor.ms, "limit": floor.limit, "roofline_share": floor.ms / ours}
    return result


def _cases(branch: nn.Module, eager: Eager, boxes: Tensor, counts: Sequence[int]) -> Iterator[Case]:
    """All cases, one after the other, so that each can use the memory of the one before."""
    candidates = proposals.near(boxes, sizes.PROPOSALS)
    for dtype in sizes.PRECISIONS:
        for channels, grid in sizes.STAGES:
            yield deform_conv.case(len(boxes), channels, grid, dtype)
    for dtype in sizes.PRECISIONS:
        box_region = RoiAlign(strides=sizes.STRIDES[:4], size=7, samples=2, aligned=0, canonical_size=sizes.CANONICAL_SIZE)
        yield roi_align.case("box region", box_region, sizes.PYRAMID_CHANNELS, candidates, dtype)
        yield roi_align.case("mask region", roi_align.REGION, sizes.PYRAMID_CHANNELS, boxes, dtype)
        for (channels, _), operator in zip(sizes.STAGES[1:], roi_align.CROPS, strict=True):
            yield roi_align.case("crop", operator, channels, boxes, dtype)
    for dtype in sizes.PRECISIONS:
        yield proposals.case(dtype)
    for dtype in sizes.PRECISIONS:
        yield detections.case(candidates, len(boxes), dtype)
    route = MsmRoute(stride=sizes.STRIDES[0], detections=len(boxes))
    costs = cast(MaskBranch, branch).costs
    for budget in (torch.zeros(()), costs[-1] / 2):
        yield mask_branch.routing_case(route, boxes, Budget.of_mean(budget, costs))
    yield paste_masks.case(boxes, counts)
    largest = [0, 0, 0, len(boxes)]
    for dtype in sizes.PRECISIONS:
        for name, spread in ((ROUTED, list(counts)), (LARGEST, largest)):
            yield mask_branch.case(name, branch, eager, route, boxes, spread, dtype)
