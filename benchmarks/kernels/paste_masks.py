"""PasteMasks beside pasting on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.kernels import sizes
from benchmarks.kernels.case import KERNEL, Case, bound, input_sets_beyond_cache, launch, random, total_bytes
from benchmarks.kernels.timing import Contender
from runtime.paste import Crop, covered_pixels, mask_crop
from trt_plugins.paste_masks import PasteMasks


def case(boxes: Tensor, counts: Sequence[int]) -> Case:
    """From logits on the GPU to crops on the host, in a frame as large as the canvas."""
    height, width = sizes.CANVAS
    operator, parts = PasteMasks(height=height, width=width), boxes.split(list(counts))
    each_box = boxes.cpu().numpy()

    def draw() -> list[Tensor]:
        coarse = (4 * random(1, max(count, 1), 5, 5) for count in counts)
        return [
            nn.functional.interpolate(x, (grid, grid), mode="bilinear")[0, :count]
            for x, (_, grid), count in zip(coarse, sizes.STAGES, counts, strict=True)
        ]

    def on_gpu(logits: Sequence[Tensor]) -> list[Tensor]:
        return [launch(operator, [x, part])[0] for x, part in zip(logits, parts, strict=True) if len(part)]

    def to_host(logits: Sequence[Tensor]) -> list[Crop]:
        masks = [mask for bits in on_gpu(logits) for mask in bits.cpu().numpy()]
        return [_crop_of_bits(mask, box, width) for mask, box in zip(masks, each_box, strict=True)]

    def on_host(logits: Sequence[Tensor]) -> list[Crop]:
        masks = [mask for x in logits for mask in x.cpu().numpy()]
        return [mask_crop(mask, box, height, width) for mask, box in zip(masks, each_box, strict=True)]

    logits = draw()
    sets = input_sets_beyond_cache(draw, logits, total_bytes([*logits, *on_gpu(logits)]))
    contenders = {
        KERNEL: Contender([bound(on_gpu, each) for each in sets]),
        "kernel, crops on the host": Contender([bound(to_host, each) for each in sets], graph=False),
        "all on the host": Contender([bound(on_host, each) for each in sets], graph=False),
    }
    return Case(f"PasteMasks: {' / '.join(map(str, counts))}", torch.float32, contenders)


def _crop_of_bits(bits: npt.NDArray[np.int32], box: npt.NDArray[np.float32], width: int) -> Crop:
    """The crop of a mask `[height, words]` to its box, as `runtime.paste.mask_crop` gives it."""
    left, top, right, bottom = covered_pixels(box, len(bits), width)
    first = left // 32
    words = np.ascontiguousarray(bits[top:bottom, first : -(-right // 32)])
    pixels = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").view(bool)
    return left, top, pixels[:, left - 32 * first : right - 32 * first]
