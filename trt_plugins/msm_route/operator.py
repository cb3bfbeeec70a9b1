"""The operator MsmRoute: inputs, outputs, kernels and launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.graph import CONTINUE, EXIT, GRIDS, SLOTS
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
    canvas_of,
    power_of_two,
    times,
)

KERNELS = "trt_plugins.msm_route.kernel"
MAX_SLOTS = 2048
"""Slots of a run: the widest program that is compiled."""
SIZES = tuple(f"{name}_count" for name in (*CONTINUE, *EXIT))
"""The outputs that hold the sizes of the lists."""
INPUTS = (
    ("logits", ("n", 4), ("float32", "float16")),
    ("boxes", ("n", 4), ("float32",)),
    ("override", ("n",), ("int64",)),
    ("slots", ("n",), ("int64",)),
    ("budget", (), ("float32",)),
    ("total_budget", (), ("float32",)),
    ("costs", (2, 4), ("float32",)),
    ("map", ("B", "any", "H", "W"), ("float32", "float16")),
)
"""Name, shape and types of each."""


class MsmRoute(Operator):
    """The grid of each instance (paper, Eq. 1 and 8; with a budget, the rule of `dynamask.msm.route`) and the instances of each stage.

    Stage k, of grid `GRIDS[k]`, computes the instances whose grid is k or larger, in their order; stage 0 computes all n.

    Inputs:
        logits: `[n, 4]` float32 or float16, the MSM's.
        boxes: `[n, 4] float32`, xyxy in pixels of the canvas.
        override: `[n] int64`: `runtime.graph.MSM`, `runtime.graph.SIZE_BASED`, or a grid 0..3.
        slots: `[n] int64`, the detection slot of each instance, 0..B K - 1, none twice; slot k of image b is b K + k.
        budget: `[] float32`, the largest mean cost of the instances, of all images, that are left to the MSM; 0 or less is no limit.
        total_budget: `[] float32`, the largest sum of their costs and the fixed cost of the largest grid among them; 0 or less is no limit.
        costs: `[2, 4] float32`, by grid an instance's own cost, ascending, and the fixed cost, in the unit of the budgets.
        map: `[B, any, H, W]` float32 or float16, which covers the canvas with `stride` pixels per cell; its values are not read.

    Outputs, all int64:
        grids: `[B K]`, of each slot: 0..3, and -1 in an empty slot.
        continue_28, continue_56, continue_112: the instances of the stage of this grid, as positions in the stage before.
        exit_14 .. exit_112: the instances that exit at the stage of this grid, as positions in this stage.
        slots_14 .. slots_112: the slots of the instances that exit.
        continue_28_count .. continue_112_count, exit_14_count .. exit_112_count: `[]`, the sizes of these lists.

    Attributes are `batch` (the largest number of images of a run, which decides the program's width), `stride` and `detections` (K).
    """

    name = "MsmRoute"
    attributes = (
        Attribute("batch", "int", 1),
        Attribute("stride", "int"),
        Attribute("detections", "int"),
    )
    outputs = ("grids", *CONTINUE, *EXIT, *SLOTS, *SIZES)

    def check_attributes(self) -> None:
        """Refuse attribute values that are out of range or do not fit each other.

        Raises:
            InputError: a number below 1, or too many slots for one program.
        """
        batch, detections = self.values["batch"], self.values["detections"]
        for name in ("batch", "stride", "detections"):
            if self.values[name] < 1:
                raise self.refuse(f"{name} is {self.values[name]}; give 1 or more")
        if batch * detections > MAX_SLOTS:
            raise self.refuse(
                f"batch is {batch} and detections is {detections}, {batch * detections} slots in a run; "
                f"give at most {max(MAX_SLOTS // detections, 1)} images of at most {MAX_SLOTS} slots"
            )

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
        continuing, exiting = (
            [[DataDependent(self.outputs.index(f"{name}_count"), slots)] for name in names] for names in (CONTINUE, EXIT)
        )
        return [[slots], *continuing, *exiting, *exiting, *([] for _ in SIZES)]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """Two, whatever n, the canvas, and the number of images up to `batch`."""
        return [self._choose_grids(inputs), self._list_stage()]

    def workspace(self, inputs: Sequence[TensorSpec]) -> Workspace:
        """The grid of each instance."""
        workspace = Workspace()
        workspace.take("grids", self._slots, "int32")
        return workspace

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """The grids, then the lists of each stage. Without instances too, because the outputs still need their sizes and empty slots."""
        n = inputs[0].size(0)
        slots = inputs[-1].size(0) * self.values["detections"]
        height, width = canvas_of(inputs[-1], self.values["stride"])
        given = [Buffer("input", index) for index in range(len(INPUTS) - 1)]
        written = {name: Buffer("output", index) for index, name in enumerate(self.outputs)}
        grids = self.workspace(inputs).parts["grids"]
        arguments = (*given, written["grids"], grids, n, slots, float(height * width))
        launches = [Launch(self._choose_grids(inputs), (1, 1, 1), arguments)]
        for stage, grid in enumerate(GRIDS):
            # Nothing continues to the first stage: the kernel does not write these two there.
            continuing = f"continue_{GRIDS[max(stage, 1)]}"
            names = (continuing, f"exit_{grid}", f"slots_{grid}", f"{continuing}_count", f"exit_{grid}_count")
            lists = [written[name] for name in names]
            launches.append(Launch(self._list_stage(), (1, 1, 1), (grids, given[3], *lists, n, stage)))
        return launches

    def _choose_grids(self, inputs: Sequence[TensorSpec]) -> KernelSpec:
        signature = (
            ("logits", "*" + TRITON_TYPES[inputs[0].dtype]),
            ("boxes", "*fp32"),
            ("override", "*i64"),
            ("slots", "*i64"),
            ("budget", "*fp32"),
            ("total_budget", "*fp32"),
            ("costs", "*fp32"),
            ("grids_of_slots", "*i64"),
            ("grids_of_instances", "*i32"),
            ("n", "i32"),
            ("slot_count", "i32"),
            ("canvas_area", "fp32"),
        )
        block, lambdas, warps = _program(self._slots)
        constants = (("BLOCK_N", block), ("BLOCK_LAMBDAS", lambdas))
        return KernelSpec(KERNELS, "choose_grids", signature, constants, num_warps=warps)

    def _list_stage(self) -> KernelSpec:
        lists = ("slots", "continuing", "exiting", "exit_slots", "continuing_count", "exiting_count")
        signature = (("grids_of_instances", "*i32"), *((name, "*i64") for name in lists), ("n", "i32"), ("stage", "i32"))
        block, _, _ = _program(self._slots)
        return KernelSpec(KERNELS, "list_stage", signature, (("BLOCK_N", block),))

    @property
    def _slots(self) -> int:
        """The largest number of slots of a run."""
        return int(self.values["batch"] * self.values["detections"])


def _program(slots: int) -> tuple[int, int, int]:
    """Instances of the program, lambdas that it tries at a time, and its warps, for this many slots: as many as stay in registers."""
    block = max(power_of_two(slots), 16)
    if block <= 512:
        return block, min(1024 // block, 8), 8
    return block, 2 if block == 1024 else 1, 16
