"""Opens sources of frames: a video file, an animation, an image, or a folder of images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from runtime.errors import InputError
from runtime.files import input_path, natural_order
from runtime.frames import Frame, OpenedOnFirstFrame, Source
from runtime.video import VideoSource, open_container

IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"},
)
VIDEO_SUFFIXES = frozenset({".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"})
"""Suffixes named in messages; a video is known by its content."""
FOLDER_FRAME_RATE = Fraction(10)
"""Frames per second at which a folder of images is played: images carry no time of their own."""


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a video file, a folder of images (`image_files`), an animation (GIF, APNG, WebP, AVIF) or a single image.

    The content decides, not the suffix. No other file and no network is opened, whatever the content names.

    Raises:
        InputError: it is missing, empty, neither video nor images, or not one of its frames can be decoded.

    Example:
        >>> import dynamask
        >>> with dynamask.open_source(clip) as source:
        ...     sizes = {frame.image.shape[:2] for frame in source}
        >>> sizes == {source.size}
        True
    """
    from runtime.images import is_image, read_image

    check_source(path)
    path = Path(path)
    if path.is_dir():
        return ImageSource(path, image_files(path))
    image = path.suffix.lower() in IMAGE_SUFFIXES
    if image and is_image(path):
        return AnimationSource(path)
    try:
        container = open_container(path)
    except InputError:
        if image:
            read_image(path)  # Which says what the file is instead.
        raise
    if container.format.name in ("gif", "apng", "webp_pipe"):
        container.close()
        return AnimationSource(path)
    return VideoSource(path, container)


def check_source(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot be a source, before anything is opened.

    Raises:
        InputError: it is an address, is missing, is empty, or is neither a file nor a folder.
    """
    # A Path has one slash where the address had two. The address may hold a password: only its scheme is printed.
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", os.fspath(path))
    if address:
        try:
            exists = Path(path).exists()
        except OSError:  # its parts are too long for the name of a file
            exists = False
        if not exists:
            raise InputError(f"{address[1]}:// addresses are not read; give a video file or a folder of images.")
    path = input_path(path)
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist; give a video file or a folder of images.")
        if not (path.is_dir() or path.is_file()):
            raise InputError(f"{path} is a device or a pipe; give a video file or a folder of images.")
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{path} is empty; give a video file or a folder of images.")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a video file or a folder of images.") from error


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, `img2` before `img10`: files with an image's suffix in either case, and links to them.

    Hidden files (whose names begin with a dot, as macOS's `._photo.jpg`), videos and subfolders are left out. A link to nothing is listed,
    so that it is counted as an image that cannot be read.

    Raises:
        InputError: there is none, or the folder cannot be read.
    """
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); check its permissions.") from error
    images = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or not path.exists())]
    if images:
        return natural_order(images)
    if any(path.suffix.lower() in VIDEO_SUFFIXES for path in entries):
        raise InputError(f"{folder} holds videos and no image; give each video by its own path ({folder}/*).")
    if any(path.is_dir() for path in entries):
        raise InputError(f"{folder} holds no image itself, only folders; give one of those.")
    raise InputError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); give a folder of images or a video file.")


class ImageSource(OpenedOnFirstFrame):
    """Image files as frames; an image that cannot be read is left out and counted in `broken`."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.frame_rate = FOLDER_FRAME_RATE
        self.frame_count = len(files)
        self._files = files
        super().__init__()

    def _decode(self) -> Iterator[Frame]:
        from runtime.images import read_image

        for index, file in enumerate(self._files):
            try:
                image = read_image(file)
            except InputError:
                self.broken += 1
                continue
            yield Frame(index, float(index / self.frame_rate), image, file.name)


class AnimationSource(OpenedOnFirstFrame):
    """The frames of an animation with their times; of any other image, its one picture. It ends at a frame that cannot be decoded."""

    def __init__(self, path: Path) -> None:
        from runtime.images import frame_count, read_frames

        self.path = path
        self.frame_count = frame_count(path)
        self._frames = read_frames(path)
        # The first frame's duration stands for all; each frame has its own time.
        first, seconds = next(self._frames)
        self._opening = (first, seconds)
        self.frame_rate = Fraction(1 / seconds).limit_denominator(1001) if self.frame_count != 1 else FOLDER_FRAME_RATE
        super().__init__()

    def _decode(self) -> Iterator[Frame]:
        image, seconds = self._opening
        del self._opening
        time_s, index = 0.0, 0
        while True:
            yield Frame(index, time_s, image)
            time_s, index = time_s + seconds, index + 1
            try:
                image, seconds = next(self._frames)
            except StopIteration:
                return
            except InputError:
                self.broken += 1
                self.missing = max(0, (self.frame_count or 0) - index - 1)
                return

    def close(self) -> None:
        """Close the file."""
        self._frames.close()
