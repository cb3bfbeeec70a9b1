"""The operator Detections: inputs, outputs, kernels and launches."""

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
    alike,
    canvas_of,
    power_of_two,
    times,
)
from trt_plugins.selection.selection import COMPARED_BLOCK, LARGEST_K, RANKED_BLOCK, Selection

KERNELS = "trt_plugins.detections.kernel"
MAX_CLASSES = 2**12
SCORE_ITEMS = 512
"""Logits that a program converts to scores, if a row has no more."""


class Detections(Operator):
    """The detections of each image in K = `detections` slots, as `dynamask.detector.select_detections` finds them.

    Of an image's scores (softmax) above `score_threshold` and `min_score`, the `candidates` highest are decoded (weights 10, 10, 5, 5),
    clipped to the canvas, and go through NMS in their class, all in fp32. The best K of the kept ones fill the image's slots, by falling
    score. Of equal scores, the one of the lower proposal comes first, then the one of the lower class.

    Inputs, with P = `proposals` rows per image:
        class_logits: `[B P, C + 1]` float32 or float16, background first.
        box_deltas: `[B P, 4 (C + 1)]`, of the same type.
        proposals: `[B P, 4] float32`, xyxy in pixels of the canvas.
        count: `[B] int32`, the number of valid proposals of each image, which come first.
        min_score: `[] float32`.
        map: `[B, any, H, W]` float32 or float16, which covers the canvas with `stride` pixels per cell; its values are not read.

    Outputs:
        boxes: `[B K, 4] float32`, xyxy in pixels of the canvas; 0 in an empty slot.
        scores: `[B K] float32`; 0 in an empty slot.
        labels: `[B K] int64`, from 0; -1 in an empty slot.
        slots: `[n] int64`, the filled slots, ascending.
        n: `[] int64`, their number.
    """

    name = "Detections"
    attributes = (
        Attribute("proposals", "int"),
        Attribute("stride", "int"),
        Attribute("detections", "int"),
        Attribute("candidates", "int"),
        Attribute("score_threshold", "float"),
        Attribute("nms_threshold", "float"),
    )
    outputs = ("boxes", "scores", "labels", "slots", "n")

    def check_attributes(self) -> None:
        """Refuse attribute values that are out of range or do not fit each other.

        Raises:
            InputError: a number of proposals, detections or a stride below 1, candidates fewer than detections or too many, or a negative
                score threshold.
        """
        for name in ("proposals", "stride", "detections"):
            if self.values[name] < 1:
                raise self.refuse(f"{name} is {self.values[name]}; give 1 or more")
        if not self.values["detections"] <= self.values["candidates"] <= LARGEST_K:
            raise self.refuse(
                f"candidates is {self.values['candidates']} and detections is {self.values['detections']}; "
                f"give at least as many candidates as detections, at most {LARGEST_K}"
            )
        if not self.values["score_threshold"] >= 0:
            raise self.refuse(f"score_threshold is {self.values['score_threshold']}; give 0 or more")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs whose number, rank, sizes or types do not fit.

        Raises:
            InputError: names the node and the input.
        """
        if len(inputs) != 6:
            raise self.refuse(f"it has {len(inputs)} inputs; give class logits, box deltas, proposals, count, min_score and a map")
        logits, *middle, feature = inputs
        each = self.values["proposals"]
        if len(logits.shape) != 2 or not 2 <= (logits.shape[1] or 0) <= MAX_CLASSES + 1:
            raise self.refuse(f"the class logits are {logits.shape}; give [B P, C + 1], C known, with 1 to {MAX_CLASSES} classes")
        if logits.dtype not in ("float32", "float16"):
            raise self.refuse(f"the class logits are {logits.dtype}; give float32 or float16")
        if len(feature.shape) != 4 or feature.dtype not in ("float32", "float16"):
            raise self.refuse(f"the map is {feature.shape} {feature.dtype}; give [B, any, H, W] float32 or float16")
        images, columns = feature.shape[0], logits.size(1)
        rows = logits.shape[0] if images is None else images * each
        if not alike(logits.shape[0], rows) or (rows is not None and (rows < each or rows % each)):
            raise self.refuse(f"the class logits are {logits.shape}; with a map {feature.shape} give {each} rows per image")
        images = None if rows is None else rows // each
        expected: list[tuple[str, tuple[int | None, ...], DType]] = [
            ("the box deltas", (rows, 4 * columns), logits.dtype),
            ("the proposals", (rows, 4), "float32"),
            ("count", (images,), "int32"),
            ("min_score", (), "float32"),
        ]
        for spec, (name, shape, dtype) in zip(middle, expected, strict=True):
            if (
                len(spec.shape) != len(shape)
                or not all(map(alike, spec.shape, shape))
                or spec.shape[1:] != shape[1:]
                or spec.dtype != dtype
            ):
                raise self.refuse(f"{name}: given {spec.shape} {spec.dtype}; with these class logits it must be {shape} {dtype}")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """fp32 boxes and scores, int64 labels and slots."""
        return ["float32", "float32", "int64", "int64", "int64"]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`[B K, 4]`, `[B K]`, `[B K]`, `[n]` with n at most B K, and n itself."""
        slots = times(inputs[-1][0], self.values["detections"])
        return [[slots, 4], [slots], [slots], [DataDependent(4, slots)], []]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """Six, for all canvases and numbers of images; if there are few scores, `select` is not launched."""
        return [self._score(inputs), self._decode(inputs), *self._selection(inputs, images=1).kernels(), self._fill(inputs)]

    def workspace(self, inputs: Sequence[TensorSpec]) -> Workspace:
        """Candidates of each image, the best of them, and their overlaps."""
        return self._selection(inputs, inputs[-1].size(0)).workspace

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """Score, top-k, sort and decode, NMS, fill the slots."""
        rows, slots, columns, images = self.values["proposals"], self.values["detections"], inputs[0].size(1), inputs[-1].size(0)
        selection, canvas = self._selection(inputs, images), canvas_of(inputs[-1], self.values["stride"])
        logits, deltas, proposals, count, min_score = (Buffer("input", index) for index in range(5))
        written = (Buffer("output", index) for index in range(5))
        keys, indices, candidates = selection.ranked
        boxes, best_keys, best_indices = (selection.part(name) for name in ("boxes", "best_keys", "best_indices"))
        return [
            Launch(
                self._score(inputs),
                (-(-rows // _scored_rows(columns)), images, 1),
                (logits, count, min_score, *selection.entries, rows, self.values["score_threshold"]),
            ),
            *selection.top_k(),
            Launch(
                self._decode(inputs),
                (-(-candidates // RANKED_BLOCK), images, 1),
                (deltas, proposals, keys, indices, boxes, best_keys, best_indices, *canvas, rows, candidates, selection.k),
            ),
            *selection.nms(self.values["nms_threshold"]),
            Launch(
                self._fill(inputs),
                (-(-max(selection.k, slots) // RANKED_BLOCK), images, 1),
                (boxes, best_indices, selection.part("kept_keys"), selection.part("kept_counts"), *written, selection.k, slots),
            ),
        ]

    def _selection(self, inputs: Sequence[TensorSpec], images: int) -> Selection:
        classes = inputs[0].size(1) - 1
        scores = self.values["proposals"] * classes
        return Selection(rows=images, width=scores, k=min(self.values["candidates"], scores), groups=classes)

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
        signature += [(name, "i32") for name in ("canvas_height", "canvas_width", "rows", "candidates", "k")]
        return KernelSpec(KERNELS, "decode_detections", tuple(signature), self._ranking(inputs))

    def _fill(self, inputs: Sequence[TensorSpec]) -> KernelSpec:
        signature = [("boxes", "*fp32"), ("best_indices", "*i32"), ("kept_keys", "*i32"), ("kept_counts", "*i32")]
        signature += [("slot_boxes", "*fp32"), ("scores", "*fp32"), ("labels", "*i64"), ("slots", "*i64"), ("n", "*i64")]
        signature += [("k", "i32"), ("detections", "i32")]
        return KernelSpec(KERNELS, "fill_slots", tuple(signature), self._ranking(inputs))

    def _ranking(self, inputs: Sequence[TensorSpec]) -> tuple[tuple[str, int], ...]:
        return ("CLASSES", inputs[0].size(1) - 1), ("BLOCK", RANKED_BLOCK), ("COMPARED", COMPARED_BLOCK)


def _scored_rows(columns: int) -> int:
    """Rows of class logits that a program converts to scores."""
    return max(1, SCORE_ITEMS // power_of_two(columns))
