"""Detections, in Triton's interpreter, against the model's own and torchvision's operators."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from dynamask.inference import select_detections
from dynamask.model import DynaMask
from runtime.errors import InputError
from trt_plugins.detections import Detections
from trt_plugins.detections.reference import detect
from trt_plugins.on_torch import run, spec_of
from trt_plugins.operator import TensorSpec

CANVAS = (96, 160)
THRESHOLDS = {"score_threshold": 0.05, "nms_threshold": 0.5}


def _operator(slots: int, canvas: tuple[int, int] = CANVAS, **thresholds: float) -> Detections:
    return Detections("boxes", canvas=canvas, detections=slots, **(THRESHOLDS | thresholds))


def _inputs(
    rows: int, classes: int, count: int | None = None, min_score: float = 0.0, dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * classes)
    corner = torch.randint(0, 80, (rows, 2), generator=generator).float()
    proposals = torch.cat([corner, corner + torch.randint(1, 60, (rows, 2), generator=generator)], dim=1)
    logits = torch.randn(rows, classes + 1, generator=generator) * 2
    deltas = torch.randn(rows, 4 * (classes + 1), generator=generator) * spread
    return [
        logits.to(dtype),
        deltas.to(dtype),
        proposals,
        torch.tensor([rows if count is None else count], dtype=torch.int32),
        torch.tensor(min_score),
    ]


def _check(found: list[Tensor], expected: tuple[Tensor, ...], exact: bool = False) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, atol=0 if exact else 1e-3, rtol=0)


def _expected(inputs: list[Tensor], operator: Detections) -> tuple[Tensor, ...]:
    return detect(*inputs, **operator.values)


@pytest.mark.parametrize(
    ("rows", "classes", "slots", "count", "min_score", "dtype"),
    [
        (30, 5, 10, 26, 0.02, torch.float32),
        (30, 5, 100, 30, 0.3, torch.float32),
        (64, 40, 4, 50, 0.0, torch.float32),
        (24, 7, 20, 24, 0.1, torch.float16),
        (3, 1, 10, 2, 0.0, torch.float32),
    ],
    ids=["all slots filled", "some slots filled", "narrowed down first", "half precision", "fewer candidates than slots"],
)
def test_detections_are_the_models(rows: int, classes: int, slots: int, count: int, min_score: float, dtype: torch.dtype) -> None:
    inputs, operator = _inputs(rows, classes, count, min_score, dtype), _operator(slots)
    boxes, scores, labels, filled, n = found = run(operator, inputs)
    _check(found, _expected(inputs, operator))
    assert filled.tolist() == list(range(int(n))) and n.shape == ()
    model = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(detections=slots, **THRESHOLDS)),
        roi_heads=SimpleNamespace(box_coder=BoxCoder((10.0, 10.0, 5.0, 5.0))),
    )
    wanted = select_detections(cast(DynaMask, model), *(x.float() for x in inputs[:3]), inputs[3], CANVAS, inputs[4])
    kept = min(slots, len(wanted.scores))
    _check([boxes[:kept], scores[:kept], labels[:kept]], (wanted.boxes[:kept], wanted.scores[:kept], wanted.labels[:kept]))


@pytest.mark.parametrize(("count", "min_score"), [(0, 0.0), (12, 1.0)])
def test_nothing_found_leaves_all_slots_empty(count: int, min_score: float) -> None:
    boxes, scores, labels, filled, n = run(_operator(5), _inputs(12, 3, count, min_score))
    assert not boxes.any() and not scores.any() and (labels == -1).all()
    assert filled.shape == (0,) and int(n) == 0


def test_rows_that_do_not_count_are_not_looked_at() -> None:
    inputs = _inputs(16, 3, 9)
    expected = run(_operator(6), inputs)
    inputs[0][9:], inputs[1][9:], inputs[2][9:] = float("nan"), float("inf"), float("nan")
    for got, wanted in zip(run(_operator(6), inputs), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("apart", [0.0, 30.0])
def test_equal_scores_count_by_proposal_and_class(apart: float) -> None:
    inputs, operator = _inputs(40, 3, spread=0.0), _operator(5)
    inputs[0][:] = 0.0
    inputs[2][:] = torch.arange(40)[:, None] % 5 * apart + torch.tensor([0.0, 0.0, 20.0, 20.0])
    found = run(operator, inputs)
    _check(found, _expected(inputs, operator), exact=True)
    # Equal boxes of one class suppress one another; those of other classes stay.
    assert found[2].tolist() == ([0, 1, 2, -1, -1] if apart == 0.0 else [0, 1, 2, 0, 1])


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 10**6), min_score=st.sampled_from([0.0, 0.1, 0.2]), overlap=st.sampled_from([0.25, 0.5]))
def test_none_overlaps_a_better_one_of_its_class_and_every_dropped_one_does(seed: int, min_score: float, overlap: float) -> None:
    rows, classes = 20, 2
    inputs = _inputs(rows, classes, min_score=min_score, spread=0.0)
    inputs[0] = torch.randn(rows, classes + 1, generator=torch.Generator().manual_seed(seed))
    boxes, scores, labels, _, n = run(_operator(40, nms_threshold=overlap), inputs)
    found = [(box, float(score), int(label)) for box, score, label in zip(boxes[:n], scores[:n], labels[:n], strict=True)]
    assert (scores[:n].diff() <= 0).all() and (scores[:n] > max(min_score, 0.05)).all()
    for place, (box, _, label) in enumerate(found):
        better = [other for other, _, other_label in found[:place] if other_label == label]
        assert not better or box_iou(box[None], torch.stack(better)).max() <= overlap
    for row, of_row in enumerate(torch.softmax(inputs[0], dim=1)[:, 1:].tolist()):
        for label, score in enumerate(of_row):
            box = inputs[2][row].clamp(min=0, max=96)
            box[0::2] = inputs[2][row][0::2].clamp(max=160)
            if score > max(min_score, 0.05) + 1e-6:
                better = [other for other, other_score, other_label in found if other_label == label and other_score >= score - 1e-6]
                assert box_iou(box[None], torch.stack(better)).max() > overlap


def test_kernels_list_their_arguments_in_order() -> None:
    operator = _operator(100)
    specs = [spec_of(x) for x in _inputs(1000, 80)]
    kernels = operator.kernels(specs)
    assert {launch.kernel for launch in operator.launches(specs, [])} == set(kernels)
    for kernel in kernels:
        function = getattr(importlib.import_module(kernel.module), kernel.function)
        assert [name for name, _ in (*kernel.signature, *kernel.constants)] == list(function.arg_names)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"canvas": (0, 64)}, r"^boxes: .*canvas is \[0, 64\]; give height and width"),
        ({"detections": 0}, "detections is 0; give 1 to 409"),
        ({"detections": 500}, "detections is 500; give 1 to 409"),
        ({"score_threshold": -0.1}, "score_threshold is -0.1; give 0 or more"),
    ],
)
def test_wrong_attributes_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Detections("boxes", **({"canvas": CANVAS, "detections": 10} | THRESHOLDS | wrong))


@pytest.mark.parametrize(
    ("index", "spec", "message"),
    [
        (0, TensorSpec((None, 4), "float32"), r"the class logits are \(None, 4\); give \[P, C \+ 1\], both known"),
        (0, TensorSpec((8, 1), "float32"), "with 1 to 4096 classes"),
        (0, TensorSpec((8, 4), "int32"), "the class logits are int32; give float32 or float16"),
        (
            1,
            TensorSpec((8, 16), "float16"),
            r"the box deltas: given \(8, 16\) float16; with these class logits it must be \(8, 16\) float32",
        ),
        (2, TensorSpec((7, 4), "float32"), r"the proposals: given \(7, 4\)"),
        (3, TensorSpec((1,), "int64"), "count: given"),
        (4, TensorSpec((1,), "float32"), "min_score: given"),
    ],
)
def test_wrong_inputs_are_refused(index: int, spec: TensorSpec, message: str) -> None:
    operator = _operator(10)
    specs = [spec_of(x) for x in _inputs(8, 3)]
    operator.check_inputs(specs)
    with pytest.raises(InputError, match=message):
        operator.check_inputs([*specs[:index], spec, *specs[index + 1 :]])
    with pytest.raises(InputError, match="it has 4 inputs"):
        operator.check_inputs(specs[:-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_detections_at_full_size_on_a_gpu(dtype: torch.dtype) -> None:
    operator = _operator(100, (800, 1344))
    inputs = _inputs(1000, 80, dtype=dtype, spread=0.0)
    inputs[2] *= 8
    found = [x.cpu() for x in run(operator, [x.cuda() for x in inputs])]
    _check(found, _expected(inputs, operator))
