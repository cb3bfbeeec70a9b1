"""Runs an operator on PyTorch tensors, with the launches that an engine makes: in Triton on a GPU, in its interpreter on the CPU.

On the CPU, `TRITON_INTERPRET=1` must be in the environment before Triton is first imported. Tests and benchmarks use this module; engines
do not.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.errors import DynaMaskError
from trt_plugins.operator import TRITON_TYPES, Buffer, DataDependent, DType, Launch, Operator, TensorSpec

GARBAGE = 0xA5
"""Outputs and workspaces are filled with this byte first, so that tests notice a kernel that reads memory it has not written."""


def run(operator: Operator, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The operator's outputs, data-dependent ones cut to their size, on the device of its inputs.

    Raises:
        InputError: the inputs do not fit the operator.
        DynaMaskError: the tensors are on the CPU, and Triton's interpreter is off.
    """
    device = inputs[0].device
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise DynaMaskError("Triton's kernels run on CPU tensors only with TRITON_INTERPRET=1 in the environment; set it and start again.")
    inputs = [tensor.contiguous() for tensor in inputs]
    specs = [spec_of(tensor) for tensor in inputs]
    operator.check_inputs(specs)
    shapes = operator.output_shapes([list(spec.shape) for spec in specs])
    output_specs = operator.max_output_specs(specs)
    outputs = [_garbage(spec.items, spec.dtype, device).view([spec.size(axis) for axis in range(len(spec.shape))]) for spec in output_specs]
    workspace = _garbage(operator.workspace(specs).bytes, "bool", device).view(torch.uint8)
    allowed = {spec.key for spec in operator.kernels(specs)}
    for launch in operator.launches(specs, output_specs):
        assert launch.kernel.key in allowed, f"{launch.kernel} is not among {operator.name}.kernels()"
        start(launch, inputs, outputs, workspace)
    return [_cut(output, shape, outputs) for output, shape in zip(outputs, shapes, strict=True)]


def spec_of(tensor: Tensor) -> TensorSpec:
    """A tensor's shape and type."""
    dtype: DType = str(tensor.dtype).removeprefix("torch.")  # type: ignore[assignment]
    return TensorSpec(tuple(tensor.shape), dtype)


def start(launch: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: Tensor) -> None:
    """Start one launch on an operator's inputs, the memory of its outputs, and its workspace `[bytes] uint8`."""
    if 0 in launch.grid:
        return
    spec = launch.kernel
    function = getattr(importlib.import_module(spec.module), spec.function)
    assert len(launch.arguments) == len(spec.signature), f"{spec.function} takes {len(spec.signature)} arguments"
    arguments: dict[str, Tensor | int | float] = {}
    for (name, kind), argument in zip(spec.signature, launch.arguments, strict=True):
        if isinstance(argument, Buffer):
            value = _tensor(argument, inputs, outputs, workspace)
            assert kind == "*" + TRITON_TYPES[spec_of(value).dtype], f"{spec.function}: {name} is {kind}, got {value.dtype}"
            arguments[name] = value
        else:
            arguments[name] = argument
    function[launch.grid](**arguments, **dict(spec.constants), num_warps=spec.num_warps, num_stages=spec.num_stages)


def _tensor(buffer: Buffer, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: Tensor) -> Tensor:
    if buffer.kind == "workspace":
        dtype = getattr(torch, buffer.dtype)
        rest = workspace[buffer.offset :]
        return rest[: len(rest) // dtype.itemsize * dtype.itemsize].view(dtype)
    return (inputs if buffer.kind == "input" else outputs)[buffer.index]


def _garbage(items: int, dtype: DType, device: torch.device) -> Tensor:
    kind = getattr(torch, dtype)
    return torch.full((items * kind.itemsize,), GARBAGE, dtype=torch.uint8, device=device).view(kind)


def _cut(output: Tensor, shape: Sequence[int | DataDependent], outputs: Sequence[Tensor]) -> Tensor:
    for axis, size in enumerate(shape):
        if isinstance(size, DataDependent):
            output = output.narrow(axis, 0, int(outputs[size.size_output]))
    return output
