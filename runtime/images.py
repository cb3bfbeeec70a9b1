"""Reads image files into one form: 8-bit RGB, upright."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.errors import InputError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a small file can claim any size."""


def read_image(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Read an image file as `[H, W, 3] uint8` RGB.

    Grey and palette images become RGB, CMYK is converted, 16-bit samples are scaled to 8 bits, transparency is laid over black, and the
    EXIF orientation is applied. Of an animation, the first frame is read.

    Raises:
        InputError: the file is missing, is no image or is truncated, holds floating-point samples, or claims more than `MAX_PIXELS`.

    Example:
        >>> import dynamask
        >>> dynamask.read_image(photo).shape == image.shape
        True
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of an image.")
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images; MAX_PIXELS decides instead.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(path, image)
                return _to_rgb(path, ImageOps.exif_transpose(image))
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image in a format that is known here; give a JPEG, PNG, WebP, TIFF or BMP.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} claims more than {MAX_PIXELS} pixels; give a smaller image.") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others on damaged files.
        raise InputError(f"{path} is damaged or truncated ({error}); replace the file.") from error


def _check_size(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{path} is {image.width}x{image.height}, more than {MAX_PIXELS} pixels; give a smaller image.")


def _to_rgb(path: Path, image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode == "F":
        raise InputError(f"{path} holds floating-point samples, whose range is unknown; save it with 8 or 16 bits a sample.")
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image.convert("RGB"))
