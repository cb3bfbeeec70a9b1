"""The operator Proposals: inputs, outputs, kernels and launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trt_plugins.operator import (
    TRITON_TYPES,
    Attribute,
    Buffer,
    DType,
    KernelSpec,
    Launch,
    Operator,
    TensorSpec,
    Workspace,
    alike,
    canvas_of,
    times,
)
from trt_plugins.selection.selection import COMPARED_BLOCK, LARGEST_K, RANKED_BLOCK, Selection, chunk, chunk_warps, chunks

KERNELS = "trt_plugins.proposals.kernel"
LEVELS = 5


class Proposals(Operator):
    """The RPN's proposals of each image (Ren et al., NeurIPS 2015), as `dynamask.detector.select_proposals` finds them.

    On each level of an image the `per_level` anchors with the highest logits are decoded (weights 1), clipped to the canvas, and go through
    NMS, all in fp32. The best P = `proposals` boxes of all levels are the image's proposals, by falling logit. Of equal logits, the one of
    the lower level comes first, then the one of the lower place in the order (y, x, anchor).

    Inputs, for five levels l:
        logits: five maps `[B, A, H_l, W_l]`, all float32 or all float16.
        deltas: five maps `[B, 4 A, H_l, W_l]`, of the same type.
        anchors: `[5, A, 4] float32`, torchvision's `AnchorGenerator.cell_anchors`, xyxy in pixels of the canvas.

    The canvas is the first level's map times its stride. Every map has the canvas's size divided by its own stride, rounded up. Anchors are
    canvas // map pixels apart, as in torchvision.

    Outputs:
        proposals: `[B P, 4] float32`, xyxy in pixels of the canvas; 0 in the rows of an image from its count on.
        count: `[B] int32`, the number of proposals of each image.
    """

    name = "Proposals"
    attributes = (
        Attribute("strides", "ints"),
        Attribute("per_level", "int"),
        Attribute("proposals", "int"),
        Attribute("nms_threshold", "float"),
    )
    outputs = ("proposals", "count")

    def check_attributes(self) -> None:
        """Refuse attribute values that are out of range or do not fit each other.

        Raises:
            InputError: not 5 positive strides, a number of boxes out of range.
        """
        strides = self.values["strides"]
        if len(strides) != LEVELS or min(strides) < 1:
            raise self.refuse(f"strides is {list(strides)}; give {LEVELS}, in pixels per cell")
        if not 1 <= self.values["per_level"] <= LARGEST_K:
            raise self.refuse(f"per_level is {self.values['per_level']}; give 1 to {LARGEST_K}")
        if self.values["proposals"] < 1:
            raise self.refuse(f"proposals is {self.values['proposals']}; give 1 or more")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs whose number, rank, sizes or types do not fit.

        Raises:
            InputError: names the node and the input.
        """
        if len(inputs) != 2 * LEVELS + 1:
            raise self.refuse(f"it has {len(inputs)} inputs; give {LEVELS} logits, {LEVELS} deltas and the anchors")
        *maps, anchors = inputs
        strides = self.values["strides"]
        if len(anchors.shape) != 3 or anchors.shape[0] != LEVELS or anchors.shape[2] != 4 or anchors.dtype != "float32":
            raise self.refuse(f"the anchors are {anchors.shape} {anchors.dtype}; give [{LEVELS}, A, 4] float32")
        if not anchors.shape[1]:
            raise self.refuse(f"the anchors are {anchors.shape}; their number in a cell must be known and 1 or more")
        for index, spec in enumerate(maps):
            kind, level = ("logits", "deltas")[index // LEVELS], index % LEVELS
            channels = anchors.shape[1] * (4 if kind == "deltas" else 1)
            sides = [None if side is None else -(-side * strides[0] // strides[level]) for side in maps[0].shape[2:]]
            wanted = (maps[0].shape[0], channels, *sides)
            if len(spec.shape) != 4 or spec.shape[1] != channels or not all(map(alike, spec.shape, wanted)):
                raise self.refuse(f"{kind} of level {level} are {spec.shape}; the first map, strides and anchors ask for {wanted}")
            if spec.dtype not in ("float32", "float16") or spec.dtype != maps[0].dtype:
                raise self.refuse(f"{kind} of level {level} are {spec.dtype}; give float32 or float16, the same for all maps")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """float32 boxes, and int32 counts."""
        return ["float32", "int32"]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`[B P, 4]` and `[B]`."""
        images = inputs[0][0]
        return [[times(images, self.values["proposals"]), 4], [images]]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """Six, for all sizes of the maps; if these are small, `select` is not launched."""
        k = self.values["per_level"]
        return [self._select(inputs), self._decode(inputs), *Selection(LEVELS, k, k, groups=1).kernels(), self._merge()]

    def workspace(self, inputs: Sequence[TensorSpec]) -> Workspace:
        """Candidates, the best of each level of each image, and their overlaps."""
        return self._selection(inputs).workspace

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """Top-k of each level, sort and decode, NMS, merge the levels."""
        selection, limit, images = self._selection(inputs), self.values["proposals"], inputs[0].size(0)
        canvas = canvas_of(inputs[0], self.values["strides"][0])
        logits, deltas = ([Buffer("input", first + level) for level in range(LEVELS)] for first in (0, LEVELS))
        sizes = [spec.size(axis) for spec in inputs[:LEVELS] for axis in (2, 3)]
        cells = [height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True)]
        keys, indices, candidates = selection.ranked
        boxes, best_keys, kept_keys, kept_counts = (selection.part(name) for name in ("boxes", "best_keys", "kept_keys", "kept_counts"))
        maps = (*deltas, Buffer("input", 2 * LEVELS))
        return [
            Launch(
                self._select(inputs), (selection.width // selection.k, LEVELS, images), (*logits, *selection.entries, *cells, selection.k)
            ),
            *selection.top_k(),
            Launch(
                self._decode(inputs),
                (-(-candidates // RANKED_BLOCK), LEVELS, images),
                (*maps, keys, indices, boxes, best_keys, *sizes, *canvas, candidates, selection.k),
            ),
            *selection.nms(self.values["nms_threshold"]),
            Launch(
                self._merge(),
                (-(-max(LEVELS * selection.k, limit) // RANKED_BLOCK), images, 1),
                (boxes, kept_keys, kept_counts, Buffer("output", 0), Buffer("output", 1), selection.k, limit),
            ),
        ]

    def _selection(self, inputs: Sequence[TensorSpec]) -> Selection:
        # A level with fewer than k anchors is padded with EMPTY: so the compiled kernels do not depend on the canvas.
        k, images = self.values["per_level"], inputs[0].size(0)
        anchors = max(math.prod(spec.size(axis) for axis in (1, 2, 3)) for spec in inputs[:LEVELS])
        return Selection(rows=LEVELS * images, width=chunks(anchors, k) * k, k=k, groups=1)

    def _select(self, inputs: Sequence[TensorSpec]) -> KernelSpec:
        k = self.values["per_level"]
        kind = "*" + TRITON_TYPES[inputs[0].dtype]
        signature = [(f"logits{level}", kind) for level in range(LEVELS)] + [("keys", "*i32"), ("indices", "*i32")]
        signature += [(f"cells{level}", "i32") for level in range(LEVELS)] + [("k", "i32")]
        constants = (("ANCHORS", inputs[-1].size(1)), ("CHUNK", chunk(k)))
        return KernelSpec(KERNELS, "select_anchors", tuple(signature), constants, num_warps=chunk_warps(k))

    def _decode(self, inputs: Sequence[TensorSpec]) -> KernelSpec:
        kind = "*" + TRITON_TYPES[inputs[0].dtype]
        signature = [(f"deltas{level}", kind) for level in range(LEVELS)] + [("anchors", "*fp32"), ("keys", "*i32"), ("indices", "*i32")]
        signature += [("boxes", "*fp32"), ("best_keys", "*i32")]
        signature += [(f"{side}{level}", "i32") for level in range(LEVELS) for side in ("height", "width")]
        signature += [(name, "i32") for name in ("canvas_height", "canvas_width", "candidates", "k")]
        constants = (("ANCHORS", inputs[-1].size(1)), ("BLOCK", RANKED_BLOCK), ("COMPARED", COMPARED_BLOCK))
        return KernelSpec(KERNELS, "decode_anchors", tuple(signature), constants)

    def _merge(self) -> KernelSpec:
        signature = (("boxes", "*fp32"), ("kept_keys", "*i32"), ("kept_counts", "*i32"), ("proposals", "*fp32"), ("count", "*i32"))
        constants = (("LEVELS", LEVELS), ("BLOCK", RANKED_BLOCK), ("COMPARED", COMPARED_BLOCK))
        return KernelSpec(KERNELS, "merge_levels", (*signature, ("k", "i32"), ("limit", "i32")), constants)
