"""Video files as sources of frames, decoded by FFmpeg."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtime.errors import InputError
from runtime.frames import Frame, OpenedOnFirstFrame

if TYPE_CHECKING:
    import av

MAX_FRAME_PIXELS = 40_000_000
"""Videos of larger frames are refused: a decoder holds some ten of them. 8K is 33 million."""
_UNKNOWN_FRAME_RATE = Fraction(25)
_FRAME_RATES = (Fraction(1, 86_400), Fraction(1000))
"""The lowest and the highest frame rate that is believed, in frames per second: from one picture per day to slow motion."""
_PIXEL_ASPECTS = (Fraction(1, 8), Fraction(8))
"""The narrowest and the widest pixel that is believed."""
_JUMP_S, _LONGEST_JUMP_S = 10, 108_000
"""Jumps forward that are bridged, as in ffmpeg: in formats whose clocks begin again (MPEG-TS), and in all others (30 hours)."""
_SMALLEST_STEP_S = 2e-6
"""Frames closer than this have the same time, but for rounding: JSON lines give six digits."""
_NO_TIMESTAMPS, _TS_DISCONT = 0x80, 0x200
"""Flags of FFmpeg's formats: `AVFMT_NOTIMESTAMPS`, `AVFMT_TS_DISCONT` (libavformat/avformat.h)."""
_MP4 = rb".{4}(ftyp|mdat|wide|free|skip)"
"""The beginning of files in the family of MP4."""
_NO_INDEX = "cannot be opened as a video: it is truncated, its index (moov) is missing or damaged; copy or record it again."
_FAULTS_IN_A_ROW = 16
"""After this number of read errors without a packet between them, the rest of a file is not read."""


class VideoSource(OpenedOnFirstFrame):
    """A video file, decoded by FFmpeg's threads; its frames look as players show them.

    Of several video streams the default one is taken, else the largest; pictures attached to it (covers, thumbnails) are none. The display
    matrix turns and mirrors frames. Pixels that are not square are made square by enlarging the frame's shorter-sampled side. Times rise
    from frame to frame: see `Clock`.
    """

    def __init__(self, path: Path, container: av.container.InputContainer | None = None) -> None:
        self.path = path
        self._container = container or open_container(path)
        try:
            self._stream = video_stream(path, self._container)
            self._pixel_aspect = pixel_aspect(self._stream)
            self.frame_rate = frame_rate(self._container, self._stream)
        except BaseException:
            self._container.close()
            raise
        self._stream.thread_type = "AUTO"
        pixels = max(1, self._stream.width * self._stream.height)
        # Every thread holds frames of its own.
        self._stream.codec_context.thread_count = max(1, min(os.cpu_count() or 1, 4 * MAX_FRAME_PIXELS // pixels))
        # Frames may grow in mid-stream.
        self._stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        self.frame_count = self._stream.frames or self._count_from_duration()
        super().__init__()

    def _count_from_duration(self) -> int | None:
        duration = self._container.duration  # microseconds
        return max(1, round(duration * self.frame_rate / 1_000_000)) if duration and duration > 0 else None

    def _decode(self) -> Iterator[Frame]:
        yielded = discarded = 0
        time_s = 0.0
        clock = Clock(self.frame_rate, begins_again=self._has_clock_steps())
        for packet in self._packets():
            discarded += bool(packet.is_discard)
            for decoded in self._frames_of(packet):
                time_s = clock.time_s(decoded.time)
                self.bridged = clock.bridged
                yield Frame(yielded + self.broken, time_s, as_shown(decoded, self._pixel_aspect))
                yielded += 1
        self._count_missing(yielded + discarded, time_s)

    def _has_clock_steps(self) -> bool:
        return bool(self._container.format.flags & _TS_DISCONT)

    def _packets(self) -> Iterator[av.Packet[Any]]:
        """All packets; damage between them is counted and skipped. The last, empty one makes the decoder give its last frames."""
        import av

        faults = 0
        while faults < _FAULTS_IN_A_ROW:
            try:
                for packet in self._container.demux(self._stream):
                    faults = 0
                    yield packet
                return
            except (av.FFmpegError, OSError):
                # Frames before and after the damage are used; frames absent at the end are counted as missing.
                faults += 1
                self.broken += faults == 1
        yield av.Packet()

    def _frames_of(self, packet: av.Packet[Any]) -> Iterator[av.VideoFrame]:
        import av

        # Packets that the container marks as corrupt are decoded too: it marks whole ones where recordings were joined.
        try:
            frames = self._stream.decode(packet)
        except (av.FFmpegError, OSError):
            self.broken += 1
            return
        for frame in frames:
            assert isinstance(frame, av.VideoFrame)
            if frame.is_corrupt:
                self.broken += 1
            else:
                yield frame

    def _count_missing(self, seen: int, last_s: float) -> None:
        """By the frames that the container counts, else by the time it announces: then only a second or more is a finding."""
        if self._stream.frames:
            self.missing = max(0, self._stream.frames - seen - self.broken)
        elif self._container.duration and not self.bridged:
            absent_s = self._container.duration / 1_000_000 - last_s
            self.missing = int(absent_s * self.frame_rate) - self.broken if absent_s > 1 + 1 / self.frame_rate else 0
            self.missing = max(0, self.missing)

    def close(self) -> None:
        """Close the file."""
        self._container.close()


class Clock:
    """Makes times rise from frame to frame, and counts the places where it had to (`bridged`).

    Time starts at 0. A frame without a time stamp, or whose stamp is not after the last frame's, follows the last one at the frame rate.
    Where the clock began again (a step back of more than three frames) or jumped, all that follows is moved by the same amount, so that
    time goes on; after a smaller step, the stamps count again as soon as they have caught up.
    """

    def __init__(self, frame_rate: Fraction, begins_again: bool) -> None:
        self.bridged = 0
        self._step = float(1 / frame_rate)
        self._longest = max(_JUMP_S if begins_again else _LONGEST_JUMP_S, 3 * self._step)
        self._last: float | None = None
        self._offset: float | None = None
        self._bridging = False

    def time_s(self, stamp: float | None) -> float:
        """Seconds since the first frame for the next frame's time stamp in seconds."""
        expected = 0.0 if self._last is None else self._last + self._step
        if stamp is not None and self._offset is None:
            self._offset = expected - stamp
        time_s = expected if stamp is None or self._offset is None else stamp + self._offset
        advance = float("inf") if self._last is None else time_s - self._last
        fault = stamp is None or (self._last is not None and not _SMALLEST_STEP_S <= advance <= self._longest)
        if fault:
            if stamp is not None and not -3 * self._step <= advance < _SMALLEST_STEP_S:
                self._offset = expected - stamp
            time_s = expected
        self.bridged += fault and not self._bridging
        self._bridging = fault
        self._last = time_s
        return time_s


def open_container(path: Path) -> av.container.InputContainer:
    """Open a file through its descriptor: a playlist in it opens nothing else, and any name will do.

    Raises:
        InputError: it cannot be read, or holds nothing that FFmpeg knows.
    """
    import av

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk.") from error
    try:
        # FFmpeg makes a copy of the descriptor, and may open nothing by name. Titles need not be UTF-8.
        return av.open("fd:", options={"fd": str(descriptor), "protocol_whitelist": "fd"}, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(_unopened(path, error)) from error
    finally:
        os.close(descriptor)


def _unopened(path: Path, error: Exception) -> str:
    """The sentence for a file that FFmpeg does not open."""
    with path.open("rb") as file:
        head = file.read(512)
    if re.match(rb"(\xef\xbb\xbf)?\s*(#EXTM3U|ffconcat|\[playlist\]|<\?xml.*<MPD|<MPD)", head, re.DOTALL):
        return f"{path} is a playlist, which names other files; give the video itself."
    if re.match(_MP4, head, re.DOTALL):
        return f"{path} {_NO_INDEX}"
    from runtime.images import foreign_kind

    if (kind := foreign_kind(head)) is not None:
        return f"{path} {kind}."
    reason = getattr(error, "strerror", None) or error
    return f"{path} cannot be opened as a video ({reason}); it is truncated or no video: give a video file."


def _is_cut_mp4(path: Path) -> bool:
    """Whether a box at the top level of an MP4 file ends behind the file's end."""
    place, end = 0, path.stat().st_size
    with path.open("rb") as file:
        while place + 8 <= end:
            file.seek(place)
            size = int.from_bytes(file.read(4), "big")
            if size == 1:  # 64 bits, after the box's type.
                file.seek(place + 8)
                size = int.from_bytes(file.read(8), "big")
            if size < 8:
                return False
            place += size
    return place > end


def video_stream(path: Path | str, container: av.container.InputContainer) -> av.VideoStream:
    """The default video stream, else the one with the largest frames; attached pictures are no video.

    Raises:
        InputError: there is none, or it cannot be decoded.
    """
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & still]
    # FFmpeg "plays" any text file as a terminal recording.
    if not len(container.streams):
        raise InputError(f"{path} holds no stream that can be read: it is truncated or damaged; copy or record it again.")
    unknown = not any(stream.codec_context for stream in container.streams)
    if unknown and "mp4" in container.format.name and Path(path).is_file() and _is_cut_mp4(Path(path)):
        raise InputError(f"{path} {_NO_INDEX}")
    if not streams or container.format.name == "tty":
        kind = "no video, only sound" if container.streams.audio else "no video"
        raise InputError(f"{path} holds {kind}; give a video file or a folder of images.")
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise InputError(f"{path} is coded in a way that this FFmpeg cannot decode; convert it to H.264 in MP4.")
    best = max(known, key=lambda stream: (bool(stream.disposition & Disposition.default), stream.width * stream.height, -stream.index))
    if best.width * best.height > MAX_FRAME_PIXELS:
        raise InputError(f"{path} has frames of {best.width}x{best.height}, more than {MAX_FRAME_PIXELS} pixels; give a smaller video.")
    return best


def frame_rate(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction:
    rates = [stream.average_rate, stream.guessed_rate, stream.base_rate]
    if container.format.flags & _NO_TIMESTAMPS:
        rates = [stream.guessed_rate, *rates]
    low, high = _FRAME_RATES
    return next((Fraction(rate) for rate in rates if rate and low <= rate <= high), _UNKNOWN_FRAME_RATE)


def pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width over height of a pixel as shown, before the display matrix turns it; 1 if unknown or absurd."""
    aspect = stream.sample_aspect_ratio
    low, high = _PIXEL_ASPECTS
    if not aspect or not low <= aspect <= high:
        return Fraction(1)
    pixels = stream.width * stream.height * max(aspect, 1 / aspect)
    return Fraction(aspect) if pixels <= MAX_FRAME_PIXELS else Fraction(1)


def as_shown(frame: av.VideoFrame, pixel_aspect: Fraction = Fraction(1)) -> npt.NDArray[np.uint8]:
    """`[H, W, 3] uint8` RGB with square pixels, turned and mirrored by the frame's display matrix."""
    if pixel_aspect == 1:
        image = frame.to_ndarray(format="rgb24")
    else:
        # Enlarged, never reduced, as browsers do.
        width = round(frame.width * max(pixel_aspect, Fraction(1)))
        height = round(frame.height * max(1 / pixel_aspect, Fraction(1)))
        image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    return _upright(image.astype(np.uint8, copy=False), _display_matrix(frame))


def _display_matrix(frame: av.VideoFrame) -> npt.NDArray[np.int32] | None:
    """`[3, 3] int32` fixed-point, as in the MP4 format (ISO/IEC 14496-12): (x, y, 1) times it is the place shown."""
    try:
        side_data: Any = frame.side_data
    except ValueError:
        # PyAV lists no side data if one of them is of a type that it does not know, such as EXIF. Its rotation leaves out mirroring.
        cos, sin = (round(part(math.radians(frame.rotation))) for part in (math.cos, math.sin))
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.int32)
    data = side_data.get("DISPLAYMATRIX")
    return None if data is None or data.buffer_size < 36 else np.frombuffer(bytes(data)[:36], dtype=np.int32).reshape(3, 3)


def _upright(image: npt.NDArray[np.uint8], matrix: npt.NDArray[np.int32] | None) -> npt.NDArray[np.uint8]:
    """Turned and mirrored as the matrix says, by quarter turns; other angles are rounded to one."""
    if matrix is None:
        return image
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:
        image, across, down = image.transpose(1, 0, 2), c, b
    image = image[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
    return np.ascontiguousarray(image)
