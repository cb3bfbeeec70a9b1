"""The operator RoiAlign: inputs, outputs, kernel and launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trt_plugins.operator import TRITON_TYPES, Attribute, Buffer, DType, KernelSpec, Launch, Operator, TensorSpec, alike, power_of_two

MAX_LEVELS = 5
BLOCK_BINS, BLOCK_ITEMS = 32, 512
"""The most bins, and items in all, of a program: a lane computes one bin for several channels with the same weights, in 64 registers."""


class RoiAlign(Operator):
    """RoIAlign (He et al., ICCV 2017), each RoI on its own level: maps `[B, C, H_l, W_l]`, rois `[n, 4] float32` -> `[n, C, size, size]`.

    Inputs are 1 to 5 maps, all fp32 or all fp16, and the RoIs, xyxy in pixels of the canvas; the output has the maps' type. Sampling is
    torchvision's `roi_align` with `spatial_scale = 1 / stride` and `sampling_ratio = samples`, in fp32.

    With `per_image` above 0, RoI i belongs to image `i // per_image` or, with a last input `places [n] int64`, to image
    `places[i] // per_image`. With 0, the maps hold one image, and all RoIs belong to it.

    Several maps are consecutive levels from P2 on. The level of a RoI is `floor(4 + log2(sqrt(w h) / canonical_size))`, clamped to these
    levels (Lin et al., CVPR 2017, Eq. 1); `canonical_size` is in pixels.
    """

    name = "RoiAlign"
    attributes = (
        Attribute("strides", "ints"),
        Attribute("size", "int"),
        Attribute("samples", "int"),
        Attribute("aligned", "int"),
        Attribute("canonical_size", "float", 0.0),
        Attribute("per_image", "int", 0),
    )
    outputs = ("regions",)

    def check_attributes(self) -> None:
        """Refuse attribute values that are out of range or do not fit each other.

        Raises:
            InputError: a size that is not positive, more than 5 strides, several levels and no canonical size, or a negative `per_image`.
        """
        strides = self.values["strides"]
        if not 1 <= len(strides) <= MAX_LEVELS or min(strides) < 1:
            raise self.refuse(f"strides is {list(strides)}; give one to {MAX_LEVELS}, in pixels per cell")
        for name in ("size", "samples"):
            if self.values[name] < 1:
                raise self.refuse(f"{name} is {self.values[name]}; give 1 or more")
        if self.values["aligned"] not in (0, 1):
            raise self.refuse(f"aligned is {self.values['aligned']}; give 0 or 1")
        if len(strides) > 1 and not self.values["canonical_size"] > 0:
            raise self.refuse(f"canonical_size is {self.values['canonical_size']}; {len(strides)} levels need one, in pixels")
        if self.values["per_image"] < 0:
            raise self.refuse(f"per_image is {self.values['per_image']}; give 0 for one image, or the number of places of an image")

    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs whose number, rank, sizes or types do not fit.

        Raises:
            InputError: names the node and the input.
        """
        levels, several = len(self.values["strides"]), self.values["per_image"] > 0
        if len(inputs) != levels + 1 and not (several and len(inputs) == levels + 2):
            last = "the RoIs and, if they do not stand in order, their places" if several else "the RoIs"
            raise self.refuse(f"it has {len(inputs)} inputs; {levels} strides ask for {levels} maps, then {last}")
        maps, (rois, *places) = inputs[:levels], inputs[levels:]
        first = maps[0]
        for index, spec in enumerate(maps):
            fits = len(spec.shape) == 4 and alike(spec.shape[0], first.shape[0] if several else 1)
            if not fits or spec.shape[1] is None or spec.shape[1] != first.shape[1]:
                wanted = "[B, C, H, W], with the same B and the same known C" if several else "[1, C, H, W], with the same known C"
                raise self.refuse(f"map {index} is {spec.shape}; give {wanted} for all maps")
            if spec.dtype not in ("float32", "float16") or spec.dtype != first.dtype:
                raise self.refuse(f"map {index} is {spec.dtype}; give float32 or float16, the same for all maps")
        if len(rois.shape) != 2 or rois.shape[1] != 4 or rois.dtype != "float32":
            raise self.refuse(f"the RoIs are {rois.shape} {rois.dtype}; give [n, 4] float32")
        for spec in places:
            if len(spec.shape) != 1 or not alike(spec.shape[0], rois.shape[0]) or spec.dtype != "int64":
                raise self.refuse(f"the places are {spec.shape} {spec.dtype} of RoIs {rois.shape}; give [n] int64, one per RoI")

    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """The maps' type."""
        return [inputs[0]]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`[n, C, size, size]`."""
        return [[inputs[len(self.values["strides"])][0], inputs[0][1], self.values["size"], self.values["size"]]]

    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """One, for all sizes of the maps and all numbers of images and RoIs."""
        values, levels = self.values, len(self.values["strides"])
        kind = "*" + TRITON_TYPES[inputs[0].dtype]
        channels = inputs[0].size(1)
        block_channels, block_bins = self._block(channels)
        placed = len(inputs) > levels + 1
        signature = [(f"x{level}", kind) for level in range(MAX_LEVELS)]
        signature += [("rois", "*fp32"), ("places", "*i64" if placed else "*fp32"), ("regions", kind)]
        signature += [("images", "i32"), *((f"{side}{level}", "i32") for level in range(MAX_LEVELS) for side in ("height", "width"))]
        constants: list[tuple[str, int | float | bool]] = [("PER_IMAGE", values["per_image"]), ("PLACED", placed), ("LEVELS", levels)]
        constants += [(f"SCALE{level}", 1.0 / stride) for level, stride in enumerate(_fill(values["strides"]))]
        constants += [
            ("LOG2_CANONICAL", math.log2(values["canonical_size"]) if levels > 1 else 0.0),
            ("CHANNELS", channels),
            ("SIZE", values["size"]),
            ("SAMPLES", values["samples"]),
            ("ALIGNED", bool(values["aligned"])),
            ("BLOCK_C", block_channels),
            ("BLOCK_BINS", block_bins),
        ]
        return [KernelSpec("trt_plugins.roi_align.kernel", "roi_align", tuple(signature), tuple(constants))]

    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """One launch, with a program for each block of bins and channels of each RoI."""
        levels = len(self.values["strides"])
        maps, rois = inputs[:levels], inputs[levels]
        channels = maps[0].size(1)
        block_channels, block_bins = self._block(channels)
        blocks = -(-channels // block_channels) * -(-(self.values["size"] ** 2) // block_bins)
        pointers = _fill([Buffer("input", index) for index in range(levels)])
        # Without places the kernel gets a pointer to the RoIs, which it does not read.
        boxes = Buffer("input", levels), Buffer("input", len(inputs) - 1)
        sizes = [spec.size(axis) for spec in _fill(maps) for axis in (2, 3)]
        arguments = (*pointers, *boxes, Buffer("output", 0), maps[0].size(0), *sizes)
        return [Launch(self.kernels(inputs)[0], (rois.size(0) * blocks, 1, 1), arguments)]

    def _block(self, channels: int) -> tuple[int, int]:
        """Channels and bins of a program."""
        bins = min(power_of_two(self.values["size"] ** 2), BLOCK_BINS)
        return min(power_of_two(channels), BLOCK_ITEMS // bins), bins


def _fill(levels: Sequence[Any]) -> list[Any]:
    """`levels`, extended to the `MAX_LEVELS` that the kernel has arguments for: the last one is repeated. The copies are never chosen."""
    return [*levels, *[levels[-1]] * (MAX_LEVELS - len(levels))]
