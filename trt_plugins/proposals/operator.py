"""Proposals: what it takes and gives, and its launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trt_plugins.operator import TRITON_TYPES, Attribute, Buffer, DType, KernelSpec, Launch, Operator, TensorSpec, Workspace
from trt_plugins.selection.selection import COMPARED_BLOCK, LARGEST_K, RANKED_BLOCK, Selection, chunk, chunk_warps, chunks

KERNELS = "trt_plugins.proposals.kernel"
LEVELS = 5


class Proposals(Operator):
    """The RPN's proposals of one image (Ren et al., NeurIPS 2015), as `dynamask.inference.select_proposals` finds them.

    Inputs are the logits `[1, A, H_l, W_l]` of five levels, their deltas `[1, 4 A, H_l, W_l]`, all fp32 or all fp16, and the levels' cell
    anchors `[5, A, 4] float32` (torchvision's `AnchorGenerator.cell_anchors`), xyxy in pixels of the canvas. A level's map is the canvas
    over its stride, rounded up; its anchors are canvas // map pixels apart, as torchvision has them.

    On each level the `per_level` anchors with the highest logits are decoded (weights 1), clipped to the canvas and go through NMS, all
    in fp32; the best `proposals` of those kept are `proposals [P, 4] float32`, xyxy by falling logit, and 0 in the rows from
    `count [1] int32` on. Of equal logits the lower level counts as the higher, then the lower place in the order (y, x, anchor).
    """

    name = "Proposals"
    attributes = (
        Attribute("canvas", "ints"),
        Attribute("strides", "ints"),
        Attribute("per_level", "int"),
        Attribute("proposals", "int"),
        Attribute("nms_threshold", "float"),
    )
    outputs = ("proposals", "count")

    def check_attributes(self) -> None:
        """Refuse values that make no sense together.

        Raises:
            InputError: a canvas without two positive sides, not 5 positive strides, a number of boxes out of range.
        """
        canvas, strides = self.values["canvas"], self.values["strides"]
        if len(canvas) != 2 or min(canvas) < 1:
            raise self.refuse(f"canvas is {list(canvas)}; give height and width in pixels")
        if len(strides) != LEVELS or min(strides) < 1:
            raise self.refuse(f"strides is {list(strides)}; give {LEVELS}, pixels a cell of each level")
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
        if len(anchors.shape) != 3 or anchors.shape[0] != LEVELS or anchors.shape[2] != 4 or anchors.dtype != "float32":
            raise self.refuse(f"the anchors are {anchors.shape} {anchors.dtype}; give [{LEVELS}, A, 4] float32")
        if not anchors.shape[1]:
            raise self.refuse(f"the anchors are {anchors.shape}; their number in a cell must be known and 1 or more")
        for index, spec in enumerate(maps):
            kind, level = ("logits", "deltas")[index // LEVELS], index % LEVELS
            channels = anchors.shape[1] * (4 if kind == "deltas" else 1)
            size = [-(-side // self.values["strides"][level]) for side in self.values["canvas"]]
            if spec.shape != (1, channels, *size):
                raise self.refuse(f"{kind} of level {level} are {spec.shape}; canvas, strides and anchors ask for {(1, channels, *size)}")
            if spec.dtype not in ("float32", "float16") or spec.dtype != maps[0].dtype:
                raise self.refuse(f"{kind} of level {level} are {spec.dtype}; give float32 or float16, the same for all maps")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """fp32 boxes, and how many count."""
        return ["float32", "int32"]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`[P, 4]` and `[1]`."""
        return [[self.values["proposals"], 4], [1]]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """Five, or six where large maps are narrowed down in rounds."""
        return [self._select(inputs), self._decode(inputs), *self._selection(inputs).kernels(), self._merge()]

    def workspace(self, inputs: Sequence[TensorSpec]) -> Workspace:
        """Candidates, the best of each level, and which of these overlap."""
        return self._selection(inputs).workspace

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """Narrow the levels down, sort and decode, thin out, merge the levels."""
        selection, limit = self._selection(inputs), self.values["proposals"]
        logits, deltas = ([Buffer("input", first + level) for level in range(LEVELS)] for first in (0, LEVELS))
        sizes = [spec.size(axis) for spec in inputs[:LEVELS] for axis in (2, 3)]
        cells = [height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True)]
        keys, indices, candidates = selection.ranked
        boxes, best_keys, kept_keys, kept_counts = (selection.part(name) for name in ("boxes", "best_keys", "kept_keys", "kept_counts"))
        maps = (*deltas, Buffer("input", 2 * LEVELS))
        return [
            Launch(self._select(inputs), (selection.width // selection.k, LEVELS, 1), (*logits, *selection.entries, *cells, selection.k)),
            *selection.narrow(),
            Launch(
                self._decode(inputs),
                (-(-candidates // RANKED_BLOCK), LEVELS, 1),
                (*maps, keys, indices, boxes, best_keys, *sizes, *self.values["canvas"], candidates, selection.k),
            ),
            *selection.thin_out(self.values["nms_threshold"]),
            Launch(
                self._merge(),
                (-(-max(LEVELS * selection.k, limit) // RANKED_BLOCK), 1, 1),
                (boxes, kept_keys, kept_counts, Buffer("output", 0), Buffer("output", 1), selection.k, limit),
            ),
        ]

    def _selection(self, inputs: Sequence[TensorSpec]) -> Selection:
        anchors = max(spec.items for spec in inputs[:LEVELS])
        k = min(self.values["per_level"], anchors)
        return Selection(rows=LEVELS, width=chunks(anchors, k) * k, k=k, groups=1)

    def _select(self, inputs: Sequence[TensorSpec]) -> KernelSpec:
        k = self._selection(inputs).k
        kind = "*" + TRITON_TYPES[inputs[0].dtype]
        signature = [(f"logits{level}", kind) for level in range(LEVELS)] + [("keys", "*i32"), ("indices", "*i32")]
        signature += [(f"cells{level}", "i32") for level in range(LEVELS)] + [("k", "i32")]
        constants = (("ANCHORS", inputs[0].size(1)), ("CHUNK", chunk(k)))
        return KernelSpec(KERNELS, "select_anchors", tuple(signature), constants, num_warps=chunk_warps(k))

    def _decode(self, inputs: Sequence[TensorSpec]) -> KernelSpec:
        kind = "*" + TRITON_TYPES[inputs[0].dtype]
        signature = [(f"deltas{level}", kind) for level in range(LEVELS)] + [("anchors", "*fp32"), ("keys", "*i32"), ("indices", "*i32")]
        signature += [("boxes", "*fp32"), ("best_keys", "*i32")]
        signature += [(f"{side}{level}", "i32") for level in range(LEVELS) for side in ("height", "width")]
        signature += [(name, "i32") for name in ("canvas_height", "canvas_width", "candidates", "k")]
        constants = (("ANCHORS", inputs[0].size(1)), ("BLOCK", RANKED_BLOCK), ("COMPARED", COMPARED_BLOCK))
        return KernelSpec(KERNELS, "decode_anchors", tuple(signature), constants)

    def _merge(self) -> KernelSpec:
        signature = (("boxes", "*fp32"), ("kept_keys", "*i32"), ("kept_counts", "*i32"), ("proposals", "*fp32"), ("count", "*i32"))
        constants = (("LEVELS", LEVELS), ("BLOCK", RANKED_BLOCK), ("COMPARED", COMPARED_BLOCK))
        return KernelSpec(KERNELS, "merge_levels", (*signature, ("k", "i32"), ("limit", "i32")), constants)
