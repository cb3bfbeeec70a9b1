"""Images: files of each format with damaged headers, chunks and data."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import DynaMaskError
from runtime.images import MAX_PIXELS, frame_count, is_image, read_frames, read_image
from runtime.sources import IMAGE_SUFFIXES, open_source
from tests.fuzzing import Files
from tests.fuzzing.damage import damaged

_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNKS = (
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"iCCP",
    b"eXIf",
    b"gAMA",
    b"cHRM",
    b"sBIT",
    b"tRNS",
    b"PLTE",
    b"acTL",
    b"fcTL",
    b"fdAT",
    b"IDAT",
    b"IEND",
)
_TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
_FRAMES, _LARGE_PIXELS = 3, 10_000_000
"""Frames of an animation that are decoded; of larger images, one: a damaged header may announce 100 million pixels in each."""


@functools.cache
def sound_files() -> dict[str, tuple[bytes, list[range]]]:
    """Name with suffix -> a small file of each format and kind of samples, and the ranges of its headers."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 4), np.uint8)
    rgba = Image.fromarray(pixels)
    rgb, grey, bilevel, palette = (rgba.convert(mode) for mode in ("RGB", "L", "1", "P"))
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    more = {"save_all": True, "append_images": [rgb.rotate(180), rgb], "duration": 40}
    saved: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("rgb.jpg", rgb, {"exif": exif}),
        ("progressive.jpg", rgb, {"progressive": True, "subsampling": 0}),
        ("grey.jpg", grey, {"restart_marker_rows": 1}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("pictures.mpo", rgb, {"save_all": True, "append_images": [rgb]}),
        *((f"{image.mode.replace(';', '')}.png", image, {"exif": exif}) for image in (rgb, rgba, grey, bilevel, palette, deep)),
        ("transparent.png", palette, {"transparency": 3}),
        ("animated.png", rgb, more),
        ("palette.gif", palette, {"transparency": 5}),
        ("animated.gif", rgb, more),
        *((f"{image.mode}.bmp", image, {}) for image in (rgb, rgba, grey, bilevel, palette)),
        *((f"{mode}.tif", rgb, {"compression": mode, "exif": exif}) for mode in _TIFF_COMPRESSIONS),
        ("deep.tif", deep, {}),
        ("fax.tif", bilevel, {"compression": "group4"}),
        ("cmyk.tif", rgb.convert("CMYK"), {}),
        ("pages.tif", rgb, {"save_all": True, "append_images": [grey, rgba]}),
        ("big.tif", rgb, {"big_tiff": True}),
        ("lossy.webp", rgb, {"exif": exif}),
        ("lossless.webp", rgba, {"lossless": True}),
        ("animated.webp", rgb, more),
        *((f"{image.mode}.ppm", image, {}) for image in (rgb, grey, bilevel)),
        ("icon.ico", rgba, {"sizes": [(8, 8), (9, 9)]}),
        ("rgb.jp2", rgb, {}),
        ("stream.j2k", rgba, {"irreversible": True, "num_resolutions": 2}),
        ("rgb.avif", rgb, {}),
        ("animated.avif", rgb, more),
        ("run.tga", rgb, {"compression": "tga_rle"}),
        ("palette.tga", palette, {}),
    ]
    files = {}
    for name, image, options in saved:
        if Path(name).suffix not in Image.registered_extensions():  # Pillow before 11.3 has no AVIF.
            continue
        file = io.BytesIO()
        image.save(file, Image.registered_extensions()[Path(name).suffix], **options)
        files[name] = (file.getvalue(), _headers(name, file.getvalue()))
    files["text.ppm"] = (b"P3\n# text\n3 2\n255\n" + b"1 2 3 " * 6, [range(20)])
    return files


def _headers(name: str, content: bytes) -> list[range]:
    if name.endswith(".tif") and name != "big.tif":
        start = int.from_bytes(content[4:8], "little")
        entries = int.from_bytes(content[start : start + 2], "little")
        return [range(8), range(start, start + 2 + 12 * entries + 4)]
    if name.endswith(".jpg"):
        return [range(content.index(b"\xff\xda") + 12)]
    if name.endswith(".avif"):
        return [range(content.index(b"mdat"))]
    # Most damage is behind the bytes by which a format is known.
    return [range(8, min(len(content), 64))]


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG: type and data. The last may be cut."""
    at = len(_PNG)
    while at + 8 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        yield content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        at += size + 12


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return _PNG + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)


@st.composite
def _damaged_png(draw: st.DrawFn, content: bytes) -> bytes:
    """Chunks damaged, left out, repeated or made up, with the lengths and checksums that belong to them."""
    chunks = list(_chunks(content))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(chunks) - 1)))
        change = draw(st.integers(0, 7))
        if change < 4 and chunks:
            chunks[at] = (chunks[at][0], draw(damaged(chunks[at][1] or b"\0")))
        elif change == 4 and chunks:
            del chunks[at]
        elif change == 5 and chunks:
            chunks.insert(draw(st.integers(0, len(chunks))), chunks[at])
        else:
            data = draw(st.binary(max_size=40))
            kind = draw(st.sampled_from(_CHUNKS))
            if kind in (b"zTXt", b"iCCP"):
                data = b"name\0\0" + zlib.compress(data * draw(st.sampled_from([1, 1, 100_000])))
            chunks.insert(at, (kind, data))
    return _png(chunks)


@st.composite
def inputs(draw: st.DrawFn) -> Files:
    """One image file."""
    name = draw(st.sampled_from(sorted(sound_files())))
    content, headers = sound_files()[name]
    if name.endswith(".png") and draw(st.integers(0, 2)):
        return Files({name: draw(_damaged_png(content))})
    if draw(st.integers(0, 15)) == 15:
        other, _ = sound_files()[draw(st.sampled_from(sorted(sound_files())))]
        at = draw(st.integers(0, len(content)))
        return Files({name: content[:at] + other[draw(st.integers(0, len(other))) :]})
    return Files({name: draw(damaged(content, headers))})


def check(folder: Path) -> bool:
    """Read the file as `predict` and training do, then as `stream` does."""
    (path,) = folder.iterdir()
    is_image(path)
    accepted, frames = True, _FRAMES
    try:
        image = read_image(path)
    except DynaMaskError as error:
        assert str(path) in str(error) and "\n" not in str(error) and "permissions" not in str(error)
        str(error).encode()
        accepted = False
    else:
        _check_picture(image)
        if image.size > 3 * _LARGE_PIXELS:
            frames = 1
        del image
    try:
        count = frame_count(path)
        assert count is None or count >= 1
        for frame, seconds in islice(read_frames(path), frames):
            _check_picture(frame)
            assert 0.011 <= seconds < float("inf")
    except DynaMaskError:
        pass
    try:
        with open_source(path) as source:
            times = []
            for shown in islice(source, frames):
                _check_picture(shown.image)
                times.append(shown.time_s)
            assert times and sorted(set(times)) == times and source.frame_rate > 0
    except DynaMaskError as error:
        # Files under these suffixes are opened by FFmpeg, which refuses other damage than Pillow.
        assert not accepted or path.suffix not in IMAGE_SUFFIXES, error
    return accepted


def _check_picture(image: Any) -> None:
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and 0 < image.shape[0] * image.shape[1] <= MAX_PIXELS
