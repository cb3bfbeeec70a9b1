"""Sources that fail and come back: real servers, behind a relay that makes the faults."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from runtime.streams import reader as reader_module
from runtime.streams.address import Address
from runtime.streams.live import LiveSource, SourceLost, _Offset
from runtime.streams.pipeline import Pipeline
from runtime.streams.reader import Reader, SourceSettings
from tests.runtime.fake_stream import make_instances, write_video
from tests.runtime.streams.relay import Relay
from tests.runtime.streams.servers import free_port, rtsp_server, wait_for

Start = Callable[..., tuple[Pipeline, list[Reader]]]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(reader_module, "LONGEST_PAUSE_S", 1.0)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a pipeline that finds nothing; it is stopped afterwards."""
    pipelines = []

    def start(*sources: str | Path, engine_s: float = 0.0, **settings: object) -> tuple[Pipeline, list[Reader]]:
        changed = threading.Condition()
        readers = [
            Reader(Address(source), SourceSettings(**settings), changed, f"cam{i}")  # type: ignore[arg-type]
            for i, source in enumerate(sources)
        ]

        def segment(source, frame, age_s):  # type: ignore[no-untyped-def]
            time.sleep(engine_s)
            return frame, make_instances(0, frame.image.shape[:2])

        pipeline = Pipeline(readers, segment, [], changed, service=True)
        pipeline.start()
        pipelines.append(pipeline)
        return pipeline, readers

    yield start
    for pipeline in pipelines:
        pipeline.stop()
        pipeline.finish(patience_s=5)


def test_a_live_camera_runs(start: Start) -> None:
    with rtsp_server("live") as port:
        pipeline, [camera] = start(f"rtsp://127.0.0.1:{port}/cam")
        wait_for(lambda: pipeline.processed > 20)
        assert camera.state == "running"
        assert camera.frame_rate == 25


def test_a_camera_that_is_down_at_the_start_is_found_later(start: Start) -> None:
    port = free_port()
    _, [camera] = start(f"rtsp://127.0.0.1:{port}/cam")
    wait_for(lambda: camera.state == "retrying")
    assert "refused" in (camera.error or "")
    with rtsp_server("live", port=port):
        wait_for(lambda: camera.state == "running")
        assert camera.error is None


def test_a_killed_server_is_found_again_and_files_lose_no_frame(tmp_path: Path, start: Start) -> None:
    file = write_video(tmp_path / "in.mp4", frames=60)
    port = free_port()
    with rtsp_server("live", port=port):
        _, [camera, clip] = start(f"rtsp://127.0.0.1:{port}/cam", file)
        wait_for(lambda: camera.frames > 5)
    wait_for(lambda: camera.state == "retrying")
    before = camera.frames
    with rtsp_server("live", port=port):
        wait_for(lambda: camera.frames > before + 5)
    assert camera.connections >= 2
    assert (clip.state, clip.frames, dict(clip.discarded)) == ("ended", 60, {"broken": 0, "missing": 0})


def test_a_camera_that_stalls_is_connected_again(start: Start) -> None:
    with serve(transport_stream(96, frames=2000), stall_after=10) as port:
        _, [camera] = start(f"http://127.0.0.1:{port}/live.ts", stall_s=1.0)
        wait_for(lambda: camera.state == "stalled")
        wait_for(lambda: camera.describe().startswith("retrying in "))
        wait_for(lambda: camera.connections >= 3)
    assert camera.frames >= 20


@pytest.mark.parametrize("fault", ["reset", "corrupt", "slow"])
def test_a_fault_of_the_network_is_survived(start: Start, fault: str) -> None:
    with rtsp_server("live") as port:
        relay = Relay(port)
        try:
            _, [camera] = start(f"rtsp://127.0.0.1:{relay.port}/cam", stall_s=2.0)
            wait_for(lambda: camera.frames > 10)
            if fault == "reset":
                relay.reset()
            else:
                relay.mode = fault
            if fault == "reset":
                wait_for(lambda: camera.state == "retrying")
            else:
                time.sleep(0.5)
            relay.mode = "pass"
            before = camera.frames
            wait_for(lambda: camera.frames > before + 10 and camera.state == "running")
        finally:
            relay.close()


@pytest.mark.parametrize(("login", "path", "reason"), [("u:wrong", "cam", "401"), ("u:right", "nothing", "404")])
def test_a_refusal_is_told_without_the_password(
    start: Start, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], login: str, path: str, reason: str
) -> None:
    caplog.set_level(logging.DEBUG)
    with rtsp_server("live", "u:right") as port:
        _, [camera] = start(f"rtsp://{login}@127.0.0.1:{port}/{path}")
        wait_for(lambda: camera.state == "retrying")
    assert reason in (camera.error or "")
    written = "".join([caplog.text, *capfd.readouterr(), str(camera.counts()), repr(camera.address)])
    assert "127.0.0.1" in repr(camera.address)
    assert "wrong" not in written
    assert "right" not in written


def test_a_right_password_opens_the_camera(start: Start) -> None:
    with rtsp_server("live", "u:right") as port:
        _, [camera] = start(f"rtsp://u:right@127.0.0.1:{port}/cam")
        wait_for(lambda: camera.frames > 3)


def test_a_server_that_accepts_and_says_nothing_is_given_up(start: Start) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        _, [camera] = start(f"rtsp://127.0.0.1:{silent.getsockname()[1]}/cam", connect_s=0.3)
        wait_for(lambda: camera.state == "retrying")


def test_stopping_does_not_wait_for_a_stalled_camera(start: Start) -> None:
    with rtsp_server("live") as port:
        relay = Relay(port)
        pipeline, [camera] = start(f"rtsp://127.0.0.1:{relay.port}/cam", stall_s=60)
        wait_for(lambda: camera.frames > 3)
        relay.mode = "stall"
        time.sleep(0.1)
        pipeline.stop()
        began = time.monotonic()
        pipeline.finish(drain_s=0.5, patience_s=1.0)
        # The limit that the issue of stopping has; the reader's thread is left behind.
        assert time.monotonic() - began < 2
        relay.close()
        camera.join(5)


def test_a_camera_faster_than_the_engine_gives_the_newest_frame(start: Start) -> None:
    with rtsp_server("live") as port:
        pipeline, [camera] = start(f"rtsp://127.0.0.1:{port}/cam", engine_s=0.15)
        wait_for(lambda: camera.discarded["replaced"] > 10)
    wait_for(lambda: not len(camera.slot))
    lost = camera.discarded["replaced"] + camera.discarded["too old"]
    assert camera.frames - lost - 1 <= pipeline.processed <= camera.frames - lost


def test_frames_of_a_file_wait_for_a_slow_engine(tmp_path: Path, start: Start) -> None:
    pipeline, [clip] = start(write_video(tmp_path / "in.mp4", frames=20), engine_s=0.01)
    assert pipeline.wait(20)
    assert (pipeline.processed, sum(clip.discarded.values())) == (20, 0)


def test_sources_take_turns(tmp_path: Path, start: Start) -> None:
    file = write_video(tmp_path / "in.mp4", frames=20)
    pipeline, clips = start(file, file, file, engine_s=0.002)
    assert pipeline.wait(20)
    assert pipeline.processed == 60
    assert [clip.frames for clip in clips] == [20, 20, 20]


def test_a_file_can_be_repeated(tmp_path: Path, start: Start) -> None:
    _, [clip] = start(write_video(tmp_path / "in.mp4", frames=5), retry=True)
    wait_for(lambda: clip.frames >= 10)
    assert clip.connections >= 2


def test_pauses_double_up_to_the_longest(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(Reader, "_pause", lambda self, reason, seconds: (pauses.append(seconds), time.sleep(0.01)))
    start(f"rtsp://127.0.0.1:{free_port()}/cam")
    wait_for(lambda: len(pauses) >= 6)
    for pause, expected in zip(pauses, [0.2, 0.4, 0.8, 1.0, 1.0, 1.0], strict=False):
        assert 0.8 * expected <= pause <= 1.2 * expected


@pytest.mark.parametrize(("second", "bridged"), [("same", 1), ("larger", 1)])
def test_a_clock_that_steps_back_and_a_change_of_size_over_http(tmp_path: Path, second: str, bridged: int) -> None:
    """Two MPEG-TS recordings one after the other: the second begins at time 0 again."""
    with serve(transport_stream(96) + transport_stream(96 if second == "same" else 160)) as port:
        source = LiveSource(Address(f"http://127.0.0.1:{port}/x.ts"))
        frames = [arrival.frame() for arrival in source.arrivals(0, 0.0)]
        source.close()
    times = np.array([frame.time_s for frame in frames])
    assert (np.diff(times) > 0).all()
    assert len(frames) >= 18
    assert source.bridged == bridged
    assert frames[-1].image.shape == (64, 96 if second == "same" else 160, 3)


def test_a_playlist_from_the_network_opens_no_file(tmp_path: Path) -> None:
    video = write_video(tmp_path / "in.mp4", frames=5)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{video}\n#EXT-X-ENDLIST\n"
    with serve(playlist.encode()) as port, pytest.raises(SourceLost):
        list(LiveSource(Address(f"http://127.0.0.1:{port}/x.m3u8")).arrivals(0, 0.0))


@pytest.mark.parametrize("content", [b"", b"\0" * 100_000, b"\xff" * 1000])
def test_content_that_is_no_video_is_a_lost_source(content: bytes) -> None:
    from runtime.errors import DynaMaskError

    with serve(content) as port, pytest.raises(DynaMaskError):
        list(LiveSource(Address(f"http://127.0.0.1:{port}/x"), connect_s=1).arrivals(0, 0.0))


def test_an_unknown_decoding_device_falls_back_to_the_cpu(tmp_path: Path) -> None:
    with serve(transport_stream(96)) as port:
        source = LiveSource(Address(f"http://127.0.0.1:{port}/x.ts"), hardware="cuda")
        assert len([arrival.frame() for arrival in source.arrivals(0, 0.0)]) >= 9
        source.close()


def test_the_age_of_a_frame_counts_the_time_in_buffers() -> None:
    # Frames of a camera, each 0.1 s: those from 3 s on come 2 s late.
    offset = _Offset()
    ages = []
    for i in range(60):
        time_s = i / 10
        arrival = 100 + time_s + (2 if i >= 30 else 0)
        ages.append(arrival - (time_s + offset.least(arrival, arrival - time_s)))
    np.testing.assert_allclose(ages, [0] * 30 + [2] * 30, atol=1e-9)


def test_a_camera_whose_clock_is_slow_does_not_grow_old() -> None:
    offset = _Offset()
    for i in range(200_000):
        time_s = i / 10
        arrival = time_s * 1.0001
        age = arrival - (time_s + offset.least(arrival, arrival - time_s))
        assert age < 0.05


def transport_stream(width: int, frames: int = 10) -> bytes:
    """Frames of H.264 as MPEG-TS, from time 0."""
    import io

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=Fraction(10), options={"tune": "zerolatency", "g": "5"})
        stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, width, 3), 20 * i % 256, np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


class serve:
    """An HTTP server that gives one content for any path; may say nothing more after a number of its percent."""

    def __init__(self, content: bytes, stall_after: int = 100) -> None:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        self._ended = ended = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                sent = len(content) * stall_after // 100
                self.wfile.write(content[:sent])
                if sent < len(content):
                    ended.wait(60)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> int:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return int(self._server.server_address[1])

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
