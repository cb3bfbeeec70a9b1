"""A case of the benchmark: an operator's kernel, and other implementations of the same computation, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels import sizes
from benchmarks.kernels.timing import Contender
from trt_plugins.on_torch import spec_of, start
from trt_plugins.operator import Operator, TensorSpec

KERNEL = "kernel"
"""The contender that a case's others are compared with."""

MAX_SETS = 16
"""Largest number of sets of inputs that a contender's calls cycle through."""


class Work(NamedTuple):
    """The least work of an operator, independent of its implementation."""

    bytes: int
    """Every input read once, every output written once."""
    operations: int
    """Two for each product of the matrices; sampling is not counted."""


class Case(NamedTuple):
    """Contenders that compute the same."""

    name: str
    dtype: torch.dtype
    contenders: Mapping[str, Contender]
    """`KERNEL` first."""
    work: Work | None = None
    error: float | None = None
    """The `relative_error` of the kernel against PyTorch in float32."""


def launch(operator: Operator, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The operator's outputs, data-dependent ones at their largest size: nothing is filled beforehand, and nothing waits for the GPU."""
    specs = [spec_of(tensor) for tensor in inputs]
    output_specs, device = operator.max_output_specs(specs), inputs[0].device
    outputs = [torch.empty(_shape(spec), dtype=getattr(torch, spec.dtype), device=device) for spec in output_specs]
    workspace = torch.empty(operator.workspace(specs).bytes, dtype=torch.uint8, device=device)
    for each in operator.launches(specs, output_specs):
        start(each, inputs, outputs, workspace)
    return outputs


def against_calls(
    operator: Operator, ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]], peer: Callable[[Sequence[Tensor]], object]
) -> dict[str, Contender]:
    """The contenders for a peer that cannot be captured: the operator is also called from Python, for comparison."""
    calls = [bound(launch, operator, each) for each in ours]
    return {
        KERNEL: Contender(calls),
        "kernel, called": Contender(calls, graph=False),
        "torchvision": Contender([bound(peer, each) for each in theirs], graph=False),
    }


def input_sets(size: int, cache: int) -> int:
    """The number of sets of inputs and outputs, `size` bytes each, that exceed twice a cache of `cache` bytes; at most `MAX_SETS`."""
    return min(max(-(-2 * cache // size), 1), MAX_SETS)


def input_sets_beyond_cache(draw: Callable[[], list[Tensor]], first: list[Tensor], size: int) -> list[list[Tensor]]:
    """The first set of inputs, and more sets, until they exceed the GPU's cache: `size` bytes each, with their outputs.

    Inputs that are small stay in the cache, as they do in an engine.
    """
    cache = torch.cuda.get_device_properties(first[0].device).L2_cache_size
    return [first, *(draw() for _ in range(input_sets(size, cache) - 1))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value, in float32."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def finest_map() -> Tensor:
    """One channel of P2: operators read the canvas from its shape."""
    return torch.empty(1, 1, sizes.CANVAS[0] // sizes.STRIDES[0], sizes.CANVAS[1] // sizes.STRIDES[0], device="cuda")


def bound(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    """A call of the function on these arguments."""
    return lambda: function(*arguments)


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed values on the GPU."""
    return torch.randn(size, device="cuda", dtype=dtype)


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """The size of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def type_name(dtype: torch.dtype) -> str:
    """`float16`, `float32`."""
    return str(dtype).removeprefix("torch.")


def _shape(spec: TensorSpec) -> list[int]:
    return [spec.size(axis) for axis in range(len(spec.shape))]
