"""The windows of PasteMasks: which pixels of an image an instance's mask may cover, where their bits go, and which program writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.paste import PackedMask

BLOCK_ROWS, BLOCK_WORDS = 4, 8
"""Rows and words of a program: 1,024 pixels."""
FIELDS = 6
"""Of a window: left, top, width, height (pixels of the image), its first word among the bits, its first program."""


def count_words(pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The words `[n]` of each instance's pixels `[n, 4]`. A row of pixels begins with a new word."""
    return -(-(pixels[:, 2] - pixels[:, 0]) // 32) * (pixels[:, 3] - pixels[:, 1])


def make_windows(pixels: npt.NDArray[np.int64], first_word: int = 0) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The windows of instances, one after the other from `first_word` on.

    Args:
        pixels: `[n, 4]`, left, top, right, bottom of each instance's pixels, the last two excluded (`runtime.paste.covered_pixels`).

    Returns:
        `windows [n, 6] int32`, and `owners [P] int32`, the instance of each program.
    """
    left, top = pixels[:, 0], pixels[:, 1]
    width, height = pixels[:, 2] - left, pixels[:, 3] - top
    words = count_words(pixels)
    programs = -(-width // (32 * BLOCK_WORDS)) * -(-height // BLOCK_ROWS)
    places = (first_word + np.cumsum(words) - words, np.cumsum(programs) - programs)
    windows = np.stack([left, top, width, height, *places], axis=1).astype(np.int32)
    return windows, np.repeat(np.arange(len(pixels), dtype=np.int32), programs)


def unpack_windows(bits: npt.NDArray[np.int32], windows: npt.NDArray[Any]) -> list[PackedMask]:
    """The masks of instances, from `bits [words]`; each is a view of them."""
    masks = []
    for left, top, width, height, first_word, _ in windows.tolist():
        row_words = -(-width // 32)
        words = bits[first_word : first_word + row_words * height].reshape(height, row_words)
        masks.append(PackedMask(left, top, width, words))
    return masks
