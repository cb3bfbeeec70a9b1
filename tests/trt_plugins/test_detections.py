"""Detections, in Triton's interpreter, against the model's own and torchvision's operators."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from dynamask.detector import CANDIDATES_PER_DETECTION, Detector, select_detections
from runtime.errors import InputError
from trt_plugins.detections import Detections
from trt_plugins.detections.reference import detect
from trt_plugins.on_torch import run, spec_of
from trt_plugins.operator import TensorSpec

CANVAS = (96, 160)
THRESHOLDS = {"score_threshold": 0.05, "nms_threshold": 0.5}


def _operator(slots: int, rows: int, **thresholds: float) -> Detections:
    return Detections(
        "boxes", proposals=rows, stride=4, detections=slots, candidates=CANDIDATES_PER_DETECTION * slots, **(THRESHOLDS | thresholds)
    )


def _inputs(
    rows: int,
    classes: int,
    counts: Sequence[int] = (),
    min_score: float = 0.0,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    canvas: tuple[int, int] = CANVAS,
) -> list[Tensor]:
    """Of as many images as there are counts, by default of one that all its rows count of."""
    generator = torch.Generator().manual_seed(rows * classes)
    counts = counts or [rows]
    rows *= len(counts)
    corner = torch.randint(0, 80, (rows, 2), generator=generator).float()
    proposals = torch.cat([corner, corner + torch.randint(1, 60, (rows, 2), generator=generator)], dim=1)
    logits = torch.randn(rows, classes + 1, generator=generator) * 2
    deltas = torch.randn(rows, 4 * (classes + 1), generator=generator) * spread
    return [
        logits.to(dtype),
        deltas.to(dtype),
        proposals,
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(min_score),
        torch.empty(len(counts), 2, canvas[0] // 4, canvas[1] // 4, dtype=dtype),
    ]


def _of_image(inputs: list[Tensor], image: int) -> list[Tensor]:
    """What one image gives alone."""
    batch = len(inputs[3])
    return [x if x.ndim == 0 else x.view(batch, -1, *x.shape[1:])[image] for x in inputs]


def _check(found: list[Tensor], expected: tuple[Tensor, ...], exact: bool = False) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, atol=0 if exact else 1e-3, rtol=0)


def _expected(inputs: list[Tensor], operator: Detections) -> tuple[Tensor, ...]:
    reference: Callable[..., tuple[Tensor, ...]] = detect
    return reference(*inputs, **operator.values)


@pytest.mark.parametrize(
    ("rows", "classes", "slots", "counts", "min_score", "dtype"),
    [
        (30, 5, 10, [26], 0.02, torch.float32),
        (30, 5, 100, [30], 0.3, torch.float32),
        (64, 40, 4, [50], 0.0, torch.float32),
        (12, 3, 8, [12, 9], 0.1, torch.float16),
        (12, 3, 5, [12, 0, 7], 0.0, torch.float32),
        (3, 1, 10, [2], 0.0, torch.float32),
    ],
    ids=[
        "all slots filled",
        "some slots filled",
        "narrowed down first",
        "half precision",
        "none between two with some",
        "fewer candidates than slots",
    ],
)
def test_detections_agree_with_the_model_and_each_image_alone(
    rows: int, classes: int, slots: int, counts: list[int], min_score: float, dtype: torch.dtype
) -> None:
    inputs, operator = _inputs(rows, classes, counts, min_score, dtype), _operator(slots, rows)
    found = run(operator, inputs)
    _check(found, _expected(inputs, operator))
    filled, n = found[3:]
    assert torch.equal(filled, torch.nonzero(found[2] >= 0)[:, 0]) and n.shape == () and int(n) == len(filled)
    boxes, scores, labels = (x.view(len(counts), slots, *x.shape[1:]) for x in found[:3])
    model = SimpleNamespace(
        sizes=SimpleNamespace(detections=slots, **THRESHOLDS),
        roi_heads=SimpleNamespace(box_coder=BoxCoder((10.0, 10.0, 5.0, 5.0))),
    )
    for image in range(len(counts)):
        own = _of_image(inputs, image)
        logits, deltas, proposals = (x.float() for x in own[:3])
        wanted = select_detections(cast(Detector, model), logits, deltas, proposals, own[3], CANVAS, own[4])
        kept = min(slots, len(wanted.scores))
        assert (counts[image] == 0) == bool((labels[image] < 0).all())
        best = [x[image, :kept] for x in (boxes, scores, labels)]
        _check(best, (wanted.boxes[:kept], wanted.scores[:kept], wanted.labels[:kept]))
        if len(counts) > 1:
            alone = run(operator, own)
            _check([boxes[image], scores[image], labels[image]], tuple(alone[:3]), exact=True)
            of_image = filled // slots == image
            assert torch.equal(filled[of_image] % slots, alone[3])


@pytest.mark.parametrize(("counts", "min_score"), [([0, 0], 0.0), ([12], 1.0)])
def test_nothing_found_leaves_all_slots_empty(counts: list[int], min_score: float) -> None:
    boxes, scores, labels, filled, n = run(_operator(5, 12), _inputs(12, 3, counts, min_score))
    assert len(scores) == 5 * len(counts)
    assert not boxes.any() and not scores.any() and (labels == -1).all()
    assert filled.shape == (0,) and int(n) == 0


def test_rows_beyond_the_count_are_ignored() -> None:
    inputs = _inputs(16, 3, [9])
    expected = run(_operator(6, 16), inputs)
    inputs[0][9:], inputs[1][9:], inputs[2][9:] = float("nan"), float("inf"), float("nan")
    for got, wanted in zip(run(_operator(6, 16), inputs), expected, strict=True):
        assert torch.equal(got, wanted)


def test_equal_scores_are_ordered_by_proposal_and_class() -> None:
    """All boxes of the first image are equal, those of the second lie 30 pixels apart in five places."""
    inputs, operator = _inputs(40, 3, [40, 40], spread=0.0), _operator(5, 40)
    inputs[0][:] = 0.0
    inputs[2][:] = torch.arange(80)[:, None] // 40 * 30 * (torch.arange(80)[:, None] % 5) + torch.tensor([0.0, 0.0, 20.0, 20.0])
    found = run(operator, inputs)
    _check(found, _expected(inputs, operator), exact=True)
    # Equal boxes of one class suppress one another; those of other classes stay.
    assert found[2].tolist() == [0, 1, 2, -1, -1, 0, 1, 2, 0, 1]
    assert found[3].tolist() == [0, 1, 2, 5, 6, 7, 8, 9]


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 10**6), min_score=st.sampled_from([0.0, 0.1, 0.2]), overlap=st.sampled_from([0.25, 0.5]))
def test_none_overlaps_a_better_one_of_its_class_and_every_dropped_one_does(seed: int, min_score: float, overlap: float) -> None:
    rows, classes = 20, 2
    inputs = _inputs(rows, classes, min_score=min_score, spread=0.0)
    inputs[0] = torch.randn(rows, classes + 1, generator=torch.Generator().manual_seed(seed))
    boxes, scores, labels, _, n = run(_operator(40, rows, nms_threshold=overlap), inputs)
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
    operator = _operator(100, 1000)
    specs = [spec_of(x) for x in _inputs(1000, 80)]
    # Known before the number of images and the canvas are.
    unknown = [TensorSpec((None, *x.shape[1:]), x.dtype) for x in specs[:4]]
    kernels = operator.kernels([*unknown, specs[4], TensorSpec((None, 2, None, None), "float32")])
    assert {launch.kernel for launch in operator.launches(specs, [])} == set(kernels)
    for kernel in kernels:
        function = getattr(importlib.import_module(kernel.module), kernel.function)
        assert [name for name, _ in (*kernel.signature, *kernel.constants)] == list(function.arg_names)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"proposals": 0}, r"^boxes: .*proposals is 0; give 1 or more"),
        ({"stride": 0}, "stride is 0; give 1 or more"),
        ({"detections": 0}, "detections is 0; give 1 or more"),
        ({"detections": 101}, "candidates is 100 and detections is 101; give at least as many candidates as detections, at most 4096"),
        ({"candidates": 4097}, "candidates is 4097 and detections is 10; .* at most 4096"),
        ({"score_threshold": -0.1}, "score_threshold is -0.1; give 0 or more"),
    ],
)
def test_wrong_attributes_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Detections("boxes", **({"proposals": 8, "stride": 4, "detections": 10, "candidates": 100} | THRESHOLDS | wrong))


@pytest.mark.parametrize(
    ("index", "spec", "message"),
    [
        (0, TensorSpec((None, None), "float32"), r"the class logits are \(None, None\); give \[B P, C \+ 1\], C known"),
        (0, TensorSpec((16, 4), "float32"), r"the class logits are \(16, 4\); with a map \(1, 2, 24, 40\) give 8 rows per image"),
        (0, TensorSpec((None, 4), "float16"), r"the box deltas: given \(8, 16\) float32"),
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
        (5, TensorSpec((2, 2, 24, 40), "float32"), "give 8 rows per image"),
        (5, TensorSpec((1, 2, 24), "float32"), "the map is"),
        (5, TensorSpec((1, 2, 24, 40), "int32"), "the map is .* int32"),
    ],
)
def test_wrong_inputs_are_refused(index: int, spec: TensorSpec, message: str) -> None:
    operator = _operator(10, 8)
    specs = [spec_of(x) for x in _inputs(8, 3)]
    operator.check_inputs(specs)
    operator.check_inputs([*(TensorSpec((None, *x.shape[1:]), x.dtype) for x in specs[:4]), *specs[4:]])
    operator.check_inputs([*specs[:5], TensorSpec((None, None, None, None), "float16")])
    with pytest.raises(InputError, match=message):
        operator.check_inputs([*specs[:index], spec, *specs[index + 1 :]])
    with pytest.raises(InputError, match="it has 5 inputs"):
        operator.check_inputs(specs[:-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_detections_at_full_size_on_a_gpu(dtype: torch.dtype) -> None:
    operator = _operator(100, 1000)
    inputs = _inputs(1000, 80, [1000, 300], dtype=dtype, spread=0.0, canvas=(800, 1344))
    inputs[2] *= 8
    found = [x.cpu() for x in run(operator, [x.cuda() for x in inputs])]
    _check(found, _expected(inputs, operator))
