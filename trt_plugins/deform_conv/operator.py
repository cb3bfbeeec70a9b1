"""The operator DeformConv: inputs, outputs, kernels, launches and tiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trt_plugins.operator import TRITON_TYPES, Attribute, Buffer, DType, KernelSpec, Launch, Operator, TensorSpec, Workspace, power_of_two

INPUTS = ("x", "weight", "offset", "bias", "mask")
MODULE = "trt_plugins.deform_conv.kernel"
BLOCK_C = 16
"""Channels sampled at a time: the minimum of a tensor core. More channels need more registers, and leave fewer warps to hide loads."""
PACK_BLOCK = 1024


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


class DeformConv(Operator):
    """Deformable convolution, version 1 (Dai et al., ICCV 2017) or 2, with a mask (Zhu et al., CVPR 2019), and an optional ReLU.

    Inputs, all float32 or all float16: x `[n, C, H, W]`, H and W at least 2; weight `[O, C, kh, kw]`; offset `[n, 2 * G * kh * kw, Ho, Wo]`
    in pixels of x, (dy, dx) for each tap in row order, as torchvision's; bias `[O]`; for version 2 mask `[n, G * kh * kw, Ho, Wo]`.
    Output: y `[n, O, Ho, Wo]` of the same type. Only n, which may be 0, may vary from run to run.

    A sample between pixels is interpolated bilinearly, with zeros beyond the border (torchvision.ops.deform_conv2d). Positions, blending
    and sums are float32; in float16, samples are rounded before they are multiplied. x must be finite: the border's pixels are
    multiplied by 0 for samples beyond it.
    """

    name = "DeformConv"
    attributes = (
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
        for name in ("strides", "dilations"):
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
        x, weight = inputs[:2]
        n, channels, height, width = x.shape
        outputs, _, *kernel = weight.shape
        groups = self.values["offset_group"]
        if min(x.size(2), x.size(3)) < 2:
            raise self.refuse(f"x is {_text(x.shape)}; give at least 2 rows and 2 columns")
        if x.size(1) % groups:
            raise self.refuse(f"x has {channels} channels; give a multiple of offset_group {groups}")
        out_height, out_width = self._out_size(x, weight)
        if min(out_height, out_width) < 1:
            raise self.refuse(f"weight is {_text(weight.shape)}; its taps do not fit into x {_text(x.shape)} with its pads")
        taps = groups * weight.size(2) * weight.size(3)
        expected = {
            "x": (n, channels, height, width),
            "weight": (outputs, channels, *kernel),
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
        return [[n, inputs[1][0], height, width]]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """`pack_weight`, then `deform_conv`."""
        kind = "*" + TRITON_TYPES[inputs[0].dtype]
        outputs, channels, kernel_height, kernel_width = (inputs[1].size(axis) for axis in range(4))
        groups, taps, padded_channels, padded_outputs = self._packed_shape(inputs)
        tile = tiling(outputs, inputs[0].dtype)
        shared = (
            ("OUTPUTS", outputs),
            ("GROUPS", groups),
            ("GROUP_CHANNELS", channels // groups),
            ("PADDED_CHANNELS", padded_channels),
            ("PADDED_OUTPUTS", padded_outputs),
        )
        pack = KernelSpec(MODULE, "pack_weight", (("weight", kind), ("packed", kind)), (*shared, ("TAPS", taps), ("BLOCK", PACK_BLOCK)))
        constants = (
            *shared,
            ("MODULATED", len(inputs) == 5),
            ("RELU", bool(self.values["relu"])),
            ("HEIGHT", inputs[0].size(2)),
            ("WIDTH", inputs[0].size(3)),
            ("OUT_HEIGHT", inputs[2].size(2)),
            ("OUT_WIDTH", inputs[2].size(3)),
            ("KERNEL_HEIGHT", kernel_height),
            ("KERNEL_WIDTH", kernel_width),
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
        return [pack, KernelSpec(MODULE, "deform_conv", signature, constants, tile.num_warps, num_stages=1)]

    def workspace(self, inputs: Sequence[TensorSpec]) -> Workspace:
        """The packed weight."""
        workspace = Workspace()
        workspace.take("weight", math.prod(self._packed_shape(inputs)), inputs[0].dtype)
        return workspace

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """Pack the weight, then convolve; no launches without instances."""
        n, channels, height, width = (outputs[0].size(axis) for axis in range(4))
        if n == 0:
            return []
        pack, convolve = self.kernels(inputs)
        packed = self.workspace(inputs).parts["weight"]
        items = math.prod(self._packed_shape(inputs))
        tile = tiling(channels, inputs[0].dtype)
        grid = (n * -(-height * width // tile.block_p), -(-channels // tile.block_o), 1)
        x, weight, offset, bias = (Buffer("input", index) for index in range(4))
        # Version 1 has no mask: the kernel gets a pointer that it does not read.
        mask = Buffer("input", len(inputs) - 1)
        return [
            Launch(pack, (-(-items // PACK_BLOCK), 1, 1), (weight, packed)),
            Launch(convolve, grid, (x, packed, offset, bias, mask, Buffer("output"))),
        ]

    def _out_size(self, x: TensorSpec, weight: TensorSpec) -> tuple[int, int]:
        strides, pads, dilations = (self.values[name] for name in ("strides", "pads", "dilations"))
        height, width = (
            (x.size(axis) + 2 * pads[axis - 2] - dilations[axis - 2] * (weight.size(axis) - 1) - 1) // strides[axis - 2] + 1
            for axis in (2, 3)
        )
        return height, width

    def _packed_shape(self, inputs: Sequence[TensorSpec]) -> tuple[int, int, int, int]:
        """Groups, taps, channels of a group and outputs; the last two are rounded up to whole blocks."""
        outputs, channels, height, width = (inputs[1].size(axis) for axis in range(4))
        groups = self.values["offset_group"]
        block_o = tiling(outputs, inputs[0].dtype).block_o
        return groups, height * width, -(-channels // groups // BLOCK_C) * BLOCK_C, -(-outputs // block_o) * block_o


def _text(shape: Sequence[int | None]) -> str:
    return " x ".join("n" if size is None else str(size) for size in shape)
