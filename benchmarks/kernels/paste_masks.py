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
from trt_plugins.paste_masks.windows import count_words, make_windows, unpack_windows


def case(boxes: Tensor, counts: Sequence[int]) -> Case:
    """From logits on the GPU to crops on the host, in a frame as large as the canvas."""
    height, width = sizes.CANVAS
    parts = boxes.split(list(counts))
    each_box = boxes.cpu().numpy()
    pixels = [covered_pixels(part.cpu().numpy(), height, width) for part in parts]

    def draw() -> list[Tensor]:
        coarse = (4 * random(1, max(count, 1), 5, 5) for count in counts)
        return [
            nn.functional.interpolate(x, (grid, grid), mode="bilinear")[0, :count]
            for x, (_, grid), count in zip(coarse, sizes.STAGES, counts, strict=True)
        ]

    def inputs_of(part: Tensor, of_part: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], PasteMasks, list[Tensor]]:
        windows, owners = make_windows(of_part)
        tensors = [torch.from_numpy(array).to(part.device) for array in (windows, owners)]
        return windows, PasteMasks(words=int(count_words(of_part).sum())), [part, *tensors]

    planned = [inputs_of(part, of_part) for part, of_part in zip(parts, pixels, strict=True)]

    def on_gpu(logits: Sequence[Tensor]) -> list[Tensor]:
        return [launch(operator, [x, *rest])[0] for x, (_, operator, rest) in zip(logits, planned, strict=True) if len(x)]

    def to_host(logits: Sequence[Tensor]) -> list[Crop]:
        """With the windows made for each frame, as the runner does."""
        found: list[Crop] = []
        for x, part, of_part in zip(logits, parts, pixels, strict=True):
            if len(x):
                windows, operator, rest = inputs_of(part, of_part)
                bits = launch(operator, [x, *rest])[0].cpu().numpy()
                found += [mask.crop() for mask in unpack_windows(bits, windows)]
        return found

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
