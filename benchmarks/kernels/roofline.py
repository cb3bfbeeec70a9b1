"""The lower bound of a kernel's time, from its work and the GPU's measured peak rates (Williams et al., CACM 2009)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

import torch

from benchmarks.kernels.case import Work, bound, type_name
from benchmarks.kernels.timing import Contender, call_times


class Ceilings(NamedTuple):
    """The GPU's measured peak rates."""

    bandwidth: float
    """Bytes per second, read and written, of a large copy."""
    rates: Mapping[str, float]
    """Type -> operations per second of a large matrix product, in float32 without TF32."""


class Floor(NamedTuple):
    """The lower bound of a kernel's time."""

    ms: float
    limit: str
    """`memory` or `arithmetic`."""


def roofline(work: Work, dtype: str, ceilings: Ceilings) -> Floor:
    """The longer of two times: moving the bytes, and doing the operations."""
    memory, arithmetic = work.bytes / ceilings.bandwidth, work.operations / ceilings.rates[dtype]
    return Floor(1000 * max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic")


def measure_ceilings(runs: int) -> Ceilings:
    """A copy of 512 MiB, and cuBLAS's products of square matrices, of 8192 in float16 and of 4096 in float32 without TF32."""
    source = torch.randn(1 << 27, device="cuda")
    sides = {torch.float16: 8192, torch.float32: 4096}
    contenders = {"copy": Contender([bound(torch.empty_like(source).copy_, source)])}
    for dtype, side in sides.items():
        a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
        contenders[type_name(dtype)] = Contender([bound(torch.mm, a, b)])
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        times, _ = call_times(contenders, runs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    seconds = {name: statistics.median(values) / 1000 for name, values in times.items()}
    return Ceilings(2 * source.nbytes / seconds["copy"], {type_name(d): 2 * side**3 / seconds[type_name(d)] for d, side in sides.items()})
