"""Pastes masks by the operator PasteMasks alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from runtime.paste import covered_pixels
from trt_plugins.on_torch import run
from trt_plugins.paste_masks import PasteMasks
from trt_plugins.paste_masks.windows import count_words, make_windows, unpack_windows


def pasted(logits: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> npt.NDArray[np.bool_]:
    """The masks `[n, height, width]` of PasteMasks, on the device of its inputs."""
    pixels = covered_pixels(boxes.cpu().numpy(), height, width)
    windows, owners = make_windows(pixels)
    words = int(count_words(pixels).sum())
    [bits] = run(PasteMasks(words=words), [logits, boxes, *(torch.from_numpy(array).to(boxes.device) for array in (windows, owners))])
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, found in zip(masks, unpack_windows(bits.cpu().numpy(), windows), strict=True):
        left, top, crop = found.crop()
        beyond = np.unpackbits(np.ascontiguousarray(found.words).view(np.uint8), axis=-1, bitorder="little")[:, found.width :]
        assert not beyond.any(), "nothing beyond the window"
        mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return masks
