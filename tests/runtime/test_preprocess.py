"""The canvas equals the plain formula, with zeros where there is no image."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from runtime.preprocess import filled_canvas, letterbox_normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("size", "content"), [((48, 64), (72, 96)), ((480, 640), (72, 96)), ((640, 480), (96, 72)), ((96, 96), (96, 96)), ((1, 1), (96, 96))]
)
def test_the_canvas_is_the_normalised_image_at_the_top_left(size, content):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    canvas, scale = letterbox_normalise(image, 96, 96, MEAN, STD)
    rows, columns = content
    resized = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    expected = np.zeros((1, 3, 96, 96))
    expected[0, :, :rows, :columns] = ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)
    assert canvas.shape == (1, 3, 96, 96) and canvas.dtype == np.float32
    assert scale == 96 / max(size)
    np.testing.assert_allclose(canvas, expected, atol=1e-6)


def test_halving_averages_four_pixels():
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    canvas, _ = letterbox_normalise(image, 64, 64, (0, 0, 0), (1, 1, 1))
    means = image.reshape(64, 2, 64, 2, 3).mean((1, 3))
    np.testing.assert_allclose(canvas[0] * 255, means.transpose(2, 0, 1), atol=0.51)


def test_a_thin_image_keeps_one_pixel():
    canvas, scale = letterbox_normalise(np.full((1, 4000, 3), 255, np.uint8), 64, 96, (0, 0, 0), (1, 1, 1))
    assert scale == 96 / 4000
    assert (canvas[..., 0, :] == 1).all() and not canvas[..., 1:, :].any()


def test_a_reused_canvas_holds_nothing_of_the_image_before():
    out = np.full((1, 3, 64, 64), 7, np.float32)
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    canvas, _ = letterbox_normalise(image, 64, 64, MEAN, STD, out)
    assert canvas is out
    np.testing.assert_array_equal(canvas, letterbox_normalise(image, 64, 64, MEAN, STD)[0])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(480, 640)], (256, 320)),  # 240 x 320 of 320 x 320, and 240 is 7.5 x 32.
        ([(640, 480)], (320, 256)),
        ([(480, 640), (640, 480)], (320, 320)),
        ([(100, 4000)], (64, 320)),
        ([(9, 9)], (320, 320)),
        ([(448, 640)], (224, 320)),
        ([(451, 640)], (256, 320)),
    ],
)
def test_the_filled_canvas_leaves_padding_off(sizes, expected):
    assert filled_canvas(sizes, (320, 320), (64, 96)) == expected


def test_a_smaller_canvas_is_the_corner_of_the_whole():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    whole, scale = letterbox_normalise(image, 128, 128, MEAN, STD)
    out = np.full((1, 3, 96, 128), 7, np.float32)
    assert letterbox_normalise(image, 128, 128, MEAN, STD, out) == (out, scale)
    np.testing.assert_array_equal(out, whole[..., :96, :])
