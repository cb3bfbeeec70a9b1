"""MsmRoute: what it takes and gives, and its launch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from trt_plugins.operator import TRITON_TYPES, Attribute, Buffer, DataDependent, DType, KernelSpec, Launch, Operator, TensorSpec

GRIDS = (14, 28, 56, 112)
MOST_DETECTIONS = 512
TRIED_AT_ONCE = 2048
"""Instances times lambdas that the program holds in registers."""
INPUTS = (("logits", (None, 4)), ("boxes", (None, 4)), ("override", (None,)), ("slots", (None,)), ("budget", ()))


class MsmRoute(Operator):
    """The grid of each instance (paper, Eq. 1 and 8, and the rule of `dynamask.msm.route` for a budget) and what each stage works on.

    Stage k, of grid `GRIDS[k]`, has the instances whose grid is k or larger, in their order; stage 0 has all n.

    Inputs:
        logits: `[n, 4]` float32 or float16, the MSM's.
        boxes: `[n, 4] float32`, xyxy in pixels of the canvas.
        override: `[n] int64`: -1 for the MSM, 4 for the size-based rule, or a grid 0..3.
        slots: `[n] int64`, the detection slot of each instance, 0..K - 1, none twice.
        budget: `[] float32`, mean GMAC an instance of those left to the MSM; none where 0 or less.

    Outputs, all int64:
        grids: `[K]`, of each slot: 0..3, and -1 where no instance has it.
        onward_28, onward_56, onward_112: `[n1]`, `[n2]`, `[n3]`, the places in the previous stage's set of those that go on.
        here_14 .. here_112: `[m0]` .. `[m3]`, the places in a stage's own set of those that end there.
        slots_14 .. slots_112: `[m0]` .. `[m3]`, their slots.
        n1, n2, n3, m0, m1, m2, m3: `[]`.

    Attributes are `canvas` (height and width in pixels), `detections` (K) and `costs` (GMAC an instance at each grid, ascending).
    """

    name = "MsmRoute"
    attributes = (Attribute("canvas", "ints"), Attribute("detections", "int"), Attribute("costs", "floats"))
    outputs = (
        "grids",
        *(f"onward_{grid}" for grid in GRIDS[1:]),
        *(f"here_{grid}" for grid in GRIDS),
        *(f"slots_{grid}" for grid in GRIDS),
        *("n1", "n2", "n3", "m0", "m1", "m2", "m3"),
    )

    def check_attributes(self) -> None:
        """Refuse values that make no sense together.

        Raises:
            InputError: a canvas without area, too many slots for one program, or costs that do not rise.
        """
        canvas, detections, costs = self.values["canvas"], self.values["detections"], self.values["costs"]
        if len(canvas) != 2 or min(canvas) < 1:
            raise self.refuse(f"canvas is {list(canvas)}; give height and width in pixels")
        if not 1 <= detections <= MOST_DETECTIONS:
            raise self.refuse(f"detections is {detections}; give 1 to {MOST_DETECTIONS}")
        if len(costs) != len(GRIDS) or any(cheap >= dear for cheap, dear in pairwise(costs)):
            raise self.refuse(f"costs is {list(costs)}; give {len(GRIDS)} that rise, one a grid")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs whose number, rank, sizes or types do not fit.

        Raises:
            InputError: names the node and the input.
        """
        if len(inputs) != len(INPUTS):
            raise self.refuse(f"it has {len(inputs)} inputs; give {', '.join(name for name, _ in INPUTS)}")
        dtypes = [("float32", "float16"), ("float32",), ("int64",), ("int64",), ("float32",)]
        for (name, shape), allowed, spec in zip(INPUTS, dtypes, inputs, strict=True):
            if len(spec.shape) != len(shape) or spec.shape[1:] != shape[1:] or spec.dtype not in allowed:
                wanted = ", ".join("n" if size is None else str(size) for size in shape)
                raise self.refuse(f"{name} is {spec.shape} {spec.dtype}; give [{wanted}] {' or '.join(allowed)}")
        counts = {spec.shape[0] for spec in inputs[:4]} - {None}
        if len(counts) > 1 or any(count > self.values["detections"] for count in counts if count is not None):
            raise self.refuse(f"its inputs are of {sorted(map(str, counts))} instances; give one n up to {self.values['detections']}")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """int64, all."""
        return ["int64"] * len(self.outputs)

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`[K]`, then the lists, whose sizes depend on the data, then these sizes."""
        slots = self.values["detections"]
        first = self.outputs.index("n1")
        onward = [DataDependent(first + k, slots) for k in range(3)]
        here = [DataDependent(first + 3 + k, slots) for k in range(4)]
        return [[slots], *([size] for size in (*onward, *here, *here)), *([] for _ in (*onward, *here))]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """One, whatever n."""
        logits = inputs[0].dtype
        inputs_signature = [("logits", "*" + TRITON_TYPES[logits]), ("boxes", "*fp32"), ("override", "*i64"), ("slots", "*i64")]
        signature = [*inputs_signature, ("budget", "*fp32"), *((name, "*i64") for name in self.outputs), ("n", "i32")]
        height, width = self.values["canvas"]
        block = max(1 << (self.values["detections"] - 1).bit_length(), 16)
        constants: list[tuple[str, int | float | bool]] = [
            ("DETECTIONS", self.values["detections"]),
            ("CANVAS_AREA", float(height * width)),
            *((f"COST{k}", cost) for k, cost in enumerate(self.values["costs"])),
            ("BLOCK_N", block),
            ("BLOCK_LAMBDAS", min(TRIED_AT_ONCE // block, 16)),
        ]
        return [KernelSpec("trt_plugins.msm_route.kernel", "msm_route", tuple(signature), tuple(constants), num_warps=8)]

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """One program, for no instance too: the slots and the sizes are written all the same."""
        buffers = [Buffer("input", index) for index in range(len(INPUTS))] + [Buffer("output", index) for index in range(len(self.outputs))]
        return [Launch(self.kernels(inputs)[0], (1, 1, 1), (*buffers, inputs[0].size(0)))]
