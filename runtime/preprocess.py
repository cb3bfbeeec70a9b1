"""Letterboxing: scales an image to the canvas, the input of the model, and normalises it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import numpy.typing as npt


def letterbox_scale(height: int, width: int, canvas_height: int, canvas_width: int) -> tuple[float, int, int]:
    """The factor that scales an image to fit the canvas, and the scaled height and width in pixels, at least 1 each."""
    scale = min(canvas_height / height, canvas_width / width)
    return scale, *scaled_size(height, width, scale)


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width in pixels after scaling, at least 1 each."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(pixels: npt.NDArray[np.uint8], height: int, width: int, scale: float) -> npt.NDArray[np.uint8]:
    """Resize `[h, w]` or `[h, w, C]` uint8: pixels are averaged where the image shrinks and interpolated bilinearly where it grows.

    Args:
        height, width: the new size, pixels.
        scale: the factor from the old to the new size, before rounding.
    """
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=interpolation), np.uint8)


def place_normalised(content: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float], canvas: npt.NDArray[np.float32]) -> None:
    """Write an image to the top left of a canvas as `(x / 255 - mean) / std`, and zeros to the rest.

    Args:
        content: `[h, w, 3] uint8` RGB, not larger than the canvas.
        mean, std: per channel, of values from 0 to 1.
        canvas: `[3, H, W] float32`, written in place.
    """
    rows, columns = content.shape[:2]
    canvas[:, rows:] = 0
    canvas[:, :rows, columns:] = 0
    for channel, plane in enumerate(cv2.split(content)):
        values = canvas[channel, :rows, :columns]
        np.multiply(plane, np.float32(1 / (255 * std[channel])), out=values)
        values -= np.float32(mean[channel] / std[channel])


def filled_canvas(sizes: Iterable[tuple[int, int]], canvas: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """The smallest canvas that holds images which were scaled to fit `canvas`: only padding is cut off.

    Args:
        sizes: the images' heights and widths, pixels.
        canvas: height and width, multiples of 32, that the images are scaled to fit.
        least: height and width, multiples of 32, not larger than `canvas`.

    Returns:
        Height and width, multiples of 32, from `least` to `canvas`.
    """
    contents = [letterbox_scale(*size, *canvas)[1:] for size in sizes]
    height, width = (max(low, *(-(-side // 32) * 32 for side in sides)) for low, *sides in zip(least, *contents, strict=True))
    return height, width


def letterbox_normalise(
    image: npt.NDArray[np.uint8],
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    out: npt.NDArray[np.float32] | None = None,
) -> tuple[npt.NDArray[np.float32], float]:
    """The image scaled to fit the canvas, at its top left, as `(x / 255 - mean) / std`; the rest is 0.

    Pixels are averaged where the image shrinks and interpolated bilinearly where it grows.

    Args:
        image: `[h, w, 3] uint8` RGB.
        height, width: of the canvas, pixels.
        mean, std: per channel, of values from 0 to 1.
        out: `[1, 3, h, w] float32` to write into; it may be smaller than the canvas if it holds the scaled image (`filled_canvas`).

    Returns:
        `[1, 3, height, width] float32` or `out`, and the scale: canvas pixels per image pixel.
    """
    scale, rows, columns = letterbox_scale(image.shape[0], image.shape[1], height, width)
    if out is None:
        out = np.empty((1, 3, height, width), np.float32)
    place_normalised(resize(image, rows, columns, scale), mean, std, out[0])
    return out, scale
