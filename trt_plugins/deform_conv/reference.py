"""DeformConv in PyTorch: torchvision's operator, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from trt_plugins.deform_conv.operator import pack_weight


def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    relu: bool = False,
) -> Tensor:
    """x `[n, C, H, W]`, weight `[O, C, kh, kw]`, offset `[n, 2 G kh kw, Ho, Wo]` pixels, bias `[O]`, mask `[n, G kh kw, Ho, Wo]`
    -> `[n, O, Ho, Wo]` of x's type, computed in float32; the number G of offset groups is read from the offset."""
    modulation = None if mask is None else mask.float()
    stride, padding, dilation = (strides[0], strides[1]), (pads[0], pads[1]), (dilations[0], dilations[1])
    y = deform_conv2d(x.float(), offset.float(), weight.float(), bias.float(), stride, padding, dilation, modulation)
    return (torch.relu(y) if relu else y).to(x.dtype)


def packed_inputs(inputs: Sequence[Tensor], groups: int = 1) -> list[Tensor]:
    """The inputs of `DeformConv` from those of `deform_conv`, of which only the weight differs."""
    x, weight, *rest = inputs
    return [x, torch.from_numpy(pack_weight(weight.detach().cpu().numpy(), groups)).to(weight.device), *rest]


def unpacked_weight(packed: Tensor, channels: int, outputs: int, kernel_shape: Sequence[int]) -> Tensor:
    """The weight `[O, C, kh, kw]` that `pack_weight` packed."""
    taps = packed[:, :, : channels // len(packed), :outputs]
    return taps.permute(3, 0, 2, 1).reshape(outputs, channels, *kernel_shape)
