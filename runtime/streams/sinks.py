"""Sinks for streams that do not end: Parquet in closed parts, MQTT, a published video, a Python callback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.annotate import annotate
from runtime.errors import DynaMaskError, InputError
from runtime.files import atomic_path
from runtime.sinks import Sink, even, fit, frame_record
from runtime.streams.address import Address
from runtime.streams.live import reason

if TYPE_CHECKING:
    import av

    from runtime.frames import Frame
    from runtime.instances import Instances

_PART_ROWS, _PART_S = 50_000, 60.0
_MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_CONNECT_S = 5.0


class CallbackSink(Sink):
    """Calls a function with each frame and its instances."""

    def __init__(self, call: Callable[[Frame, Instances], object]) -> None:
        self._call = call

    def write(self, frame: Frame, instances: Instances) -> None:
        self._call(frame, instances)


class ParquetSink(Sink):
    """One row an instance, in a folder of Parquet files that are closed every minute: a killed process loses the last minute.

    Columns: `source`, `index`, `time_s`, `class`, `score`, `x`, `y`, `width`, `height` (of the box, in pixels), `grid`, `image_height`,
    `image_width`, `mask` (compressed RLE counts, null without a mask).

    Raises:
        InputError: pyarrow is not installed.
    """

    def __init__(self, folder: Path, part_s: float = _PART_S) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise InputError("pyarrow is not installed; install it with pip install -e '.[streams]' in the checkout.") from error
        self._folder, self._part_s = folder, part_s
        self._rows: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._parts = 0

    def write(self, frame: Frame, instances: Instances) -> None:
        height, width = instances.size
        for result in frame_record(frame, instances)["detections"]:
            mask = result["segmentation"]
            self._rows.append(
                {
                    "source": frame.details.get("source"),
                    "index": frame.index,
                    "time_s": frame.time_s,
                    "class": result["class"],
                    "score": result["score"],
                    **dict(zip(("x", "y", "width", "height"), result["bbox"], strict=True)),
                    "grid": result["grid"],
                    "image_height": height,
                    "image_width": width,
                    "mask": mask and mask["counts"],
                }
            )
        if len(self._rows) >= _PART_ROWS or time.monotonic() - self._began >= self._part_s:
            self.close()

    def close(self) -> None:
        """Write what has come since the last part."""
        import pyarrow
        from pyarrow import parquet

        rows, self._rows, self._began = self._rows, [], time.monotonic()
        if rows:
            self._parts += 1
            name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{self._parts:06d}.parquet"
            with atomic_path(self._folder / name) as path:
                parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def abandon(self) -> None:
        self.close()


class MqttSink(Sink):
    """Publishes each frame's line of JSON at `<path of the URL, or dynamask>/<name of the stream>`.

    Args:
        address: `mqtt://[user:password@]host[:port][/topic]`, or `mqtts://`.

    Raises:
        InputError: paho-mqtt is not installed.
        DynaMaskError: the broker cannot be reached, or it refuses the login.
    """

    def __init__(self, address: Address) -> None:
        try:
            from paho.mqtt import client as mqtt
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError as error:
            raise InputError("paho-mqtt is not installed; install it with pip install -e '.[streams]' in the checkout.") from error
        from urllib.parse import unquote, urlsplit

        parts = urlsplit(address.reveal())
        self._address = address
        self._topic = parts.path.strip("/") or "dynamask"
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.max_queued_messages_set(100)
        self._client.connect_timeout = _CONNECT_S
        if parts.username:
            self._client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        if address.scheme == "mqtts":
            self._client.tls_set()
        try:
            self._client.connect(parts.hostname or "", parts.port or _MQTT_PORTS[address.scheme], keepalive=10)
        except OSError as error:
            raise DynaMaskError(f"{address} cannot be reached ({error.strerror or type(error).__name__}); check the broker.") from None
        self._client.loop_start()
        end = time.monotonic() + _CONNECT_S
        while not self._client.is_connected():
            if time.monotonic() > end:
                self.abandon()
                raise DynaMaskError(f"{address} did not accept the connection; check the login and the broker.")
            time.sleep(0.01)

    def write(self, frame: Frame, instances: Instances) -> None:
        if not self._client.is_connected():
            raise DynaMaskError(f"{self._address} is not connected; check the broker.")
        text = json.dumps(frame_record(frame, instances), allow_nan=False, separators=(",", ":"))
        self._client.publish(f"{self._topic}/{frame.details.get('source', 'stream')}", text)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def abandon(self) -> None:
        self.close()


class PublishSink(Sink):
    """Publishes the annotated video at an RTSP or RTMP server (H.264, no delay by reordering).

    The first frame fixes the size; frames of another size are fitted into it.

    Raises:
        DynaMaskError: the server cannot be reached or has broken the connection.
    """

    def __init__(self, address: Address, frame_rate: Fraction) -> None:
        self._address, self._rate = address, frame_rate.limit_denominator(1001)
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._last = -1

    def write(self, frame: Frame, instances: Instances) -> None:
        import av

        image = even(annotate(frame.image, instances, score=0.0))
        try:
            if self._container is None or self._stream is None:
                self._open(*image.shape[:2])
            assert self._container is not None
            assert self._stream is not None
            picture = av.VideoFrame.from_ndarray(fit(image, self._stream.height, self._stream.width), format="rgb24")
            picture.time_base = Fraction(1, 90_000)
            self._last = picture.pts = max(self._last + 1, round(frame.time_s * 90_000))
            self._container.mux(self._stream.encode(picture))
        except (av.FFmpegError, OSError) as error:
            raise DynaMaskError(f"{self._address} does not take the video ({reason(error)}); check the server.") from None

    def _open(self, height: int, width: int) -> None:
        import av

        rtsp = self._address.scheme.startswith("rtsp")
        options = {"rtsp_transport": "tcp", "timeout": "5000000"} if rtsp else {"rw_timeout": "5000000"}
        self._container = av.open(self._address.reveal(), "w", format="rtsp" if rtsp else "flv", options=options)
        self._stream = self._container.add_stream(
            "libx264", rate=self._rate, options={"preset": "veryfast", "tune": "zerolatency", "g": "25"}
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.time_base = self._stream.codec_context.time_base = Fraction(1, 90_000)
        self._stream.codec_context.thread_count = 1

    def close(self) -> None:
        import contextlib

        import av

        container, self._container = self._container, None
        if container is not None:
            with contextlib.suppress(av.FFmpegError, OSError):
                container.close()

    def abandon(self) -> None:
        self.close()
