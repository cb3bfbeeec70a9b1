"""DeformConv beside torchvision's `deform_conv2d`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from benchmarks.kernels.case import (
    KERNEL,
    Case,
    Work,
    bound,
    input_sets_beyond_cache,
    launch,
    random,
    relative_error,
    total_bytes,
    type_name,
)
from benchmarks.kernels.timing import Contender
from trt_plugins.deform_conv import DeformConv
from trt_plugins.deform_conv.reference import packed_inputs

PLAIN = DeformConv(kernel_shape=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1), dilations=(1, 1), offset_group=1)


def case(n: int, channels: int, grid: int, dtype: torch.dtype) -> Case:
    """`n` instances of a stage."""

    def draw() -> list[Tensor]:
        x, offset = (random(n, size, grid, grid, dtype=dtype) for size in (channels, 18))
        weight = random(channels, channels, 3, 3, dtype=dtype) / math.sqrt(9 * channels)
        return [x, weight, offset, random(channels, dtype=dtype)]

    inputs = draw()
    y = launch(PLAIN, packed_inputs(inputs))[0]
    work = deform_conv_work(inputs, y)
    error = relative_error(y, _torchvision(*(tensor.float() for tensor in inputs)))
    sets = input_sets_beyond_cache(draw, inputs, work.bytes)
    peer_dtype = _peer_dtype(inputs, dtype)
    peers = sets if peer_dtype == dtype else [[tensor.to(peer_dtype) for tensor in each] for each in sets]
    contenders = {
        KERNEL: Contender([bound(launch, PLAIN, packed_inputs(each)) for each in sets]),
        f"torchvision, {type_name(peer_dtype)}": Contender([bound(_torchvision, *each) for each in peers]),
    }
    return Case(f"DeformConv {channels} @ {grid}", dtype, contenders, work, error)


def deform_conv_work(inputs: Sequence[Tensor], outputs: Tensor) -> Work:
    """A DeformConv's work from its inputs, x, weight `[O, C, kh, kw]`, ..., and its output `[n, O, Ho, Wo]`."""
    _, channels, *kernel = inputs[1].shape
    return Work(total_bytes([*inputs, outputs]), 2 * outputs.numel() * channels * math.prod(kernel))


def _torchvision(x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
    return deform_conv2d(x, offset, weight, bias, padding=1)


def _peer_dtype(inputs: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """float32 where this torchvision has no kernel for the type."""
    try:
        _torchvision(*inputs)
    except RuntimeError:
        return torch.float32
    return dtype
