"""Every kind of image file becomes 8-bit RGB, and what is no image is refused in a sentence."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from runtime import images
from runtime.errors import DynaMaskError, InputError
from runtime.images import frame_count, read_frames, read_image


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


def test_damaged_and_other_files_are_refused(tmp_path, rgb):
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


@pytest.mark.parametrize("kind", ["32-bit", "signed", "float"])
def test_samples_of_unknown_range_are_refused_not_made_black(tmp_path, kind):
    samples = np.arange(12, dtype={"32-bit": np.int32, "signed": np.int16, "float": np.float32}[kind]).reshape(3, 4)
    if kind == "signed":
        assert cv2.imwrite(str(tmp_path / "a.tif"), samples.view(np.uint16))
        data = bytearray((tmp_path / "a.tif").read_bytes())
        entry = data.index(struct.pack("<HHI", 339, 3, 1))  # SampleFormat: 2 is a signed integer.
        data[entry + 8 : entry + 10] = struct.pack("<H", 2)
        (tmp_path / "a.tif").write_bytes(data)
    else:
        saved(tmp_path / "a.tif", samples)
    with pytest.raises(InputError, match=r"a\.tif holds .* whose range is unknown; save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


def test_twelve_bits_are_scaled_by_their_range(tmp_path):
    fields = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 122), (277, 3, 1, 1)]
    fields += [(278, 3, 1, 1), (279, 4, 1, 3)]
    directory = struct.pack("<H", 9) + b"".join(struct.pack("<HHII", *field) for field in fields) + bytes(4)
    (tmp_path / "a.tif").write_bytes(b"II*\0\x08\0\0\0" + directory + b"\x80\x0f\xff")
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_exif_orientation_is_undone(tmp_path, rgb, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, 1),
        7: rgb[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(rgb, -1),
    }[orientation]
    path = saved(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(read_image(path), rgb)


@pytest.mark.parametrize("damage", ["cut", "noise", "endless", "out of range", "no number"])
def test_a_photo_with_broken_exif_is_read_and_its_name_said(tmp_path, rgb, damage, caplog, recwarn):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(tmp_path / "photo.jpg", rgb, exif=exif).read_bytes()
    start, entry = data.index(b"Exif\0\0"), data.index(struct.pack(">HHI", 0x0112, 3, 1))
    damaged = {
        "cut": data[: start + 14] + b"\xff" * 4 + data[start + 18 :],
        "noise": data[: start + 10] + b"\xff" * 20 + data[start + 30 :],
        "endless": data[:entry] + struct.pack(">HHI", 0x0112, 3, 0xFFFFFF) + data[entry + 8 :],
        "out of range": data[: entry + 8] + struct.pack(">H", 9) + data[entry + 10 :],
        "no number": data[:entry] + struct.pack(">HHI", 0x0112, 2, 1) + data[entry + 8 :],
    }[damage]
    (tmp_path / "photo.jpg").write_bytes(damaged)
    for _ in range(2):
        assert read_image(tmp_path / "photo.jpg").shape == (7, 5, 3)
    assert not [entry for entry in recwarn if issubclass(entry.category, UserWarning)]
    said = [record.getMessage() for record in caplog.records]
    # An orientation that is no orientation is no damage.
    assert len(said) == (0 if damage in ("out of range", "no number") else 1), "said once, though read twice"
    assert all(str(tmp_path / "photo.jpg") in line and "EXIF" in line for line in said)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "many"])
def test_a_png_with_much_text_is_sound(tmp_path, rgb, kind, place):
    large = zlib.compress(bytes(2 << 20))
    chunks = {
        "zTXt": png_chunk(b"zTXt", b"prompt\0\0" + large),
        "iTXt": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + large),
        "iCCP": png_chunk(b"iCCP", b"profile\0\0" + large),
        "many": b"".join(png_chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(66)),
    }
    data = saved(tmp_path / "a.png", rgb).read_bytes()
    at = 33 if place == "before" else len(data) - 12
    (tmp_path / "a.png").write_bytes(data[:at] + chunks[kind] + data[at:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), rgb)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jpg", b"", "is empty"),
        ("a.jpg", bytes(500), "zeros only"),
        ("a.dcm", bytes(128) + b"DICM" + bytes(99), "is a medical image"),
        ("a.jpg", b"\n<!DOCTYPE html><html>404", "is a web page"),
        ("a.svg", b"<?xml version='1.0'?>\n<svg>", "is a drawing"),
        ("a.jpg", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC image.* convert it to JPEG"),
        ("a.png", b"\xff\x0a\0\0", "is a JPEG XL image"),
        ("a.jpg", b"\0\0\0\x18ftypisom", "is a video; run dynamask stream"),
        ("a.jpg", b"%PDF-1.4", "is a document"),
        ("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is a document"),
        ("a.NEF", b"MM\0*", "is a camera's raw file"),
        ("a.tif", b"II*\0\x10\0\0\0CR", "is a camera's raw file|begins as a TIFF"),
        ("a.jpg", b"PK\x03\x04", "is an archive"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "begins as a PNG does, and is damaged"),
        ("a.jpg", b"hello", "is not an image in a format that is known here"),
    ],
)
def test_the_kind_of_a_file_that_is_no_image_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_raw_file_is_not_taken_for_its_thumbnail(tmp_path, rgb):
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory[0xC612] = b"\1\4\0\0"  # DNGVersion.
    with pytest.raises(InputError, match="raw file"):
        read_image(saved(tmp_path / "a.tif", rgb, tiffinfo=directory))


def test_truncated_and_undecodable_are_told_apart(tmp_path):
    data = saved(tmp_path / "a.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"is truncated .*; copy or download it again"):
        read_image(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(InputError, match="a device or a pipe"):
        read_image(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("nothing.jpg")
    with pytest.raises(InputError, match="is a link to a file that does not exist"):
        read_image(tmp_path / "link.jpg")


def test_too_little_memory_is_no_damage(tmp_path, rgb, monkeypatch):
    path = saved(tmp_path / "a.png", rgb)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(DynaMaskError, match="needs more memory than is free") as caught:
        read_image(path)
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "I;16", "1"])
def test_strips_of_a_large_image_are_read_as_the_whole(tmp_path, rgb, mode, monkeypatch):
    deep = np.arange(35, dtype=np.uint16).reshape(7, 5) * 1800
    source = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(rgb).convert("RGBA").convert(mode)
    source.save(tmp_path / "a.png")
    whole = read_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "_STRIP_PIXELS", 11)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), whole)
    assert whole.std() > 0


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_frames_of_an_animation_come_with_their_durations(tmp_path, suffix):
    pictures = [Image.new("RGB", (8, 6), (60 * i, 60 * i, 60 * i)) for i in range(4)]
    pictures[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:], duration=[200, 50, 0, 70], lossless=True)
    frames = list(read_frames(tmp_path / f"a.{suffix}"))
    assert [int(frame.mean()) for frame, _ in frames] == [0, 60, 120, 180]
    np.testing.assert_allclose([seconds for _, seconds in frames], [0.2, 0.05, 0.1, 0.07])
    assert read_image(tmp_path / f"a.{suffix}").mean() == 0
    assert frame_count(tmp_path / f"a.{suffix}") == 4


def test_threads_may_read_images_at_once(tmp_path, rgb):
    paths = [saved(tmp_path / f"{i}.{suffix}", rgb) for i in range(8) for suffix in ("png", "tif")]
    before = warnings.filters[:]
    with ThreadPoolExecutor(8) as pool:
        for read in pool.map(read_image, paths * 4):
            np.testing.assert_array_equal(read, rgb)
    assert warnings.filters == before
