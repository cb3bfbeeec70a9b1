"""Live sources: network cameras, V4L2 devices and standard input, opened by FFmpeg with both timeouts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from runtime.errors import DynaMaskError
from runtime.frames import Frame
from runtime.streams.address import CAMERA, NETWORK, STDIN, Address
from runtime.streams.slot import Arrival
from runtime.video import MAX_FRAME_PIXELS, Clock, as_shown, frame_rate, pixel_aspect, video_stream

if TYPE_CHECKING:
    import av

_PROTOCOLS = {
    "rtsp": "rtsp,rtp,rtcp,tcp,udp",
    "rtsps": "rtsp,rtsps,rtp,rtcp,srtp,tcp,udp,tls,crypto",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmp,rtmps,tcp,tls",
    "http": "http,https,httpproxy,tcp,tls,crypto",
    "https": "http,https,httpproxy,tcp,tls,crypto",
    "udp": "udp,rtp",
}
"""The protocols that FFmpeg may use for a scheme: a playlist from the network opens no file."""
_WINDOW_S = 60.0


class SourceLost(DynaMaskError):
    """A live source could not be opened, or stopped giving frames; it is tried again."""


class LiveSource:
    """One connection to a live source; its frames are not converted before they are taken.

    Args:
        connect_s: seconds after which an attempt to connect is given up.
        stall_s: seconds without a frame after which the connection is given up.
        transport: of RTSP: `tcp` or `udp`.
        hardware: the decoder's device (`cuda`, `vaapi`), or None; where it does not work, the CPU decodes.
        broken: is called for each packet that cannot be decoded.

    Raises:
        SourceLost: it cannot be opened. The message has FFmpeg's reason and no credentials.
    """

    def __init__(
        self,
        address: Address,
        connect_s: float = 5.0,
        stall_s: float = 2.0,
        transport: str = "tcp",
        hardware: str | None = None,
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._address = address
        self._stall_s = stall_s
        self._broken = broken
        self.gaps = 0
        """Frames that the time stamps say are missing."""
        self._container = _open(address, connect_s, stall_s, transport, hardware)
        try:
            self._stream = video_stream(str(address), self._container)
        except BaseException:
            self._container.close()
            raise
        self.frame_rate: Fraction = frame_rate(self._container, self._stream)
        # Slices, not frames: a thread for each frame would hold back two of them.
        self._stream.thread_type = "SLICE"
        self._stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        self._clock = Clock(self.frame_rate, begins_again=True)
        self._offset = _Offset()

    @property
    def bridged(self) -> int:
        """Places where time stamps were absent, did not rise or jumped."""
        return self._clock.bridged

    def arrivals(self, first_index: int, start_s: float) -> Iterator[Arrival]:
        """The frames as they come.

        Args:
            first_index: of the first frame.
            start_s: the first frame's `time_s`.

        Raises:
            SourceLost: no frame came for `stall_s`, or the connection broke.
        """
        previous_s: float | None = None
        for index, decoded in enumerate(self._decoded(), first_index):
            now = time.monotonic()
            time_s = self._clock.time_s(decoded.time)
            if previous_s is not None:
                self.gaps += max(0, round((time_s - previous_s) * float(self.frame_rate)) - 1)
            previous_s = time_s
            captured = time_s + self._offset.least(now, now - time_s)
            yield Arrival(_conversion(decoded, index, start_s + time_s, pixel_aspect(self._stream)), captured)

    def _decoded(self) -> Iterator[av.VideoFrame]:
        import av

        packets = self._container.demux(self._stream)
        last = time.monotonic()
        while True:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError) as error:
                raise SourceLost(reason(error)) from None
            if packet is None:
                return
            try:
                frames = packet.decode()
            except (av.FFmpegError, OSError):
                frames = []
                self._broken()
            for frame in frames:
                assert isinstance(frame, av.VideoFrame)
                if frame.is_corrupt:
                    self._broken()
                else:
                    last = time.monotonic()
                    yield frame
            if time.monotonic() - last > max(self._stall_s, 3 / float(self.frame_rate)):
                raise SourceLost(f"no frame could be decoded for {self._stall_s:g} s")

    def close(self) -> None:
        """Close the connection."""
        self._container.close()

    def __enter__(self) -> LiveSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Offset:
    """The least delay between a frame's time and its arrival over the last one to two minutes: then the frame had waited nowhere.

    A frame that arrives later than that waited in a buffer on its way. The minimum is renewed because the camera's clock runs at its
    own speed.
    """

    def __init__(self) -> None:
        self._began = float("-inf")
        self._before = self._current = float("inf")

    def least(self, now: float, offset: float) -> float:
        if now - self._began > _WINDOW_S:
            self._began, self._before, self._current = now, self._current, offset
        self._current = min(self._current, offset)
        return min(self._before, self._current)


def _conversion(decoded: av.VideoFrame, index: int, time_s: float, aspect: Fraction) -> Callable[[], Frame]:
    return lambda: Frame(index, time_s, as_shown(decoded, aspect))


def _open(address: Address, connect_s: float, stall_s: float, transport: str, hardware: str | None) -> av.container.InputContainer:
    import av

    options: dict[str, str] = {}
    arguments: dict[str, Any] = {"metadata_errors": "replace"}
    place = address.reveal()
    if address.kind == NETWORK:
        options["protocol_whitelist"] = _PROTOCOLS[address.scheme]
        # FFmpeg looks at five seconds of a stream by default before the first frame; the read timeout counts that too.
        options["analyzeduration"] = "500000"
        # The read timeout takes twice its value.
        arguments["timeout"] = (connect_s, stall_s / 2)
        if address.scheme.startswith("rtsp"):
            options["rtsp_transport"] = transport
        if address.scheme == "udp" and "timeout=" not in place:
            # Without it the read of a socket that gets nothing cannot be interrupted.
            place += f"{'&' if '?' in place else '?'}timeout={round(stall_s * 1e6)}&fifo_size=4096&overrun_nonfatal=1"
    elif address.kind == CAMERA:
        arguments["format"] = "v4l2"
    elif address.kind == STDIN:
        place, options["protocol_whitelist"] = "pipe:0", "pipe"
    try:
        if hardware:
            try:
                from av.codec.hwaccel import HWAccel

                return av.open(place, options=options, hwaccel=HWAccel(hardware, allow_software_fallback=True), **arguments)
            except (PermissionError, ValueError, RuntimeError):
                pass  # There is no such device: the CPU decodes.
        return av.open(place, options=options, **arguments)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise SourceLost(reason(error)) from None


def reason(error: Exception) -> str:
    """FFmpeg's reason in a few words. Its own text holds the address with the password, and is never used."""
    import av

    if isinstance(error, (av.ExitError, TimeoutError)):
        return "timed out"
    return getattr(error, "strerror", None) or type(error).__name__
