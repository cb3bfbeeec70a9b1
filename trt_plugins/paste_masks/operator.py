"""The operator PasteMasks: inputs, outputs, kernel and launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trt_plugins.operator import TRITON_TYPES, Attribute, Buffer, DType, KernelSpec, Launch, Operator, TensorSpec, alike
from trt_plugins.paste_masks.windows import BLOCK_ROWS, BLOCK_WORDS, FIELDS


class PasteMasks(Operator):
    """Masks of one grid as pixels: logits `[n, G, G]`, boxes `[n, 4] float32`, windows `[n, 6] int32`, owners `[P] int32` ->
    `bits [words] int32`.

    Boxes are xyxy in the pixels of the instances' images. A window is the part of the image with the pixels whose centres are in the box,
    and where its bits go (`trt_plugins.paste_masks.windows`). The probabilities are sampled as in `runtime.paste.mask_crop`, in fp32;
    logits are float32 or float16. `words`, an attribute, is the room in `bits`; words of no window keep their content.

    The runner of engines launches it after the network, where the sizes of images are known; no graph contains it.
    """

    name = "PasteMasks"
    attributes = (Attribute("words", "int"),)
    outputs = ("bits",)

    def check_attributes(self) -> None:
        """Refuse a negative room.

        Raises:
            InputError: names the node and the attribute.
        """
        if self.values["words"] < 0:
            raise self.refuse(f"words is {self.values['words']}; give 0 or more")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs whose number, rank, sizes or types do not fit.

        Raises:
            InputError: names the node and the input.
        """
        if len(inputs) != 4:
            raise self.refuse(f"it has {len(inputs)} inputs; give the logits, boxes, windows and owners")
        logits, boxes, windows, owners = inputs
        square = len(logits.shape) == 3 and logits.shape[1] is not None and logits.shape[1] == logits.shape[2]
        if not square or logits.dtype not in ("float32", "float16"):
            raise self.refuse(f"the logits are {logits.shape} {logits.dtype}; give [n, G, G] float32 or float16, G known")
        for name, tensor, columns, dtype in (("boxes", boxes, 4, "float32"), ("windows", windows, FIELDS, "int32")):
            rows = len(tensor.shape) == 2 and tensor.shape[1] == columns and alike(tensor.shape[0], logits.shape[0])
            if not rows or tensor.dtype != dtype:
                raise self.refuse(f"the {name} are {tensor.shape} {tensor.dtype} of logits {logits.shape}; give [n, {columns}] {dtype}")
        if len(owners.shape) != 1 or owners.dtype != "int32":
            raise self.refuse(f"the owners are {owners.shape} {owners.dtype}; give [P] int32")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """int32, 32 pixels per item."""
        return ["int32"]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`[words]`."""
        return [[self.values["words"]]]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """One for each grid and type of logits."""
        return [paste_kernel(inputs[0].size(1), inputs[0].dtype)]

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """One launch, with a program for each owner."""
        pointers = tuple(Buffer("input", index) for index in range(4))
        arguments = (*pointers, Buffer("output", 0), inputs[0].size(0), self.values["words"])
        return [Launch(self.kernels(inputs)[0], (inputs[3].size(0) if inputs[0].size(0) else 0, 1, 1), arguments)]


def paste_kernel(grid: int, dtype: DType = "float32") -> KernelSpec:
    """The kernel for masks of `grid x grid` logits of a type."""
    signature = (
        ("logits", "*" + TRITON_TYPES[dtype]),
        ("boxes", "*fp32"),
        ("windows", "*i32"),
        ("owners", "*i32"),
        ("bits", "*i32"),
        ("instances", "i32"),
        ("total_words", "i32"),
    )
    constants = (("SIZE", grid), ("BLOCK_ROWS", BLOCK_ROWS), ("BLOCK_WORDS", BLOCK_WORDS))
    return KernelSpec("trt_plugins.paste_masks.kernel", "paste_masks", signature, constants)
