"""The operator DeformConv: inputs, outputs, kernels, launches and tiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from runtime.errors import InputError
from trt_plugins.operator import TRITON_TYPES, Attribute, Buffer, DType, KernelSpec, Launch, Operator, TensorSpec, power_of_two

INPUTS = ("x", "weight", "offset", "bias", "mask")
MODULE = "trt_plugins.deform_conv.kernel"
BLOCK_C = 16
"""Channels sampled at a time: the minimum of a tensor core. More channels need more registers, and leave fewer warps to hide loads."""


@dataclass(frozen=True)
class Tiling:
    """How the product `[pixels, channels] x [channels, outputs]` of an instance is divided into programs."""

    block_p: int
    block_o: int
    num_warps: int


def tiling(outputs: int, dtype: DType) -> Tiling:
    """The tile for a number of outputs.

    A program computes all outputs if it can, because each further block of outputs samples the input again. A thread holds at most 64
    sums, which leaves registers for the samples being loaded. That is 256 outputs, or 128 in float32, because a larger float32 tile does
    not fit 48 KB of shared memory when it is stored. With few outputs a program computes more pixels, which share the weights.
    """
    block_o = min(max(power_of_two(outputs), 8), 256 if dtype == "float16" else 128)
    return Tiling(block_p=128 if block_o <= 64 else 64, block_o=block_o, num_warps=8 if block_o > 128 else 4)


def pack_weight(weight: npt.NDArray[Any], groups: int) -> npt.NDArray[Any]:
    """Weight `[O, C, kh, kw]` to the operator's `[groups, kh * kw, padded C / groups, padded O]`, of the same type, zeros in the padding.

    In a standard weight, consecutive channels of a tap are kh * kw items apart; packed, the kernel loads its tiles 16 bytes at a time.

    Raises:
        InputError: C is no multiple of `groups`.
    """
    outputs, channels, height, width = weight.shape
    if channels % groups:
        raise InputError(f"a weight of {channels} channels has no {groups} groups; give a divisor of the channels.")
    padded_channels, padded_outputs = _padded(channels // groups, outputs, cast(DType, weight.dtype.name))
    packed = np.zeros((groups, height * width, padded_channels, padded_outputs), weight.dtype)
    taps = weight.reshape(outputs, groups, channels // groups, height * width)
    packed[:, :, : channels // groups, :outputs] = taps.transpose(1, 3, 2, 0)
    return packed


def _padded(group_channels: int, outputs: int, dtype: DType) -> tuple[int, int]:
    """A group's channels and all outputs, rounded up to whole blocks."""
    block_o = tiling(outputs, dtype).block_o
    return -(-group_channels // BLOCK_C) * BLOCK_C, -(-outputs // block_o) * block_o


class DeformConv(Operator):
    """Deformable convolution, version 1 (Dai et al., ICCV 2017) or 2, with a mask (Zhu et al., CVPR 2019), and an optional ReLU.

    Inputs, all float32 or all float16: x `[n, C, H, W]`, H and W at least 2; the result of `pack_weight` for the weight `[O, C, kh, kw]`;
    offset `[n, 2 * G * kh * kw, Ho, Wo]` in pixels of x, (dy, dx) for each tap in row order, as torchvision's; bias `[O]`; for version 2
    mask `[n, G * kh * kw, Ho, Wo]`. Output: y `[n, O, Ho, Wo]` of the same type. Only n, which may be 0, may vary from run to run.

    A sample between pixels is interpolated bilinearly, with zeros beyond the border (torchvision.ops.deform_conv2d). Positions, blending
    and sums are float32; in float16, samples are rounded before they are multiplied. x must be finite: the border's pixels are
    multiplied by 0 for samples beyond it.
    """

    name = "DeformConv"
    attributes = (
        Attribute("kernel_shape", "ints"),
        Attribute("strides", "ints"),
        Attribute("pads", "ints"),
        Attribute("dilations", "ints"),
        Attribute("offset_group", "int"),
        Attribute("relu", "int", 0),
    )
    outputs = ("y",)

    def check_attributes(self) -> None:
        """Refuse attributes that do not fit a 2-D convolution.

        Raises:
            InputError: names the node and the attribute.
        """
        for name in ("kernel_shape", "strides", "dilations"):
            if len(self.values[name]) != 2 or min(self.values[name]) < 1:
                raise self.refuse(f"{name} is {self.values[name]}; give two sizes of at least 1")
        pads = self.values["pads"]
        if len(pads) != 4 or min(pads) < 0 or pads[:2] != pads[2:]:
            raise self.refuse(f"pads is {pads}; give (y, x, y, x), the same at both ends and none below 0")
        if self.values["offset_group"] < 1:
            raise self.refuse(f"offset_group is {self.values['offset_group']}; give at least 1")
        if self.values["relu"] not in (0, 1):
            raise self.refuse(f"relu is {self.values['relu']}; give 0 or 1")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs that do not fit the attributes or each other.

        Raises:
            InputError: names the node and the input.
        """
        self._check_kinds(inputs)
        x, weight, _, bias = inputs[:4]
        n, channels, height, width = x.shape
        outputs = bias.size(0)
        groups = self.values["offset_group"]
        if min(x.size(2), x.size(3)) < 2:
            raise self.refuse(f"x is {_text(x.shape)}; give at least 2 rows and 2 columns")
        if x.size(1) % groups:
            raise self.refuse(f"x has {channels} channels; give a multiple of offset_group {groups}")
        out_height, out_width = self._out_size(x)
        if min(out_height, out_width) < 1:
            kernel = _text(self.values["kernel_shape"])
            raise self.refuse(f"kernel_shape is {kernel}; the taps do not fit into x {_text(x.shape)} with its pads")
        taps = groups * self._taps
        expected = {
            "x": (n, channels, height, width),
            "weight": (groups, self._taps, *_padded(x.size(1) // groups, outputs, x.dtype)),
            "offset": (n, 2 * taps, out_height, out_width),
            "bias": (outputs,),
            "mask": (n, taps, out_height, out_width),
        }
        for (name, shape), spec in zip(expected.items(), inputs, strict=False):
            if any(None not in pair and pair[0] != pair[1] for pair in zip(spec.shape, shape, strict=True)):
                raise self.refuse(f"{name} is {_text(spec.shape)}; give {_text(shape)}")
        per_instance = {name: expected[name][1:] for name in ("x", "offset")} | {
            "weight": weight.shape,
            "y": (outputs, out_height, out_width),
        }
        for name, shape in per_instance.items():
            if TensorSpec(shape, x.dtype).items >= 2**31:
                raise self.refuse(f"{name} is {_text(shape)} for an instance; give fewer than 2^31 items")

    def _check_kinds(self, inputs: Sequence[TensorSpec]) -> None:
        if len(inputs) not in (4, 5):
            raise self.refuse(f"it has {len(inputs)} inputs; give x, weight, offset, bias and, for version 2, mask")
        for name, spec in zip(INPUTS, inputs, strict=False):
            if spec.dtype not in ("float32", "float16") or spec.dtype != inputs[0].dtype:
                raise self.refuse(f"{name} is {spec.dtype}; give float32 or float16, the same for all inputs")
            rank = 1 if name == "bias" else 4
            fixed = spec.shape[name in ("x", "offset", "mask") :]
            if len(spec.shape) != rank or not all(fixed):
                raise self.refuse(f"{name} is {_text(spec.shape)}; give {rank} sizes above 0, and only the number of instances may vary")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """y's type is that of x."""
        return [inputs[0]]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """y is `[n, O, Ho, Wo]`."""
        n, _, height, width = inputs[2]
        return [[n, inputs[3][0], height, width]]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """One, for all numbers of instances."""
        kind = "*" + TRITON_TYPES[inputs[0].dtype]
        outputs, groups = inputs[3].size(0), self.values["offset_group"]
        tile = tiling(outputs, inputs[0].dtype)
        constants = (
            ("OUTPUTS", outputs),
            ("GROUPS", groups),
            ("GROUP_CHANNELS", inputs[0].size(1) // groups),
            ("PADDED_CHANNELS", inputs[1].size(2)),
            ("PADDED_OUTPUTS", inputs[1].size(3)),
            ("MODULATED", len(inputs) == 5),
            ("RELU", bool(self.values["relu"])),
            ("HEIGHT", inputs[0].size(2)),
            ("WIDTH", inputs[0].size(3)),
            ("OUT_HEIGHT", inputs[2].size(2)),
            ("OUT_WIDTH", inputs[2].size(3)),
            ("KERNEL_HEIGHT", self.values["kernel_shape"][0]),
            ("KERNEL_WIDTH", self.values["kernel_shape"][1]),
            ("STRIDE_Y", self.values["strides"][0]),
            ("STRIDE_X", self.values["strides"][1]),
            ("PAD_Y", self.values["pads"][0]),
            ("PAD_X", self.values["pads"][1]),
            ("DILATION_Y", self.values["dilations"][0]),
            ("DILATION_X", self.values["dilations"][1]),
            ("BLOCK_C", BLOCK_C),
            ("BLOCK_O", tile.block_o),
            ("BLOCK_P", tile.block_p),
        )
        signature = tuple((name, kind) for name in ("x", "packed", "offset", "bias", "mask", "y"))
        return [KernelSpec(MODULE, "deform_conv", signature, constants, tile.num_warps, num_stages=1)]

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """One launch, with a program for each tile of pixels and block of outputs of each instance."""
        n, channels, height, width = (outputs[0].size(axis) for axis in range(4))
        tile = tiling(channels, inputs[0].dtype)
        grid = (n * -(-height * width // tile.block_p), -(-channels // tile.block_o), 1)
        # Version 1 has no mask: the kernel gets a pointer that it does not read.
        mask = Buffer("input", len(inputs) - 1)
        pointers = (*(Buffer("input", index) for index in range(4)), mask, Buffer("output"))
        return [Launch(self.kernels(inputs)[0], grid, pointers)]

    @property
    def _taps(self) -> int:
        return math.prod(self.values["kernel_shape"])

    def _out_size(self, x: TensorSpec) -> tuple[int, int]:
        kernel, strides, pads, dilations = (self.values[name] for name in ("kernel_shape", "strides", "pads", "dilations"))
        height, width = (
            (x.size(axis + 2) + 2 * pads[axis] - dilations[axis] * (kernel[axis] - 1) - 1) // strides[axis] + 1 for axis in (0, 1)
        )
        return height, width


def _text(shape: Sequence[int | None]) -> str:
    return " x ".join("n" if size is None else str(size) for size in shape)
