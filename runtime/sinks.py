"""Where the results of a stream go: an annotated video, JSON lines, a folder of annotated images."""

from __future__ import annotations

import abc
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtime.annotate import annotate
from runtime.errors import DynaMaskError, InputError
from runtime.files import Output, atomic_path, failure, input_path, is_special, unwritable

if TYPE_CHECKING:
    import av

    from runtime.frames import Frame
    from runtime.instances import Instances

Image = npt.NDArray[np.uint8]
_TICKS = 90_000
"""Time stamps per second in the written video, as usual for MPEG."""
_LONGEST_GAP = 2 * 3600 * _TICKS
"""MP4 holds steps of up to 2^31 time stamps, and the encoder's reordering adds up three of ours."""
_LONGEST_SIDE = 16_384
"""The largest width and height that x264 encodes, in pixels."""


class Sink(abc.ABC):
    """Takes the result of every frame, in order. As a context manager it is finished when the block ends well, else abandoned.

    Until a sink is finished, its output has a provisional name: an unfinished file is kept, and is not mistaken for a whole one.
    """

    @abc.abstractmethod
    def write(self, frame: Frame, instances: Instances) -> None:
        """Take the result of one frame.

        Raises:
            DynaMaskError: it could not be written; earlier output is kept.
        """

    def close(self) -> None:  # noqa: B027
        """Finish: the output takes its final name."""

    def abandon(self) -> None:  # noqa: B027
        """Stop after an error: the output stays, under its provisional name."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()


class JsonLinesSink(Sink):
    """One JSON object a line and frame: `index`, `time_s`, `name`, `times_ms`, `predicted_ms` (where costs were measured), `detections`.

    A detection is a COCO result as `Instances.to_coco` gives it (its `image_id` the frame's index), and `class`, the name of its class.
    Every line is on disk as soon as it is written, in `<stem>.<random>.partial<suffix>` until the end. Into a device, a pipe or an open
    descriptor (`/dev/stdout`, `/dev/fd/3`), lines are written as they come.

    Raises:
        InputError: nothing can be written at `path`.

    Example:
        >>> import dynamask
        >>> with dynamask.load(bundle) as predictor:
        ...     sink = dynamask.JsonLinesSink(folder / "detections.jsonl")
        ...     report = dynamask.run_stream(predictor, dynamask.open_source(clip), [sink])
        >>> len((folder / "detections.jsonl").read_text().splitlines()) == report.frames
        True
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._output = Output(path)
        self._file = self._output.open()

    def write(self, frame: Frame, instances: Instances) -> None:
        line = memoryview(json.dumps(frame_record(frame, instances), allow_nan=False, separators=(",", ":")).encode() + b"\n")
        with _writing(self._output):
            if self._output.straight:
                self._write(line)
                return
            whole = self._file.tell()
            try:
                self._write(line)
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(whole)
                raise

    def _write(self, line: memoryview) -> None:
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        with _writing(self._output):
            self._file.close()
            self._output.commit()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._output.keep()


def frame_record(frame: Frame, instances: Instances) -> dict[str, Any]:
    """A frame's line of JSON: see `JsonLinesSink`."""
    return {
        "index": frame.index,
        "time_s": round(frame.time_s, 6),
        "name": frame.name,
        **frame.details,
        "times_ms": _rounded(instances.times_ms),
        **({"predicted_ms": _rounded(instances.predicted_ms)} if instances.predicted_ms else {}),
        "detections": detections(instances, frame.index),
    }


def detections(instances: Instances, image_id: int) -> list[dict[str, Any]]:
    """The instances as COCO results, each with its class's name and its grid."""
    results = instances.to_coco(image_id)
    return [{**result, "class": instances.classes[label].name} for result, label in zip(results, instances.labels.tolist(), strict=True)]


class VideoSink(Sink):
    """An annotated MP4 (H.264, yuv420p), in `<stem>.<random>.partial.mp4` until the end.

    It is written in fragments of a second, so that it can be played if the process is killed; at the end it becomes an ordinary MP4.

    The first frame fixes the size, one pixel larger where that is odd; frames of another size are fitted into it, at the top left.
    A side of more than 16,384 pixels is scaled to that. Frames keep their times, so that frames left out stay gaps, up to two hours.
    MP4 is written with jumps back, so a pipe gets it at the end, from a file in the system's folder for temporary files.

    Args:
        path: the file, with the suffix `.mp4`, or a device, pipe or descriptor.
        frame_rate: frames a second, the source's.
        live: whether frames are encoded at once, by one thread in little memory, for sources that do not end; the file is larger.

    Raises:
        InputError: the file's name does not end with `.mp4`, or nothing can be written there.

    Example:
        >>> import dynamask
        >>> source = dynamask.open_source(clip)
        >>> with dynamask.load(bundle) as predictor:
        ...     report = dynamask.run_stream(predictor, source, [dynamask.VideoSink(folder / "annotated.mp4", source.frame_rate)])
        >>> (folder / "annotated.mp4").exists()
        True
    """

    def __init__(self, path: str | os.PathLike[str], frame_rate: Fraction | float, live: bool = False) -> None:
        import av

        self.path = Path(path)
        self._live = live
        if self.path.suffix.lower() != ".mp4" and not is_special(self.path):
            raise InputError(f"{self.path} is not an MP4 file; give the video a name that ends with .mp4.")
        self._rate = Fraction(frame_rate).limit_denominator(1001)
        self._last = -1
        self._cut = 0
        self._next_key = 0
        self._stream: av.VideoStream | None = None
        self._output = Output(path)
        # FFmpeg writes through this file: it knows no file names, whose colons and bytes it would interpret.
        self._file = self._output.path.open("wb", buffering=0)
        options = {"movflags": "hybrid_fragmented+frag_keyframe+delay_moov", "flush_packets": "1"}
        self._container = av.open(self._file, "w", format="mp4", options=options)

    def write(self, frame: Frame, instances: Instances) -> None:
        import av

        with _writing(self._output):
            image = annotate(frame.image, instances, score=0.0)
            if self._stream is None:
                self._stream = self._open_stream(*_encodable_size(*image.shape[:2]))
            picture = av.VideoFrame.from_ndarray(fit(even(image), self._stream.height, self._stream.width), format="rgb24")
            picture.time_base = Fraction(1, _TICKS)
            self._last = picture.pts = self._next_tick(frame.time_s)
            if self._last >= self._next_key:
                # A fragment begins at each key frame: a killed process loses what came after the last one.
                picture.pict_type = av.video.frame.PictureType.I
                self._next_key = self._last + _TICKS
            self._container.mux(self._stream.encode(picture))

    def _next_tick(self, time_s: float) -> int:
        ticks = max(self._last + 1, round(time_s * _TICKS) - self._cut)
        excess = max(0, ticks - self._last - _LONGEST_GAP)
        self._cut += excess
        return ticks - excess

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        options = {"preset": "veryfast", "crf": "20", **({"tune": "zerolatency"} if self._live else {})}
        stream = self._container.add_stream("libx264", rate=self._rate, options=options)
        if self._live:
            stream.codec_context.thread_count = 1
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, _TICKS)
        return stream

    def close(self) -> None:
        with _writing(self._output):
            self._end()
            if self._stream is None:
                self._output.discard()
            else:
                self._output.commit()

    def abandon(self) -> None:
        # The video is ended, so that it can be played; only its name stays provisional.
        with contextlib.suppress(DynaMaskError), _writing(self._output):
            self._end()
        self._output.keep()

    def _end(self) -> None:
        try:
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
        finally:
            try:
                self._container.close()
            finally:
                self._file.close()


class FolderSink(Sink):
    """Annotated frames as `000000.jpg`, … by the frame's index, each of them whole.

    Args:
        folder: made if it is not there.

    Example:
        >>> import dynamask
        >>> with dynamask.load(bundle) as predictor:
        ...     report = dynamask.run_stream(predictor, dynamask.open_source(clip), [dynamask.FolderSink(folder / "frames")])
        >>> sorted(path.name for path in (folder / "frames").iterdir())[0]
        '000000.jpg'
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = input_path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file already; choose another folder.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def write(self, frame: Frame, instances: Instances) -> None:
        import cv2

        image = annotate(frame.image, instances, score=0.0)
        _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 92])
        with atomic_path(self.folder / f"{frame.index:06d}.jpg") as temporary:
            temporary.write_bytes(encoded.tobytes())


def _encodable_size(height: int, width: int) -> tuple[int, int]:
    """Even, as yuv420p needs them, and no side larger than x264 encodes."""
    scale = min(1.0, _LONGEST_SIDE / max(height, width))
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    return height + height % 2, width + width % 2


def even(image: Image) -> Image:
    """Height and width even, as yuv420p needs them, by repeating the last row and column."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else image


def fit(image: Image, height: int, width: int) -> Image:
    """Scaled by one factor into `height` × `width`, at the top left, the rest black."""
    from runtime.preprocess import letterbox_scale, resize

    if image.shape[:2] == (height, width):
        return image
    scale, rows, columns = letterbox_scale(image.shape[0], image.shape[1], height, width)
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    canvas[:rows, :columns] = resize(image, rows, columns, scale)
    return canvas


def _rounded(times_ms: Mapping[str, float]) -> dict[str, float]:
    return {part: round(ms, 3) for part, ms in times_ms.items()}


@contextlib.contextmanager
def _writing(output: Output) -> Iterator[None]:
    """Turn the system's or FFmpeg's error for a failed write into the project's."""
    import av

    try:
        yield
    except (OSError, av.FFmpegError) as error:
        # An error that is not the system's comes from the encoder, or from this code.
        otherwise = "choose another place" if isinstance(error, OSError) else "please report it, with the source"
        cause, way_out = failure(OSError(error.errno, error.strerror), otherwise)
        partial = output.keep()
        kept = "" if partial is None else f": what was written is in {partial}"
        raise DynaMaskError(f"{output.destination} could not be written ({cause}){kept}; {way_out}.") from error
