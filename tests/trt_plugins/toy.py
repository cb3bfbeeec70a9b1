"""An operator to test with: it keeps the rows whose first item is above a threshold, and scales them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from trt_plugins.operator import TRITON_TYPES, Attribute, Buffer, DataDependent, DType, KernelSpec, Launch, Operator, TensorSpec, Workspace

MOST_ROWS = 64
BLOCK = 32


@triton.jit
def find_rows(x, places, indices, size, n, columns, threshold, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    keep = tl.load(x + row * columns, mask=row < n, other=0.0).to(tl.float32) > threshold
    keep = (keep & (row < n)).to(tl.int32)
    place = tl.cumsum(keep, 0) - keep
    tl.store(places + row, tl.where(keep == 1, place, -1), mask=row < n)
    tl.store(indices + place, row.to(tl.int64), mask=keep == 1)
    tl.store(size, tl.sum(keep, 0).to(tl.int64))


@triton.jit
def scale_rows(x, places, gain, y, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = tl.load(places + row)
    column = tl.arange(0, BLOCK)
    mask = (column < columns) & (place >= 0)
    value = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32) * scale * tl.load(gain)
    tl.store(y + place * columns + column, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def broken(x, n, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), n)  # tl.arange refuses sizes that are no powers of two.


class Toy(Operator):
    """x `[n, C]` fp32 or fp16 and gain `[]` fp32 -> rows `[m, C]`, times scale and gain, their indices `[m] int64`, and m."""

    name = "Toy"
    attributes = (Attribute("threshold", "float", 0.0), Attribute("scale", "float"), Attribute("limits", "ints", (MOST_ROWS, BLOCK)))
    outputs = ("rows", "indices", "m")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        if len(inputs) != 2:
            raise self.refuse(f"it takes x and gain, not {len(inputs)} inputs")
        rows, columns = self.values["limits"]
        if len(inputs[0].shape) != 2 or any((size or 0) > most for size, most in zip(inputs[0].shape, (rows, columns), strict=True)):
            raise self.refuse(f"x is {list(inputs[0].shape)}; give at most {rows} rows of {columns}")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        if inputs[0] not in ("float32", "float16"):
            raise self.refuse(f"x is {inputs[0]}; give float32 or float16")
        return [inputs[0], "int64", "int64"]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        n, columns = inputs[0]
        m = DataDependent(2, n)
        return [[m, columns], [m], []]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        kind = "*" + TRITON_TYPES[inputs[0].dtype]
        scalars = (("n", "i32"), ("columns", "i32"), ("threshold", "fp32"))
        find = (("x", kind), ("places", "*i32"), ("indices", "*i64"), ("size", "*i64"), *scalars)
        scale = (("x", kind), ("places", "*i32"), ("gain", "*fp32"), ("y", kind), ("scale", "fp32"), ("columns", "i32"))
        return [
            KernelSpec(__name__, "find_rows", find, (("BLOCK", MOST_ROWS),), num_warps=1),
            KernelSpec(__name__, "scale_rows", scale, (("BLOCK", BLOCK),), num_warps=1),
        ]

    def workspace(self, inputs: Sequence[TensorSpec]) -> Workspace:
        workspace = Workspace()
        workspace.take("unused", 1, "int64")
        workspace.take("places", inputs[0].size(0), "int32")
        return workspace

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        n, columns = inputs[0].size(0), inputs[0].size(1)
        find, scale = self.kernels(inputs)
        places = self.workspace(inputs).parts["places"]
        x, gain = Buffer("input", 0), Buffer("input", 1)
        rows, indices, m = (Buffer("output", index) for index in range(3))
        return [
            Launch(find, (1, 1, 1), (x, places, indices, m, n, columns, self.values["threshold"])),
            Launch(scale, (n, 1, 1), (x, places, gain, rows, self.values["scale"], columns)),
        ]
