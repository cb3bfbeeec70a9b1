"""Every kind of image file becomes 8-bit RGB, and what is no image is refused in a sentence."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from runtime import images
from runtime.errors import InputError
from runtime.images import read_image


def saved(path, array, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options) if mode else Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(7, 5, 3), (1, 1, 3), (1, 4000, 3), (4000, 1, 3)])
def test_rgb_comes_back_as_written(tmp_path, shape):
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    read = read_image(saved(tmp_path / "a.png", array))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)
    read[0, 0] = 0  # Writable: callers draw on it.


def test_grey_and_palette_become_rgb(tmp_path, rgb):
    grey = rgb[..., 0]
    np.testing.assert_array_equal(read_image(saved(tmp_path / "grey.png", grey)), np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(rgb).quantize(256)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))


def test_transparency_is_laid_over_black(tmp_path, rgb):
    alpha = np.full((7, 5, 1), 255, np.uint8)
    alpha[:3], alpha[3] = 0, 128
    read = read_image(saved(tmp_path / "a.png", np.concatenate([rgb, alpha], 2))).astype(int)
    np.testing.assert_allclose(read, rgb * (alpha / 255), atol=1)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    samples = np.array([[0, 1000, 32768, 65535]], np.uint16)
    for suffix in ("png", "tif"):
        read = read_image(saved(tmp_path / f"a.{suffix}", samples))
        np.testing.assert_array_equal(read[..., 1], np.round(samples / 65535 * 255))


def test_cmyk_is_converted(tmp_path):
    cmyk = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    for suffix in ("jpg", "tif"):
        cmyk.save(tmp_path / f"a.{suffix}")
        np.testing.assert_allclose(read_image(tmp_path / f"a.{suffix}"), np.broadcast_to([255, 0, 0], (4, 6, 3)), atol=4)


def test_the_exif_orientation_is_applied(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned 90 degrees clockwise for display.
    saved(tmp_path / "a.png", rgb, exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(rgb, -1))


def test_what_is_no_whole_image_is_refused(tmp_path, rgb):
    whole = saved(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "damaged.png").write_bytes(whole[:60] + bytes(200) + whole[260:])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    saved(tmp_path / "float.tif", rgb[..., 0].astype(np.float32))
    for name in ("missing.png", "truncated.png", "damaged.png", "empty.jpg", "text.jpg", "float.tif", "."):
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_more_pixels_than_are_allowed_are_refused_before_decoding(tmp_path, rgb, monkeypatch):
    path = saved(tmp_path / "a.png", rgb)
    monkeypatch.setattr(images, "MAX_PIXELS", 34)
    with pytest.raises(InputError, match="5x7, more than 34 pixels"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own limit, twice this, comes first.
    with pytest.raises(InputError, match="more than"):
        read_image(path)
