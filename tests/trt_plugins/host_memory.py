"""Runs the kernel of PasteMasks in Triton's interpreter on addresses of the host's memory."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from trt_plugins.on_torch import start
from trt_plugins.operator import Buffer, Launch
from trt_plugins.paste_masks.operator import paste_kernel


def tensor_at(address: int, shape: tuple[int, ...], dtype: type) -> torch.Tensor:
    """Memory of the host as a tensor, without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return torch.from_numpy(np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape))


def paste(grid: int, programs: int, logits: int, boxes: int, windows: int, owners: int, bits: int, instances: int, words: int) -> None:
    """One launch of `paste_kernel(grid)`, with its arguments in order; the first five are addresses."""
    inputs = [
        tensor_at(logits, (instances, grid, grid), np.float32),
        tensor_at(boxes, (instances, 4), np.float32),
        tensor_at(windows, (instances, 6), np.int32),
        tensor_at(owners, (programs,), np.int32),
    ]
    pointers = tuple(Buffer("input", index) for index in range(4))
    launch = Launch(paste_kernel(grid), (programs, 1, 1), (*pointers, Buffer("output", 0), instances, words))
    start(launch, inputs, [tensor_at(bits, (words,), np.int32)], torch.empty(0, dtype=torch.uint8))
