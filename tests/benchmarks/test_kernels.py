"""The kernels' benchmark: its arithmetic by hand, and every contender at small sizes on the CPU, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.kernels import benchmark, deform_conv, detections, mask_branch, paste_masks, proposals, roi_align, sizes
from benchmarks.kernels import case as cases
from benchmarks.kernels.__main__ import _eager, app
from benchmarks.kernels.case import KERNEL, Case, Work, input_sets, launch, relative_error
from benchmarks.kernels.roofline import Ceilings, roofline
from benchmarks.kernels.timing import Contender, summary
from cli.main import run
from dynamask.config import R50
from dynamask.model import build_mask_branch
from dynamask.msm import Budget
from runtime.errors import InputError
from trt_plugins import on_torch
from trt_plugins.deform_conv.reference import packed_inputs
from trt_plugins.msm_route import MsmRoute
from trt_plugins.roi_align import RoiAlign

CEILINGS = Ceilings(bandwidth=2e12, rates={"float16": 400e12, "float32": 50e12})
NO_BUDGET = Budget.of_mean(torch.tensor(0.0), torch.tensor([1.0, 2.0, 3.0, 4.0]))
BOXES = torch.tensor([[2.0, 3.0, 20.0, 31.0], [10.0, 10.0, 60.0, 50.0], [5.0, 8.0, 50.0, 62.0]])


def test_sizes_are_the_papers() -> None:
    assert sizes.CANVAS == (800, 1344) and sizes.PYRAMID_CHANNELS == 256 and sizes.CANONICAL_SIZE == 224
    assert sizes.STAGES == ((256, 14), (128, 28), (64, 56), (32, 112)) and sizes.CROP_STRIDES == (16, 8, 4)
    assert R50.proposals_per_level == sizes.PROPOSALS == 1000


@pytest.mark.parametrize(("dtype", "moved"), [(torch.float16, 21_956_160), (torch.float32, 43_912_320)])
def test_work_of_the_tiny_stage(dtype: torch.dtype, moved: int) -> None:
    # x and y: 100 * 256 * 196 = 5,017,600 items each; weight: 256 * 256 * 9 = 589,824; bias: 256; offset: 100 * 18 * 196 = 352,800;
    # products: 5,017,600 outputs of 256 * 9 = 2,304 terms.
    shapes = [(100, 256, 14, 14), (256, 256, 3, 3), (100, 18, 14, 14), (256,)]
    work = deform_conv.deform_conv_work(
        [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes], torch.empty(shapes[0], dtype=dtype)
    )
    assert work == Work(bytes=moved, operations=23_121_100_800)


@pytest.mark.parametrize(
    ("work", "dtype", "ms", "limit"),
    [
        (Work(2_000_000_000, 100_000_000_000), "float16", 1.0, "memory"),
        (Work(2_000_000_000, 800_000_000_000), "float16", 2.0, "arithmetic"),
        (Work(2_000_000_000, 100_000_000_000), "float32", 2.0, "arithmetic"),
    ],
)
def test_roofline_is_the_longer_of_the_two_times(work: Work, dtype: str, ms: float, limit: str) -> None:
    floor = roofline(work, dtype, CEILINGS)
    assert floor.ms == pytest.approx(ms) and floor.limit == limit


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=50))
def test_summary_agrees_with_numpys_quantiles(times: list[float]) -> None:
    p10, median, p90 = np.quantile(times, [0.1, 0.5, 0.9])
    assert summary(times) == pytest.approx({"median_ms": median, "p10_ms": p10, "p90_ms": p90})


@pytest.mark.parametrize(("size", "cache", "sets"), [(100, 30, 1), (100, 50, 1), (100, 51, 2), (100, 200, 4), (1, 1000, 16)])
def test_input_sets_exceed_twice_the_cache(size: int, cache: int, sets: int) -> None:
    assert input_sets(size, cache) == sets


def test_launch_agrees_with_the_runner_of_the_tests() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = packed_inputs([torch.randn(size, generator=generator) for size in [(2, 4, 5, 6), (3, 4, 3, 3), (2, 18, 5, 6), (3,)]])
    assert torch.equal(launch(deform_conv.PLAIN, inputs)[0], on_torch.run(deform_conv.PLAIN, inputs)[0])
    feature = torch.empty(1, 1, 16, 16)
    sized = launch(_route(3), [torch.randn(3, 4), BOXES, torch.tensor([0, 2, 2]), torch.arange(3), *NO_BUDGET, feature])
    assert [len(output) for output in sized[:4]] == [3, 3, 3, 3], "as much room as the slots"


def _route(slots: int) -> MsmRoute:
    return MsmRoute(stride=4, detections=slots)


class _CPU(TorchFunctionMode):
    """Plays the GPU: what asks for one is made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*["cpu" if isinstance(arg, str) and arg == "cuda" else arg for arg in args], **kwargs)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small sizes, and the CPU in the GPU's place."""
    small = {"CANVAS": (64, 64), "PYRAMID_CHANNELS": 8, "ANCHOR_SIZES": (8, 16, 24, 32, 40), "CLASSES": 3, "PROPOSALS": 12}
    for name, value in small.items():
        monkeypatch.setattr(sizes, name, value)
    monkeypatch.setattr(cases, "MAX_SETS", 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 30))
    with _CPU(), torch.inference_mode():
        torch.manual_seed(0)
        yield


def _region(aligned: int) -> RoiAlign:
    return RoiAlign(strides=(4, 8, 16, 32), size=3, samples=2, aligned=aligned, canonical_size=30.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: deform_conv.case(2, 4, 5, torch.float32),
        lambda: deform_conv.case(2, 4, 5, torch.float16),
        lambda: roi_align.case("box region", _region(0), 4, BOXES, torch.float32),
        lambda: roi_align.case("mask region", _region(1), 4, BOXES, torch.float16),
    ],
    ids=["DeformConv", "DeformConv in half", "RoiAlign", "RoiAlign in half"],
)
def test_contenders_compute_the_same(small: None, build: Callable[[], Case]) -> None:
    case = build()
    assert next(iter(case.contenders)) == KERNEL and {len(each.calls) for each in case.contenders.values()} == {2}
    assert case.error is not None and case.error < (1e-5 if case.dtype == torch.float32 else 5e-3)
    ours, *peers = (_flat(contender.calls[1]()) for contender in case.contenders.values())
    for peer in peers:
        assert relative_error(ours.sort().values, peer.sort().values) < (1e-5 if case.dtype == torch.float32 else 2e-2)


def _flat(found: Any) -> Tensor:
    """Crops by level are in another order: values are compared sorted."""
    return torch.cat([part.flatten().float() for part in ([found] if isinstance(found, Tensor) else found)])


def _found(case: Case, contender: str) -> Any:
    return case.contenders[contender].calls[0]()


def test_proposals_and_detections_agree_with_torchvision(small: None) -> None:
    case = proposals.case(torch.float32)
    boxes, count = _found(case, KERNEL)
    [expected], _ = _found(case, "torchvision")
    # torchvision's drops boxes that clipping left without area; the model, and so the kernel, does not.
    filled = boxes[: int(count)]
    filled = filled[(filled[:, 2:] > filled[:, :2]).all(dim=1)]
    assert len(filled) > 6
    torch.testing.assert_close(filled, expected[: len(filled)], atol=1e-3, rtol=0)
    case = detections.case(proposals.near(BOXES, 12), 6, torch.float32)
    boxes, scores, labels, _, n = _found(case, KERNEL)
    [theirs], [their_scores], [their_labels] = _found(case, "torchvision")
    assert 0 < int(n) <= 6
    torch.testing.assert_close(boxes[: int(n)], theirs, atol=1e-3, rtol=0)
    torch.testing.assert_close(scores[: int(n)], their_scores)
    assert torch.equal(labels[: int(n)] + 1, their_labels)


def test_the_mask_branch_with_kernels_agrees_with_pytorch(small: None) -> None:
    model = R50.model_copy(update={"canvas": (64, 64), "fpn_channels": 8, "stage_channels": (8, 8, 8, 8)})
    branch = build_mask_branch(model, 3).eval()
    for stage in cast(Any, branch.rfpn.stages):
        nn.init.normal_(stage.align_offset.weight, std=0.1)
    branch.canonical_size = roi_align.REGION.values["canonical_size"]
    counts = [1, 1, 0, 0]
    case = mask_branch.case(mask_branch.ROUTED, branch, _eager, _route(2), BOXES[:2], counts, torch.float32)
    assert case.error is not None and case.error < 1e-4
    assert [len(x) for x in _found(case, "PyTorch eager")] == counts


def test_pasted_crops_agree_with_the_host(small: None) -> None:
    boxes = torch.cat([BOXES, torch.tensor([[40.0, 50.0, 90.0, 80.0], [70.0, 70.0, 90.0, 90.0], [30.0, 30.0, 20.0, 20.0]])])
    case = paste_masks.case(boxes, [2, 0, 3, 1])
    assert len(_found(case, KERNEL)) == 3
    for ours, theirs in zip(_found(case, "kernel, crops on the host"), _found(case, "all on the host"), strict=True):
        assert ours[:2] == theirs[:2] and ours[2].shape == theirs[2].shape
        # OpenCV rounds where it samples.
        assert (ours[2] != theirs[2]).sum() <= 0.01 * ours[2].size


def test_figures_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = {KERNEL: Contender([int]), "peer": Contender([int], graph=False)}
    monkeypatch.setattr(benchmark, "call_times", lambda given, runs: ({KERNEL: [2.0] * runs, "peer": [5.0] * runs}, {KERNEL: 4, "peer": 1}))
    work = Work(2_000_000_000, 0)
    result = benchmark._measured(Case("a case", torch.float16, contenders, work, 0.25), CEILINGS, 3)
    assert result["speedup"] == {"peer": 2.5}
    assert result["times"]["peer"] == {"median_ms": 5.0, "p10_ms": 5.0, "p90_ms": 5.0, "calls": 1, "timing": "calls"}
    assert result["floor_ms"] == pytest.approx(1.0) and result["roofline_share"] == pytest.approx(0.5) and result["limit"] == "memory"


def test_routed_over_largest_is_by_type_and_contender() -> None:
    medians = {("routed", "float16"): 3.0, ("all at 112", "float16"): 4.0, ("routed", "float32"): 5.0, ("all at 112", "float32"): 20.0}
    cases: list[dict[str, Any]] = [
        {"name": f"mask branch, {name}: 1 / 2", "dtype": dtype, "times": {KERNEL: {"median_ms": ms}, "peer": {"median_ms": 2 * ms + 1}}}
        for (name, dtype), ms in medians.items()
    ]
    found = benchmark.routed_over_largest([{"name": "MsmRoute", "dtype": "float32", "times": {}}, *cases])
    assert found == {"float16": {KERNEL: 0.75, "peer": 7 / 9}, "float32": {KERNEL: 0.25, "peer": 11 / 41}}


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(app, "benchmarks.kernels", []) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "NVIDIA GPU" in printed.err


def test_an_interpreter_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        benchmark.check_gpu()


@pytest.mark.parametrize(("counts", "runs"), [([1, 1, 0, 0], 100), ([1, 1, 1, 0], 1)])
def test_calls_without_boxes_or_with_one_run_are_refused(counts: Sequence[int], runs: int) -> None:
    with pytest.raises(InputError, match="give some boxes"):
        benchmark.bench_kernels(nn.Identity(), _eager, BOXES, counts, runs)


@pytest.mark.gpu
def test_the_whole_benchmark_on_a_gpu() -> None:
    boxes = BOXES * 10
    result = benchmark.bench_kernels(build_mask_branch(R50, sizes.CLASSES).eval(), _eager, boxes, [1, 1, 0, 1], runs=2)
    assert {case["name"].split()[0].rstrip(":,") for case in result["cases"]} == {
        "DeformConv", "RoiAlign", "Proposals", "Detections", "MsmRoute", "PasteMasks", "mask",
    }  # fmt: skip
    for case in result["cases"]:
        assert all(times["median_ms"] > 0 for times in case["times"].values())
        assert case["error"] is None or case["error"] < (1e-2 if case["dtype"] == "float32" else 5e-2)
    for case in result["cases"][: 2 * len(sizes.STAGES)]:
        assert 0 < case["roofline_share"] < 1.1
