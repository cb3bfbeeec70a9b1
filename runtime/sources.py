"""Where frames come from: a video file, or a folder of images."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import InputError

if TYPE_CHECKING:
    import av

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
FOLDER_FRAME_RATE = Fraction(10)
"""Frames a second that a folder of images is played at: images carry no time of their own."""


@dataclass(frozen=True)
class Frame:
    """One picture of a source."""

    index: int
    """Its place in the source, from 0; frames that could not be decoded leave gaps."""
    time_s: float
    """Seconds since the source's first frame."""
    image: npt.NDArray[np.uint8]
    """`[H, W, 3] uint8` RGB, upright."""
    name: str | None = None
    """The file's name, for a folder of images."""


class Source(Protocol):
    """Frames in order, decoded while they are iterated over. A source is iterated once, then closed.

    `frame_rate` is in frames a second, `size` is the first frame's `(height, width)`, `frame_count` what the source announces, if it does.
    `broken` counts the frames met so far that could not be decoded and were left out, `missing` those announced but absent at the end.
    """

    path: Path
    frame_rate: Fraction
    size: tuple[int, int]
    frame_count: int | None
    broken: int
    missing: int

    def __iter__(self) -> Iterator[Frame]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Source: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a video file, a folder of images (read in the order of their names) or a single image.

    Raises:
        InputError: it is missing, empty, neither video nor images, or not one of its frames can be decoded.

    Example:
        >>> import dynamask
        >>> with dynamask.open_source(clip) as source:
        ...     sizes = {frame.image.shape[:2] for frame in source}
        >>> sizes == {source.size}
        True
    """
    path = Path(path)
    if path.is_dir():
        return ImageSource(path, image_files(path))
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a video file or a folder of images.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; give a video file or a folder of images.")
    return ImageSource(path, [path]) if path.suffix.lower() in IMAGE_SUFFIXES else VideoSource(path)


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, in the order of their names.

    Raises:
        InputError: there are none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); give a folder of images or a video file.")
    return files


class _OpenedOnFirstFrame(abc.ABC):
    """A source that decodes its first frame when it is opened, so that a bad file is refused before anything else starts."""

    path: Path
    frame_rate: Fraction
    frame_count: int | None = None

    def __init__(self) -> None:
        self.broken = 0
        self.missing = 0
        self._decoded = self._decode()
        try:
            first = next(self._decoded, None)
        except BaseException:
            self.close()
            raise
        if first is None:
            self.close()
            raise InputError(f"{self.path}: none of its frames can be decoded; it is damaged or truncated, give another file.")
        self._first: Frame | None = first
        self.size: tuple[int, int] = (first.image.shape[0], first.image.shape[1])

    def __iter__(self) -> Iterator[Frame]:
        first, self._first = self._first, None
        if first is not None:
            yield first
        del first
        yield from self._decoded

    @abc.abstractmethod
    def _decode(self) -> Iterator[Frame]:
        """All frames that can be decoded, from the first."""

    def close(self) -> None:  # noqa: B027
        """Free what the source holds open."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class ImageSource(_OpenedOnFirstFrame):
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


class VideoSource(_OpenedOnFirstFrame):
    """The first video stream of a file, decoded by FFmpeg's threads, turned upright by the rotation in its metadata."""

    def __init__(self, path: Path) -> None:
        import av

        self.path = path
        try:
            # "file:" keeps a colon in the name from being read as a protocol.
            self._container = av.open(f"file:{path}")
        except (av.FFmpegError, OSError) as error:
            raise InputError(
                f"{path} cannot be opened as a video ({error.strerror}); it is truncated or no video: give a video file."
            ) from error
        # FFmpeg "plays" any text file as a terminal recording.
        if not self._container.streams.video or self._container.format.name == "tty":
            self._container.close()
            raise InputError(f"{path} holds no video; give a video file or a folder of images.")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        rate = self._stream.average_rate or self._stream.guessed_rate or FOLDER_FRAME_RATE
        self.frame_rate = Fraction(rate.numerator, rate.denominator)
        self.frame_count = self._stream.frames or self._count_from_duration()
        super().__init__()

    def _count_from_duration(self) -> int | None:
        duration = self._container.duration  # microseconds
        return None if not duration else max(1, round(duration * self.frame_rate / 1_000_000))

    def _decode(self) -> Iterator[Frame]:
        yielded = discarded = 0
        start: float | None = None
        for packet in self._packets():
            discarded += bool(packet.is_discard)
            for decoded in self._frames_of(packet):
                index = yielded + self.broken
                time = decoded.time if decoded.time is not None else float(index / self.frame_rate)
                start = time if start is None else start
                yield Frame(index, time - start, _upright(decoded))
                yielded += 1
        self._count_missing(yielded + discarded)

    def _packets(self) -> Iterator[av.Packet[Any]]:
        import av

        try:
            yield from self._container.demux(self._stream)
        except (av.FFmpegError, OSError):
            # The file ends amid a packet: what stands before it is still worth having, what follows is counted as missing.
            self.broken += 1

    def _frames_of(self, packet: av.Packet[Any]) -> Iterator[av.VideoFrame]:
        import av

        if packet.is_corrupt:
            self.broken += 1
            return
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError):
            self.broken += 1
            return
        for frame in frames:
            assert isinstance(frame, av.VideoFrame)
            if frame.is_corrupt:
                self.broken += 1
            else:
                yield frame

    def _count_missing(self, seen: int) -> None:
        if self.frame_count is None:
            return
        missing = max(0, self.frame_count - seen - self.broken)
        # A count made from the duration is only rough: less than a second short is not worth a word.
        if self._stream.frames or missing > self.frame_rate:
            self.missing = missing

    def close(self) -> None:
        """Close the file."""
        self._container.close()


def _upright(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    image = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image
