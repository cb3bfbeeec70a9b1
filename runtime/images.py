"""Reads image files into one form: 8-bit RGB, upright."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import logging
import os
import re
import threading
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from runtime.errors import DynaMaskError, InputError, first_line
from runtime.files import input_path

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a small file can claim any size."""
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names. Its other formats run programs (EPS), belong to videos (MPEG) or cannot be told from noise (TGA, read by its suffix)."""
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")
"""Formats whose frames are one picture in motion; the pages of a TIFF are not."""
_RAW_SUFFIXES = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw", ".x3f"})
"""Suffixes of cameras' raw files. Many are TIFFs, in which Pillow finds only a thumbnail."""
_MIRRORED = {2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
"""EXIF orientation -> whether rows and whether columns are to be reversed; from 5 on after they were exchanged."""
_ORIENTATION, _BITS_PER_SAMPLE, _DNG_VERSION = 0x0112, 0x0102, 0xC612
_DEPTH = "dynamask bits per sample"
"""Key in the `info` of an open TIFF, which its strips inherit."""
_STRIP_PIXELS = 4_000_000
_SHORTEST_FRAME_S, _USUAL_FRAME_S = 0.011, 0.1
"""Frames of an animation that are to be shown for 10 ms or less are shown for 100 ms, as browsers do."""
_WARNINGS = threading.Lock()
"""Python's record of warnings belongs to the whole process."""
_log = logging.getLogger(__name__)

Array = npt.NDArray[np.uint8]


def read_image(path: str | os.PathLike[str]) -> Array:
    """Read an image file as `[H, W, 3] uint8` RGB.

    JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000, PPM, ICO and TGA are read, by their content and whatever their suffix. Grey and
    palette images become RGB, CMYK is converted, samples of 12 and 16 bits are scaled to 8, transparency is laid over black, and the
    EXIF orientation is applied. Colour profiles are not. Of an animation or of several pages, the first is read.

    Raises:
        InputError: the file is missing, is no image or is truncated, claims more than `MAX_PIXELS`, or holds samples whose range is
            unknown (floating point, 32-bit integers).
        DynaMaskError: the memory does not suffice.

    Example:
        >>> import dynamask
        >>> dynamask.read_image(photo).shape == image.shape
        True
    """
    path = _checked(Path(path))
    with _errors(path), _load(path) as (image, orientation):
        return _upright(_to_rgb(path, image), orientation)


def read_frames(path: str | os.PathLike[str]) -> Generator[tuple[Array, float], None, None]:
    """The frames of an animation (GIF, APNG, WebP, AVIF), or the one frame of any other image, as `[H, W, 3] uint8` RGB and seconds.

    Raises:
        InputError, DynaMaskError: as `read_image`, and where a later frame cannot be decoded.
    """
    path = _checked(Path(path))
    with _errors(path), _load(path) as (image, orientation):
        for number in itertools.count():
            try:
                image.seek(number)
            except EOFError:
                if number:
                    return
                raise
            image.load()
            seconds = float(image.info.get("duration", 0)) / 1000
            yield _upright(_to_rgb(path, image), orientation), seconds if seconds >= _SHORTEST_FRAME_S else _USUAL_FRAME_S
            if image.format not in _ANIMATED:
                return


def frame_count(path: str | os.PathLike[str]) -> int | None:
    """The number of frames that `read_frames` gives; None if a later frame is damaged so that they cannot be counted.

    Raises:
        InputError, DynaMaskError: as `read_image`.
    """
    path = _checked(Path(path))
    with _errors(path), _load(path) as (image, _):
        if image.format not in _ANIMATED:
            return 1
        try:
            return int(getattr(image, "n_frames", 1))
        except Exception:  # Pillow reads all frames' headers, and raises IndexError, struct.error and others on damaged ones.
            return None


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width in pixels of the image that `read_image` gives, from the file's first bytes: nothing is decoded.

    Raises:
        InputError, DynaMaskError: as `read_image`, as far as the first bytes tell.
    """
    path = _checked(Path(path))
    with _errors(path), _recorded_warnings(), _open(path, path) as image:
        turned = (_orientation(image) or 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the file's content begins as an image of a known format does; it may still be damaged."""
    try:
        with _recorded_warnings(), _open(Path(path), Path(path)):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # Identified, and damaged or too large: `read_image` says how.
        return True


def _checked(path: Path) -> Path:
    if not input_path(path).exists():
        fault = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise InputError(f"{path} {fault}; give the path of an image.")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise InputError(f"{path} is not a file but {kind}; give the path of an image.")
    if path.suffix.lower() in _RAW_SUFFIXES:
        raise InputError(f"{path} is a camera's raw file; develop it to JPEG or TIFF first.")
    return path


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn Pillow's and the system's exceptions into ours."""
    try:
        yield
    except DynaMaskError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path} {_other_kind(path)}.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} claims more than {MAX_PIXELS} pixels; give a smaller image.") from error
    except MemoryError as error:
        raise DynaMaskError(f"{path} needs more memory than is free; close other programs or give a smaller image.") from error
    except OSError as error:
        # A damaged file makes decoders seek to places that do not exist: EINVAL.
        if error.errno not in (None, errno.EINVAL):
            raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk.") from error
        raise _undecodable(path, error) from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, ValueError, EOFError, struct.error and others on damaged files.
        raise _undecodable(path, error) from error


def _undecodable(path: Path, error: Exception) -> InputError:
    said = first_line(error)
    if "truncated" in said.lower():
        return InputError(f"{path} is truncated ({said}); copy or download it again.")
    return InputError(f"{path} cannot be decoded ({said}): it is damaged, or coded in an unknown way; save it again as JPEG or PNG.")


@contextlib.contextmanager
def _load(path: Path) -> Iterator[tuple[Image.Image, int]]:
    """The open image, with its first frame decoded, and its EXIF orientation, 1 to 8."""
    try:
        image, orientation = _decode(path, path)
    except ValueError as error:
        # Pillow bounds the texts and profiles of a PNG; the picture does not need them.
        if "MAX_TEXT" not in str(error):
            raise
        image, orientation = _decode(path, _png_without_texts(path))
    with image:
        yield image, orientation


def _decode(path: Path, source: Path | BinaryIO) -> tuple[Image.Image, int]:
    with _recorded_warnings() as said:
        image = _open(path, source)
        if image.format == "TIFF":
            # Which reads the metadata too, and applies the orientation.
            _load_pixels(image)
            return image, 1
    _load_pixels(image)
    with _recorded_warnings() as more:
        orientation = _orientation(image)
    if orientation is None and (damage := [text for text in (*said, *more) if "MPO" not in text]):
        _say_once(f"{path}: its metadata (EXIF) are damaged ({damage[0].rstrip('. ')}), so an orientation in them is not applied.")
    return image, orientation or 1


def _upright(image: Array, orientation: int) -> Array:
    if orientation == 1:
        return image
    rows, columns = _MIRRORED[orientation]
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image[:: -1 if rows else 1, :: -1 if columns else 1])


def _open(path: Path, source: Path | BinaryIO) -> Image.Image:
    """Identify the image and check its size; nothing is decoded."""
    formats = (*_FORMATS, "TGA") if path.suffix.lower() == ".tga" else _FORMATS
    Image.init()
    image = Image.open(source, formats=[name for name in formats if name in Image.OPEN])
    try:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"{path} is {image.width}x{image.height}, more than {MAX_PIXELS} pixels; give a smaller image.")
        _check_tiff(path, image)
    except BaseException:
        image.close()
        raise
    return image


def _check_tiff(path: Path, image: Image.Image) -> None:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    if _DNG_VERSION in image.tag_v2:
        raise InputError(f"{path} is a camera's raw file (DNG); develop it to JPEG or TIFF first.")
    image.info[_DEPTH] = image.tag_v2.get(_BITS_PER_SAMPLE, (8,))[0]
    if image.mode in ("I", "F"):
        samples = "floating-point samples" if image.mode == "F" else "integers with a sign or of 32 bits"
        raise InputError(f"{path} holds {samples}, whose range is unknown; save it with 8 or 16 bits a sample, without a sign.")


def _load_pixels(image: Image.Image) -> None:
    try:
        image.load()
    except BaseException:
        image.close()
        raise


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, 1 to 8; None without one or where it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception as error:  # Any, on damaged metadata.
        warnings.warn(str(error) or type(error).__name__, stacklevel=1)
        return None
    return value if value in range(1, 9) else None


@contextlib.contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    """Python's warnings in this block become texts in the list; none is printed. Size limits are ours, so those are left out."""
    texts: list[str] = []
    with _WARNINGS, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            left_out = (Image.DecompressionBombWarning, DeprecationWarning, ResourceWarning)
            texts += [str(entry.message) for entry in caught if not issubclass(entry.category, left_out)]


@functools.lru_cache(maxsize=1024)
def _say_once(sentence: str) -> None:
    """Log a warning, once a process: training reads the same files in every epoch."""
    _log.warning(sentence)


def _png_without_texts(path: Path) -> BinaryIO:
    """A PNG file without the chunks that hold compressed texts and profiles."""
    kept = io.BytesIO()
    with path.open("rb") as file:
        kept.write(file.read(8))
        while len(header := file.read(8)) == 8:
            rest = file.read(int.from_bytes(header[:4], "big") + 4)
            if header[4:] not in (b"iTXt", b"zTXt", b"tEXt", b"iCCP"):
                kept.write(header + rest)
    kept.seek(0)
    return kept


def _to_rgb(path: Path, image: Image.Image) -> Array:
    """`[H, W, 3] uint8`, one strip of rows after another, so that the memory never holds all conversions of a large image."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if image.height <= rows:
        return _strip_to_rgb(path, image)
    result = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        result[top:bottom] = _strip_to_rgb(path, image.crop((0, top, image.width, bottom)))
    return result


def _strip_to_rgb(path: Path, image: Image.Image) -> Array:
    if image.mode.startswith("I"):
        return _deep_grey_to_rgb(path, image)
    if image.mode == "F":
        raise InputError(f"{path} holds floating-point samples, whose range is unknown; save it with 8 or 16 bits a sample.")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            opaque = Image.new("RGB", image.size)
            opaque.paste(image, mask=image)
            return np.array(opaque)
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise InputError(f"{path} holds {image.mode} samples, which cannot be converted; save it as 8-bit RGB.") from error


def _deep_grey_to_rgb(path: Path, image: Image.Image) -> Array:
    """Grey of more than 8 bits: scaled by its range, 12 bits where a TIFF says so, else 16."""
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 65535:
        raise InputError(f"{path} holds samples outside 0 to 65535, whose range is unknown; save it with 8 or 16 bits a sample.")
    largest = 4095 if image.info.get(_DEPTH) == 12 else 65535
    # A table keeps large images from taking eight bytes a sample meanwhile.
    table = ((np.minimum(np.arange(65536), largest) * 255 + largest // 2) // largest).astype(np.uint8)
    return np.repeat(table[grey][..., None], 3, axis=2)


def _other_kind(path: Path) -> str:
    """For a file that is no image of a known format: what it is instead and what to do, as the rest of a sentence."""
    with path.open("rb") as file:
        head = file.read(1024)
    if re.match(rb".{4}ftypavi[fs]", head, re.DOTALL) and "AVIF" not in Image.OPEN:
        return "is an AVIF image, which this Pillow cannot read; install a newer Pillow or convert the image to PNG"
    for pattern, sentence in (*_FOREIGN_KINDS, *_OTHER_IMAGES):
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return sentence
    return "is not an image in a format that is known here; give a JPEG, PNG, WebP, TIFF or BMP"


def foreign_kind(head: bytes) -> str | None:
    """For the beginning of a file that is neither image nor video: what it is instead and what to do, as the rest of a sentence."""
    return next((sentence for pattern, sentence in _FOREIGN_KINDS if re.match(pattern, head, re.DOTALL | re.IGNORECASE)), None)


_DAMAGED = "begins as {} does, and is damaged, truncated or of a rare kind; copy it again, or save it as JPEG or PNG"
_FOREIGN_KINDS = [
    (rb"$", "is empty; copy or download it again"),
    (rb".{128}DICM", "is a medical image (DICOM); convert it to PNG"),
    (rb"\0{64}", "begins with zeros only, as after an interrupted copy; copy or download it again"),
    (rb"\s*(<\?xml.*)?<svg\b", "is a drawing (SVG); export it to PNG"),
    (rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head|<\?xml.*<html)", "is a web page under another name; download the file itself"),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself; run git lfs pull"),
    (rb"%PDF|%!PS|8BPS", "is a document of pages or layers (PDF, PostScript or PSD); export it to PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "is an archive; unpack it"),
]
"""Beginning of a file that is neither image nor video -> the sentence's end."""
_OTHER_IMAGES = [
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "is a HEIC image, which cannot be read here; convert it to JPEG"),
    (rb".{4}ftypcrx|FUJIFILMCCD-RAW|IIR[OS]|IIU\0", "is a camera's raw file; develop it to JPEG or TIFF first"),
    (rb"(\xff\x0a|\0\0\0\x0cJXL )", "is a JPEG XL image, which cannot be read here; convert it to JPEG or PNG"),
    (rb".{4}ftypavi[fs]", _DAMAGED.format("an AVIF")),
    (rb".{4}(ftyp|moov|mdat)|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV|\0\0\x01[\xb3\xba]", "is a video; run dynamask stream on it"),
    (rb"\x89PNG", _DAMAGED.format("a PNG")),
    (rb"\xff\xd8\xff", _DAMAGED.format("a JPEG")),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", _DAMAGED.format("a TIFF")),
    (rb"GIF8", _DAMAGED.format("a GIF")),
    (rb"RIFF.{4}WEBP", _DAMAGED.format("a WebP")),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", _DAMAGED.format("a JPEG 2000")),
]
"""Beginning of an image that cannot be read, or of a video -> the sentence's end."""
