"""MsmRoute: what it takes and gives, and its launch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from runtime.graph import GRIDS
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
    canvas_of,
    times,
)

MOST_SLOTS = 2048
"""Of a run: instances that one program is wide enough for."""
INPUTS = (
    ("logits", ("n", 4), ("float32", "float16")),
    ("boxes", ("n", 4), ("float32",)),
    ("override", ("n",), ("int64",)),
    ("slots", ("n",), ("int64",)),
    ("budget", (), ("float32",)),
    ("map", ("B", "any", "H", "W"), ("float32", "float16")),
)
"""Name, shape and types of each."""


class MsmRoute(Operator):
    """The grid of each instance (paper, Eq. 1 and 8, and the rule of `dynamask.msm.route` for a budget) and what each stage works on.

    Stage k, of grid `GRIDS[k]`, has the instances whose grid is k or larger, in their order; stage 0 has all n.

    Inputs:
        logits: `[n, 4]` float32 or float16, the MSM's.
        boxes: `[n, 4] float32`, xyxy in pixels of the canvas.
        override: `[n] int64`: -1 for the MSM, 4 for the size-based rule, or a grid 0..3.
        slots: `[n] int64`, the detection slot of each instance, 0..B K - 1, none twice; slot k of image b is b K + k.
        budget: `[] float32`, mean GMAC an instance, of those of all images that are left to the MSM; none where 0 or less.
        map: `[B, any, H, W]` float32 or float16, which covers the canvas with `stride` pixels a cell; it is not read.

    Outputs, all int64:
        grids: `[B K]`, of each slot: 0..3, and -1 where no instance has it.
        onward_28, onward_56, onward_112: `[n1]`, `[n2]`, `[n3]`, the places in the previous stage's set of those that go on.
        here_14 .. here_112: `[m0]` .. `[m3]`, the places in a stage's own set of those that end there.
        slots_14 .. slots_112: `[m0]` .. `[m3]`, their slots.
        n1, n2, n3, m0, m1, m2, m3: `[]`.

    Attributes are `batch` (the most images of a run, which decides how wide the program is), `stride`, `detections` (K) and `costs` (GMAC
    an instance at each grid, ascending).
    """

    name = "MsmRoute"
    attributes = (
        Attribute("batch", "int", 1),
        Attribute("stride", "int"),
        Attribute("detections", "int"),
        Attribute("costs", "floats"),
    )
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
            InputError: a number below 1, too many slots for one program, or costs that do not rise.
        """
        batch, detections, costs = self.values["batch"], self.values["detections"], self.values["costs"]
        for name in ("batch", "stride", "detections"):
            if self.values[name] < 1:
                raise self.refuse(f"{name} is {self.values[name]}; give 1 or more")
        if batch * detections > MOST_SLOTS:
            raise self.refuse(
                f"batch is {batch} and detections is {detections}, {batch * detections} slots in a run; "
                f"give at most {max(MOST_SLOTS // detections, 1)} images of at most {MOST_SLOTS} slots"
            )
        if len(costs) != len(GRIDS) or any(cheap >= dear for cheap, dear in pairwise(costs)):
            raise self.refuse(f"costs is {list(costs)}; give {len(GRIDS)} that rise, one a grid")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs whose number, rank, sizes or types do not fit.

        Raises:
            InputError: names the node and the input.
        """
        if len(inputs) != len(INPUTS):
            raise self.refuse(f"it has {len(inputs)} inputs; give {', '.join(name for name, *_ in INPUTS)}")
        for (name, shape, dtypes), spec in zip(INPUTS, inputs, strict=True):
            known = [size if isinstance(wanted, str) else wanted for size, wanted in zip(spec.shape, shape, strict=False)]
            if len(spec.shape) != len(shape) or list(spec.shape) != known or spec.dtype not in dtypes:
                raise self.refuse(f"{name} is {spec.shape} {spec.dtype}; give [{', '.join(map(str, shape))}] {' or '.join(dtypes)}")
        batch, detections = inputs[-1].shape[0], self.values["detections"]
        if batch is not None and batch > self.values["batch"]:
            raise self.refuse(f"map is of {batch} images; give at most batch, {self.values['batch']}")
        counts = {spec.shape[0] for spec in inputs[:4]} - {None}
        most = detections * (batch or self.values["batch"])
        if len(counts) > 1 or any(count > most for count in counts if count is not None):
            raise self.refuse(f"its inputs are of {sorted(map(str, counts))} instances; give one n up to {most}")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """int64, all."""
        return ["int64"] * len(self.outputs)

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`[B K]`, then the lists, whose sizes depend on the data, then these sizes."""
        slots = times(inputs[-1][0], self.values["detections"])
        first = self.outputs.index("n1")
        onward = [DataDependent(first + k, slots) for k in range(3)]
        here = [DataDependent(first + 3 + k, slots) for k in range(4)]
        return [[slots], *([size] for size in (*onward, *here, *here)), *([] for _ in (*onward, *here))]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """One, whatever n, the canvas, and the number of images up to `batch`."""
        logits = inputs[0].dtype
        inputs_signature = [("logits", "*" + TRITON_TYPES[logits]), ("boxes", "*fp32"), ("override", "*i64"), ("slots", "*i64")]
        signature = [*inputs_signature, ("budget", "*fp32"), *((name, "*i64") for name in self.outputs)]
        signature += [("n", "i32"), ("slot_count", "i32"), ("canvas_area", "fp32")]
        block, lambdas, warps = _program(self.values["batch"] * self.values["detections"])
        constants: list[tuple[str, int | float | bool]] = [
            *((f"COST{k}", cost) for k, cost in enumerate(self.values["costs"])),
            ("BLOCK_N", block),
            ("BLOCK_LAMBDAS", lambdas),
        ]
        return [KernelSpec("trt_plugins.msm_route.kernel", "msm_route", tuple(signature), tuple(constants), num_warps=warps)]

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """One program, for no instance too: the slots and the sizes are written all the same."""
        read = [Buffer("input", index) for index in range(len(INPUTS) - 1)]
        written = [Buffer("output", index) for index in range(len(self.outputs))]
        height, width = canvas_of(inputs[-1], self.values["stride"])
        slots = inputs[-1].size(0) * self.values["detections"]
        return [Launch(self.kernels(inputs)[0], (1, 1, 1), (*read, *written, inputs[0].size(0), slots, float(height * width)))]


def _program(slots: int) -> tuple[int, int, int]:
    """Instances of the program, lambdas that it tries at a time, and warps, for so many slots: as much as stays in registers."""
    block = max(1 << (slots - 1).bit_length(), 16)
    if block <= 512:
        return block, min(2048 // block, 16), 8
    return block, 4 if block == 1024 else 1, 16
