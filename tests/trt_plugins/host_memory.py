"""Runs launches of compiled kernels in Triton's interpreter, on addresses of the host's memory."""

from __future__ import annotations

import bisect
import ctypes
import importlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from trt_plugins.operator import KernelSpec

TYPES = {"*fp32": torch.float32, "*fp16": torch.float16, "*i32": torch.int32, "*i64": torch.int64}


def interpret(spec: KernelSpec, grid: tuple[int, int, int], arguments: Sequence[int | float], blocks: Mapping[int, int]) -> None:
    """Run a kernel, with the arguments of its signature; addresses lie in `blocks`, address -> bytes."""
    starts = sorted(blocks)
    values: dict[str, torch.Tensor | int | float] = {}
    for (name, kind), value in zip(spec.signature, arguments, strict=True):
        if not kind.startswith("*"):
            values[name] = value
            continue
        dtype, address = TYPES[kind], int(value)
        start = starts[bisect.bisect_right(starts, address) - 1]
        room = start + blocks[start] - address
        assert room > 0 and address % 16 == 0, f"{spec.function}: {name} is at {address:#x}, which is no memory or not aligned"
        memory = torch.frombuffer((ctypes.c_uint8 * room).from_address(address), dtype=torch.uint8)
        values[name] = memory[: room // dtype.itemsize * dtype.itemsize].view(dtype)
    function = getattr(importlib.import_module(spec.module), spec.function)
    function[grid](**values, **dict(spec.constants), num_warps=spec.num_warps, num_stages=spec.num_stages)


class Guarded:
    """Blocks of memory, aligned to 256 bytes and filled with garbage, between bands that nothing may write."""

    BAND, FILL = 1024, 0xA5

    def __init__(self) -> None:
        self._raw: dict[int, tuple[ctypes.Array[ctypes.c_uint8], int]] = {}

    @property
    def sizes(self) -> dict[int, int]:
        """Address -> bytes."""
        return {address: size for address, (_, size) in self._raw.items()}

    def take(self, size: int) -> int:
        """The address of a new block."""
        raw = (ctypes.c_uint8 * (size + 2 * self.BAND + 256))()
        ctypes.memset(raw, self.FILL, len(raw))
        address = -(-(ctypes.addressof(raw) + self.BAND) // 256) * 256
        self._raw[address] = (raw, size)
        return address

    def give(self, address: int) -> None:
        """Free a block, and check its bands."""
        self.check([address])
        del self._raw[address]

    def check(self, addresses: Iterable[int] | None = None) -> None:
        """Check that the bands around blocks, all by default, are as they were."""
        for address in self._raw if addresses is None else addresses:
            raw, size = self._raw[address]
            before = address - ctypes.addressof(raw)
            content = bytes(raw)
            assert {*content[:before], *content[before + size :]} == {self.FILL}, f"written outside of the {size} bytes at {address:#x}"
