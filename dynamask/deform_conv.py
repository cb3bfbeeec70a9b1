"""3 x 3 deformable convolution, version 1 (Dai et al., ICCV 2017): one offset group, no modulation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

TAPS = 9
AT_ONCE = 16
"""Instances sampled at a time without gradients: all instances of a crowded image at 112 x 112 would take gigabytes for `r50`."""


class DeformConv2d(nn.Module):
    """Deformable convolution; its offsets are an input: `(x [N, C, H, W], offset [N, 18, H, W]) -> [N, out, H, W]`.

    Stride 1, padding 1. Offsets are in pixels, `(dy, dx)` for each of the nine taps in row order, torchvision's layout.
    torchvision's operator does the work, except on the CPU: there `sampled_deform_conv2d` computes the same function, about ten
    times faster, and its gradient (docs/results/deform-conv-cpu.md). A graph is exported with torchvision's, which ONNX has.

    `by_torchvision` selects torchvision's operator on the CPU too, to compare the two.
    """

    by_torchvision = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        self.weight = convolution.weight
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        if x.device.type == "cpu" and not (self.by_torchvision or torch.compiler.is_exporting()):
            if torch.is_grad_enabled() or len(x) <= AT_ONCE:
                return sampled_deform_conv2d(x, offset, self.weight, self.bias)
            parts = zip(x.split(AT_ONCE), offset.split(AT_ONCE), strict=True)
            return torch.cat([sampled_deform_conv2d(part, shifts, self.weight, self.bias) for part, shifts in parts])
        return deform_conv2d(x, offset, self.weight, self.bias, padding=1)


def sampled_deform_conv2d(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torchvision.ops.deform_conv2d(x, offset, weight, bias, padding=1)` as one bilinear sampling and one product.

    Shapes: x `[N, C, H, W]`, offset `[N, 18, H, W]` pixels, weight `[out, C, 3, 3]`, bias `[out]` -> `[N, out, H, W]`.
    """
    n, channels, height, width = x.shape
    offset = offset.view(n, TAPS, 2, height, width)
    tap = torch.arange(TAPS, device=x.device)
    rows = torch.arange(height, device=x.device)[None, :, None] + (tap // 3 - 1)[:, None, None] + offset[:, :, 0]
    columns = torch.arange(width, device=x.device)[None, None, :] + (tap % 3 - 1)[:, None, None] + offset[:, :, 1]
    positions = torch.stack([columns * (2 / (width - 1)) - 1, rows * (2 / (height - 1)) - 1], dim=-1)
    samples = F.grid_sample(x, positions.view(n, TAPS * height, width, 2), padding_mode="zeros", align_corners=True)
    # A batched product: PyTorch's 1 x 1 convolution is six times slower on such tall inputs.
    samples = samples.view(n, channels * TAPS, height * width)
    product = torch.baddbmm(bias[None, :, None], weight.flatten(1).expand(n, -1, -1), samples)
    return product.view(n, weight.shape[0], height, width)
