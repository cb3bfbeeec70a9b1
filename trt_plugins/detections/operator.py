"""Detections: what it takes and gives, and its launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trt_plugins.operator import (
    TRITON_TYPES,
    Attribute,
    Buffer,
    DataDependent,
    DType,
    KernelSpec,
    Launch,
    Operator,
    TensorSpec,
    Workspace,
)
from trt_plugins.selection.selection import COMPARED_BLOCK, LARGEST_K, RANKED_BLOCK, Selection, power_of_two

KERNELS = "trt_plugins.detections.kernel"
CANDIDATES = 10
"""Boxes that go through NMS for each slot."""
MOST_CLASSES = 2**12
SCORE_ITEMS = 512
"""Logits that a program turns to scores; at least one row."""


class Detections(Operator):
    """The detections of one image in K slots, as `dynamask.inference.select_detections` finds them.

    Inputs are `class_logits [P, C + 1]` and `box_deltas [P, 4 (C + 1)]`, both fp32 or both fp16, background first;
    `proposals [P, 4] float32`, xyxy in pixels of the canvas, of which the first `count [1] int32` count; and `min_score [] float32`.

    Of the scores (softmax) above both `score_threshold` and `min_score`, the 10 K highest are decoded (weights 10, 10, 5, 5), clipped to
    the canvas and go through NMS within their class, all in fp32; the best K of those kept are `boxes [K, 4]` and `scores [K]`, float32
    by falling score, and `labels [K] int64`, from 0. An empty slot has box and score 0 and label -1; `slots [n] int64` are the filled
    ones and `n []` their number. Of equal scores the lower proposal counts as the higher, then the lower class.
    """

    name = "Detections"
    attributes = (
        Attribute("canvas", "ints"),
        Attribute("detections", "int"),
        Attribute("score_threshold", "float"),
        Attribute("nms_threshold", "float"),
    )
    outputs = ("boxes", "scores", "labels", "slots", "n")

    def check_attributes(self) -> None:
        """Refuse values that make no sense together.

        Raises:
            InputError: a canvas without two positive sides, a number of detections out of range, a negative score threshold.
        """
        canvas = self.values["canvas"]
        if len(canvas) != 2 or min(canvas) < 1:
            raise self.refuse(f"canvas is {list(canvas)}; give height and width in pixels")
        if not 1 <= self.values["detections"] <= LARGEST_K // CANDIDATES:
            raise self.refuse(f"detections is {self.values['detections']}; give 1 to {LARGEST_K // CANDIDATES}")
        if not self.values["score_threshold"] >= 0:
            raise self.refuse(f"score_threshold is {self.values['score_threshold']}; give 0 or more")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs whose number, rank, sizes or types do not fit.

        Raises:
            InputError: names the node and the input.
        """
        if len(inputs) != 5:
            raise self.refuse(f"it has {len(inputs)} inputs; give class logits, box deltas, proposals, count and min_score")
        logits = inputs[0]
        if len(logits.shape) != 2 or not logits.shape[0] or not 2 <= (logits.shape[1] or 0) <= MOST_CLASSES + 1:
            raise self.refuse(f"the class logits are {logits.shape}; give [P, C + 1], both known, with 1 to {MOST_CLASSES} classes")
        if logits.dtype not in ("float32", "float16"):
            raise self.refuse(f"the class logits are {logits.dtype}; give float32 or float16")
        rows, columns = logits.size(0), logits.size(1)
        expected: list[tuple[str, tuple[int, ...], DType]] = [
            ("the box deltas", (rows, 4 * columns), logits.dtype),
            ("the proposals", (rows, 4), "float32"),
            ("count", (1,), "int32"),
            ("min_score", (), "float32"),
        ]
        for spec, (what, shape, dtype) in zip(inputs[1:], expected, strict=True):
            if spec.shape != shape or spec.dtype != dtype:
                raise self.refuse(f"{what}: given {spec.shape} {spec.dtype}; with these class logits it must be {shape} {dtype}")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """fp32 boxes and scores, int64 labels and slots."""
        return ["float32", "float32", "int64", "int64", "int64"]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`[K, 4]`, `[K]`, `[K]`, `[n]` with n at most K, and n itself."""
        slots = self.values["detections"]
        return [[slots, 4], [slots], [slots], [DataDependent(4, slots)], []]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """Five, or six where many scores are narrowed down first."""
        return [self._score(inputs), self._decode(inputs), *self._selection(inputs).kernels(), self._fill(inputs)]

    def workspace(self, inputs: Sequence[TensorSpec]) -> Workspace:
        """Candidates, the best of them, and which of these overlap."""
        return self._selection(inputs).workspace

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """Score, narrow down, sort and decode, thin out, fill the slots."""
        selection, (rows, columns), slots = self._selection(inputs), [inputs[0].size(axis) for axis in (0, 1)], self.values["detections"]
        logits, deltas, proposals, count, min_score = (Buffer("input", index) for index in range(5))
        written = (Buffer("output", index) for index in range(5))
        keys, indices, candidates = selection.ranked
        boxes, best_keys, best_indices = (selection.part(name) for name in ("boxes", "best_keys", "best_indices"))
        return [
            Launch(
                self._score(inputs),
                (-(-rows // _scored_rows(columns)), 1, 1),
                (logits, count, min_score, *selection.entries, rows, self.values["score_threshold"]),
            ),
            *selection.narrow(),
            Launch(
                self._decode(inputs),
                (-(-candidates // RANKED_BLOCK), 1, 1),
                (deltas, proposals, keys, indices, boxes, best_keys, best_indices, *self.values["canvas"], candidates, selection.k),
            ),
            *selection.thin_out(self.values["nms_threshold"]),
            Launch(
                self._fill(inputs),
                (-(-max(selection.k, slots) // RANKED_BLOCK), 1, 1),
                (boxes, best_indices, selection.part("kept_keys"), selection.part("kept_counts"), *written, selection.k, slots),
            ),
        ]

    def _selection(self, inputs: Sequence[TensorSpec]) -> Selection:
        classes = inputs[0].size(1) - 1
        scores = inputs[0].size(0) * classes
        return Selection(rows=1, width=scores, k=min(CANDIDATES * self.values["detections"], scores), groups=classes)

    def _score(self, inputs: Sequence[TensorSpec]) -> KernelSpec:
        columns = inputs[0].size(1)
        signature = (
            ("class_logits", "*" + TRITON_TYPES[inputs[0].dtype]),
            ("count", "*i32"),
            ("min_score", "*fp32"),
            ("keys", "*i32"),
            ("indices", "*i32"),
            ("rows", "i32"),
            ("score_threshold", "fp32"),
        )
        constants = (("CLASSES", columns - 1), ("ROWS", _scored_rows(columns)), ("COLUMNS", power_of_two(columns)))
        return KernelSpec(KERNELS, "score_classes", signature, constants)

    def _decode(self, inputs: Sequence[TensorSpec]) -> KernelSpec:
        signature = [("box_deltas", "*" + TRITON_TYPES[inputs[1].dtype]), ("proposals", "*fp32"), ("keys", "*i32"), ("indices", "*i32")]
        signature += [("boxes", "*fp32"), ("best_keys", "*i32"), ("best_indices", "*i32")]
        signature += [(name, "i32") for name in ("canvas_height", "canvas_width", "candidates", "k")]
        return KernelSpec(KERNELS, "decode_detections", tuple(signature), self._ranking(inputs))

    def _fill(self, inputs: Sequence[TensorSpec]) -> KernelSpec:
        signature = [("boxes", "*fp32"), ("best_indices", "*i32"), ("kept_keys", "*i32"), ("kept_counts", "*i32")]
        signature += [("slot_boxes", "*fp32"), ("scores", "*fp32"), ("labels", "*i64"), ("slots", "*i64"), ("n", "*i64")]
        signature += [("k", "i32"), ("detections", "i32")]
        return KernelSpec(KERNELS, "fill_slots", tuple(signature), self._ranking(inputs))

    def _ranking(self, inputs: Sequence[TensorSpec]) -> tuple[tuple[str, int], ...]:
        return ("CLASSES", inputs[0].size(1) - 1), ("BLOCK", RANKED_BLOCK), ("COMPARED", COMPARED_BLOCK)


def _scored_rows(columns: int) -> int:
    """Rows of class logits that a program turns to scores."""
    return max(1, SCORE_ITEMS // power_of_two(columns))
