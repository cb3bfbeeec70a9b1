"""The operator PasteMasks: inputs, outputs, kernel and launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trt_plugins.operator import TRITON_TYPES, Attribute, Buffer, DType, KernelSpec, Launch, Operator, TensorSpec, alike

BLOCK_ROWS, BLOCK_WORDS = 4, 8
"""Rows and words of a program: 1,024 pixels."""


class PasteMasks(Operator):
    """Masks as pixels: logits `[n, G, G]`, boxes `[n, 4] float32` -> `bits [n, height, ceil(width / 32)] int32`.

    Bit b of word w of row r is pixel `(r, 32 w + b)` of the frame, `height x width` pixels (attributes); boxes are xyxy in its pixels.
    The probabilities are sampled as in `runtime.paste.mask_crop`, in fp32; logits are float32 or float16.

    No engine contains it: it would run after an engine, where the frame's size is known. Whether it is faster than the host has not been
    measured on a GPU yet (docs/results/tensorrt.md).
    """

    name = "PasteMasks"
    attributes = (Attribute("height", "int"), Attribute("width", "int"))
    outputs = ("bits",)

    def check_attributes(self) -> None:
        """Refuse a frame without pixels.

        Raises:
            InputError: names the node and the attribute.
        """
        for name in ("height", "width"):
            if self.values[name] < 1:
                raise self.refuse(f"{name} is {self.values[name]}; give 1 or more, pixels of the frame")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs whose number, rank, sizes or types do not fit.

        Raises:
            InputError: names the node and the input.
        """
        if len(inputs) != 2:
            raise self.refuse(f"it has {len(inputs)} inputs; give the logits and the boxes")
        logits, boxes = inputs
        square = len(logits.shape) == 3 and logits.shape[1] is not None and logits.shape[1] == logits.shape[2]
        if not square or logits.dtype not in ("float32", "float16"):
            raise self.refuse(f"the logits are {logits.shape} {logits.dtype}; give [n, G, G] float32 or float16, G known")
        if len(boxes.shape) != 2 or boxes.shape[1] != 4 or not alike(boxes.shape[0], logits.shape[0]) or boxes.dtype != "float32":
            raise self.refuse(f"the boxes are {boxes.shape} {boxes.dtype} of logits {logits.shape}; give [n, 4] float32")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """int32, 32 pixels per item."""
        return ["int32"]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`[n, height, ceil(width / 32)]`."""
        return [[inputs[0][0], self.values["height"], -(-self.values["width"] // 32)]]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """One for each grid, for all frames and numbers of instances."""
        signature = (
            ("logits", "*" + TRITON_TYPES[inputs[0].dtype]),
            ("boxes", "*fp32"),
            ("bits", "*i32"),
            ("height", "i32"),
            ("width", "i32"),
        )
        constants = (("SIZE", inputs[0].size(1)), ("BLOCK_ROWS", BLOCK_ROWS), ("BLOCK_WORDS", BLOCK_WORDS))
        return [KernelSpec("trt_plugins.paste_masks.kernel", "paste_masks", signature, constants)]

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """One launch, with a program for each block of words of each instance."""
        instances, height, words = (outputs[0].size(axis) for axis in range(3))
        blocks = -(-height // BLOCK_ROWS) * -(-words // BLOCK_WORDS)
        arguments = (Buffer("input", 0), Buffer("input", 1), Buffer("output", 0), height, self.values["width"])
        return [Launch(self.kernels(inputs)[0], (instances * blocks, 1, 1), arguments)]
