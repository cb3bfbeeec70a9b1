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

from dynamask.detector import RPN_NMS_THRESHOLD, Detector, select_proposals
from runtime.errors import InputError
from trt_plugins.on_torch import run, spec_of
from trt_plugins.operator import TensorSpec
from trt_plugins.proposals import Proposals
from trt_plugins.proposals.reference import propose

STRIDES = (4, 8, 16, 32, 64)
GENERATOR = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
ANCHORS = torch.stack(GENERATOR.cell_anchors)


def _operator(per_level: int, proposals: int) -> Proposals:
    return Proposals("rpn", strides=STRIDES, per_level=per_level, proposals=proposals, nms_threshold=RPN_NMS_THRESHOLD)


def _maps(canvas: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 0.3, batch: int = 1) -> list[Tensor]:
    """Logits and deltas; with no spread boxes are anchors, and IoUs are the same to the bit wherever they are computed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in STRIDES]
    logits = [torch.randn(batch, 3, *size, generator=generator) for size in sizes]
    deltas = [torch.randn(batch, 12, *size, generator=generator) * spread for size in sizes]
    return [x.to(dtype) for x in (*logits, *deltas)]


def _expected(maps: list[Tensor], operator: Proposals) -> tuple[Tensor, Tensor]:
    return propose(maps[:5], maps[5:], ANCHORS, **operator.values)


@pytest.mark.parametrize(
    ("batch", "canvas", "dtype", "proposals"),
    [(3, (32, 64), torch.float32, 25), (2, (64, 32), torch.float16, 200)],
    ids=["more than asked for", "half precision, narrowed down in rounds, fewer than asked for"],
)
def test_proposals_agree_with_the_model_and_each_image_alone(
    batch: int, canvas: tuple[int, int], dtype: torch.dtype, proposals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels from P4 on have less than `per_level`, and cells on P6 are 32 pixels apart, not 64."""
    half, per_level = dtype == torch.float16, 16
    if half:  # As large maps are.
        monkeypatch.setattr("trt_plugins.selection.selection.RANKED", 20)
    operator, maps = _operator(per_level, proposals), _maps(canvas, dtype, batch=batch)
    second = operator.launches([spec_of(x) for x in [*maps, ANCHORS]], [])[1].kernel.function
    assert second == ("select" if half else "decode_anchors")
    boxes, count = run(operator, [*maps, ANCHORS])
    for got, reference in zip((boxes, count), _expected(maps, operator), strict=True):
        torch.testing.assert_close(got, reference, atol=1e-3, rtol=0)
    model = SimpleNamespace(
        sizes=SimpleNamespace(proposals_per_level=per_level, proposals=proposals),
        rpn=SimpleNamespace(anchor_generator=GENERATOR, box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0))),
    )
    for image, rows in enumerate(count.tolist()):
        own, filled = [x[image : image + 1] for x in maps], boxes.view(batch, proposals, 4)[image]
        floats = [x.float() for x in own]
        wanted, wanted_count = select_proposals(cast(Detector, model), floats[:5], floats[5:], canvas)
        assert rows == int(wanted_count) and (rows == proposals) == (proposals == 25)
        torch.testing.assert_close(filled[:rows], wanted[:rows], atol=1e-3, rtol=0)
        assert not filled[rows:].any()
    alone, of_one = run(operator, [*own, ANCHORS])
    assert torch.equal(alone, filled) and of_one.tolist() == [rows]


def test_equal_logits_are_ordered_by_level_and_place() -> None:
    """Logits of one image are 0 or 1, those of the other all 0; boxes are anchors, and so exact."""
    maps, operator = _maps((64, 32), spread=0.0, batch=2), _operator(16, 25)
    for level in range(5):
        maps[level] = (maps[level] > 0).float() * torch.tensor([1.0, 0.0])[:, None, None, None]
    boxes, count = run(operator, [*maps, ANCHORS])
    wanted, wanted_count = _expected(maps, operator)
    assert torch.equal(boxes, wanted) and torch.equal(count, wanted_count)


def test_none_overlaps_a_better_one_of_its_level_and_every_dropped_one_does() -> None:
    canvas, per_level = (64, 64), 24
    maps = _maps(canvas, seed=3)
    for level in range(1, 5):
        maps[level][:] = -100.0 - level
    boxes, count = run(_operator(per_level, 100), [*maps, ANCHORS])
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
    operator = _operator(1000, 1000)
    specs = [spec_of(x) for x in [*_maps((800, 1344)), ANCHORS]]
    # Known before the number of images and the canvas are.
    kernels = operator.kernels([*(TensorSpec((None, x.shape[1], None, None), x.dtype) for x in specs[:-1]), specs[-1]])
    assert {launch.kernel for launch in operator.launches(specs, [])} == set(kernels)
    small = [spec_of(x) for x in [*_maps((64, 64), batch=2), ANCHORS]]
    assert {launch.kernel for launch in operator.launches(small, [])} < set(kernels)
    for kernel in kernels:
        function = getattr(importlib.import_module(kernel.module), kernel.function)
        assert [name for name, _ in (*kernel.signature, *kernel.constants)] == list(function.arg_names)


GOOD: dict[str, Any] = {"strides": STRIDES, "per_level": 16, "proposals": 20, "nms_threshold": 0.7}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strides": (4, 8)}, r"^rpn: .*strides is \[4, 8\]; give 5"),
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
            r"logits of level 1 are \(1, 3, 16, 16\); the first map, strides and anchors ask for \(1, 3, 8, 8\)",
        ),
        (7, TensorSpec((1, 3, 4, 4), "float32"), r"deltas of level 2 are .* ask for \(1, 12, 4, 4\)"),
        (5, TensorSpec((1, 12, 16, 16), "float16"), "deltas of level 0 are float16; give float32 or float16, the same for all"),
        (0, TensorSpec((1, 3, 16), "float32"), "logits of level 0 are"),
        (0, TensorSpec((1, 4, None, 16), "float32"), "logits of level 0 are"),
        (3, TensorSpec((2, 3, None, None), "float32"), r"logits of level 3 are \(2, 3, None, None\); .* ask for \(1, 3, 2, 2\)"),
        (10, TensorSpec((5, 3, 4), "float16"), "the anchors are"),
        (10, TensorSpec((5, None, 4), "float32"), "must be known and 1 or more"),
    ],
)
def test_wrong_inputs_are_refused(index: int, spec: TensorSpec, message: str) -> None:
    operator = Proposals("rpn", **GOOD)
    specs = [spec_of(x) for x in [*_maps((64, 64)), ANCHORS]]
    operator.check_inputs(specs)
    operator.check_inputs([*(TensorSpec((None, x.shape[1], None, x.shape[3]), x.dtype) for x in specs[:-1]), specs[-1]])
    with pytest.raises(InputError, match=message):
        operator.check_inputs([*specs[:index], spec, *specs[index + 1 :]])
    with pytest.raises(InputError, match="it has 10 inputs"):
        operator.check_inputs(specs[:-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_proposals_at_full_size_on_a_gpu(dtype: torch.dtype) -> None:
    maps, operator = _maps((800, 1344), dtype, spread=0.0, batch=2), _operator(1000, 1000)
    boxes, count = run(operator, [x.cuda() for x in [*maps, ANCHORS]])
    wanted, wanted_count = _expected(maps, operator)
    assert torch.equal(boxes.cpu(), wanted) and torch.equal(count.cpu(), wanted_count)
