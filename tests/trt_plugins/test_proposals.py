"""Proposals, in Triton's interpreter, against the model's own and torchvision's operators."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from dynamask.inference import RPN_NMS_THRESHOLD, select_proposals
from dynamask.model import DynaMask
from runtime.errors import InputError
from trt_plugins.on_torch import run, spec_of
from trt_plugins.operator import TensorSpec
from trt_plugins.proposals import Proposals
from trt_plugins.proposals.reference import propose

STRIDES = (4, 8, 16, 32, 64)
GENERATOR = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
ANCHORS = torch.stack(GENERATOR.cell_anchors)


def _operator(canvas: tuple[int, int], per_level: int, proposals: int) -> Proposals:
    return Proposals("rpn", canvas=canvas, strides=STRIDES, per_level=per_level, proposals=proposals, nms_threshold=RPN_NMS_THRESHOLD)


def _maps(canvas: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 0.3) -> list[Tensor]:
    """Logits and deltas; with no spread boxes are anchors, and IoUs are the same to the bit wherever they are computed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in STRIDES]
    logits = [torch.randn(1, 3, *size, generator=generator) for size in sizes]
    deltas = [torch.randn(1, 12, *size, generator=generator) * spread for size in sizes]
    return [x.to(dtype) for x in (*logits, *deltas)]


def _expected(maps: list[Tensor], canvas: tuple[int, int], per_level: int, proposals: int) -> tuple[Tensor, Tensor]:
    return propose(maps[:5], maps[5:], ANCHORS, canvas, per_level, proposals, RPN_NMS_THRESHOLD)


@pytest.mark.parametrize(
    ("canvas", "per_level", "proposals"),
    [((96, 160), 40, 60), ((64, 64), 16, 200)],
    ids=["more than asked for, cells on P6 not 64 pixels apart", "fewer than asked for, levels with less than per_level"],
)
def test_proposals_are_the_models(canvas: tuple[int, int], per_level: int, proposals: int) -> None:
    maps = _maps(canvas)
    boxes, count = run(_operator(canvas, per_level, proposals), [*maps, ANCHORS])
    model = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(proposals_per_level=per_level, proposals=proposals)),
        rpn=SimpleNamespace(anchor_generator=GENERATOR, box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0))),
    )
    wanted, wanted_count = select_proposals(cast(DynaMask, model), maps[:5], maps[5:], canvas)
    rows = int(count)
    assert count.shape == (1,) and rows == int(wanted_count) and (rows == proposals) == (proposals == 60)
    torch.testing.assert_close(boxes[:rows], wanted[:rows], atol=1e-3, rtol=0)
    assert not boxes[rows:].any()
    for got, reference in zip((boxes, count), _expected(maps, canvas, per_level, proposals), strict=True):
        torch.testing.assert_close(got, reference, atol=1e-3, rtol=0)


def test_half_precision_maps_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # And with rows narrowed down in several rounds, as large maps are.
    monkeypatch.setattr("trt_plugins.selection.selection.RANKED", 20)
    canvas, operator = (64, 96), _operator((64, 96), 16, 30)
    maps = _maps(canvas, torch.float16)
    assert [launch.kernel.function for launch in operator.launches([spec_of(x) for x in [*maps, ANCHORS]], [])][:2] == [
        "select_anchors",
        "select",
    ]
    boxes, count = run(operator, [*maps, ANCHORS])
    wanted, wanted_count = _expected(maps, canvas, 16, 30)
    assert torch.equal(count, wanted_count)
    torch.testing.assert_close(boxes, wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("levels", [2, 1])
def test_equal_logits_count_by_level_and_place(levels: int) -> None:
    canvas = (64, 64)
    maps = _maps(canvas, spread=0.0)
    for level in range(5):
        maps[level] = (maps[level] > 0).float() * (levels - 1)
    boxes, count = run(_operator(canvas, 16, 25), [*maps, ANCHORS])
    wanted, wanted_count = _expected(maps, canvas, 16, 25)
    assert torch.equal(boxes, wanted) and torch.equal(count, wanted_count)


def test_none_overlaps_a_better_one_of_its_level_and_every_dropped_one_does() -> None:
    canvas, per_level = (64, 64), 24
    maps = _maps(canvas, seed=3)
    for level in range(1, 5):
        maps[level][:] = -100.0 - level
    boxes, count = run(_operator(canvas, per_level, 100), [*maps, ANCHORS])
    scores = maps[0][0].permute(1, 2, 0).reshape(-1)
    best = scores.topk(per_level).indices
    height, width = maps[0].shape[-2:]
    cells = torch.stack([best // 3 % width, best // 3 // width] * 2, dim=1) * 4
    deltas = maps[5][0].view(3, 4, height, width).permute(2, 3, 0, 1).reshape(-1, 4)[best]
    candidates = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas, cells + ANCHORS[0][best % 3]).clamp(0, 64)
    # The best level's proposals come first; each is the candidate nearest to it.
    distance = (candidates[:, None] - boxes[: int(count)]).abs().amax(dim=2)
    kept = distance.amin(dim=1) < 1e-3
    assert 1 < int(kept.sum()) < per_level and (distance[:, : int(kept.sum())].amin(dim=0) < 1e-3).all()
    overlap = box_iou(candidates, candidates).tril(-1)
    assert (overlap[kept][:, kept] < RPN_NMS_THRESHOLD + 1e-4).all()
    assert (overlap[~kept][:, kept].amax(dim=1) > RPN_NMS_THRESHOLD - 1e-4).all()


def test_kernels_list_their_arguments_in_order() -> None:
    operator = _operator((800, 1344), 1000, 1000)
    specs = [spec_of(x) for x in [*_maps((800, 1344)), ANCHORS]]
    kernels = operator.kernels(specs)
    assert {launch.kernel for launch in operator.launches(specs, [])} == set(kernels)
    for kernel in kernels:
        function = getattr(importlib.import_module(kernel.module), kernel.function)
        assert [name for name, _ in (*kernel.signature, *kernel.constants)] == list(function.arg_names)


GOOD: dict[str, Any] = {"canvas": (64, 64), "strides": STRIDES, "per_level": 16, "proposals": 20, "nms_threshold": 0.7}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"canvas": (64,)}, r"^rpn: .*canvas is \[64\]; give height and width"),
        ({"strides": (4, 8)}, r"strides is \[4, 8\]; give 5"),
        ({"per_level": 0}, "per_level is 0; give 1 to 4096"),
        ({"per_level": 5000}, "per_level is 5000; give 1 to 4096"),
        ({"proposals": 0}, "proposals is 0; give 1 or more"),
    ],
)
def test_wrong_attributes_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Proposals("rpn", **(GOOD | wrong))


@pytest.mark.parametrize(
    ("index", "spec", "message"),
    [
        (
            1,
            TensorSpec((1, 3, 16, 16), "float32"),
            r"logits of level 1 are \(1, 3, 16, 16\); canvas, strides and anchors ask for \(1, 3, 8, 8\)",
        ),
        (7, TensorSpec((1, 3, 4, 4), "float32"), r"deltas of level 2 are .* ask for \(1, 12, 4, 4\)"),
        (5, TensorSpec((1, 12, 16, 16), "float16"), "deltas of level 0 are float16; give float32 or float16, the same for all"),
        (0, TensorSpec((1, 3, None, 16), "float32"), "logits of level 0 are"),
        (10, TensorSpec((5, 3, 4), "float16"), "the anchors are"),
        (10, TensorSpec((5, None, 4), "float32"), "must be known and 1 or more"),
    ],
)
def test_wrong_inputs_are_refused(index: int, spec: TensorSpec, message: str) -> None:
    operator = Proposals("rpn", **GOOD)
    specs = [spec_of(x) for x in [*_maps((64, 64)), ANCHORS]]
    operator.check_inputs(specs)
    with pytest.raises(InputError, match=message):
        operator.check_inputs([*specs[:index], spec, *specs[index + 1 :]])
    with pytest.raises(InputError, match="it has 10 inputs"):
        operator.check_inputs(specs[:-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_proposals_at_full_size_on_a_gpu(dtype: torch.dtype) -> None:
    canvas = (800, 1344)
    maps = _maps(canvas, dtype, spread=0.0)
    boxes, count = run(_operator(canvas, 1000, 1000), [x.cuda() for x in [*maps, ANCHORS]])
    wanted, wanted_count = _expected(maps, canvas, 1000, 1000)
    assert torch.equal(boxes.cpu(), wanted) and torch.equal(count.cpu(), wanted_count)
