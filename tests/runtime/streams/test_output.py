"""Outputs: queues, policies, retries, and what is left of a killed process."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from pyarrow import parquet

from runtime.errors import DynaMaskError
from runtime.frames import Frame
from runtime.sinks import Sink
from runtime.streams import output as output_module
from runtime.streams.address import Address
from runtime.streams.output import Output, Result
from runtime.streams.sinks import MqttSink, ParquetSink, PublishSink
from tests.runtime.fake_stream import count_frames, make_instances
from tests.runtime.streams.servers import free_port, rtsp_server, wait_for


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "_PAUSES_S", (0.05, 0.2))


def result(index: int, source: str = "cam", count: int = 3) -> Result:
    frame = Frame(index, index / 25, np.full((64, 96, 3), index % 256, np.uint8), details={"source": source})
    return Result(source, frame, make_instances(count, (64, 96), seed=index))


class Recording(Sink):
    def __init__(self) -> None:
        self.indices: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False

    def write(self, frame: Frame, *_: object) -> None:
        assert self.gate.wait(20)
        self.indices.append(frame.index)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def sink() -> Recording:
    return Recording()


def test_a_slow_sink_drops_the_oldest_results_and_counts_them(sink: Recording) -> None:
    sink.gate.clear()
    output = Output(lambda: sink, "slow", queued=3)
    output.start()
    output.put(result(0))
    wait_for(lambda: output.counts()["queued"] == 0)
    for i in range(1, 11):
        assert output.put(result(i))
    assert (output.dropped, output.counts()["queued"]) == (7, 3)
    sink.gate.set()
    output.end()
    assert output.join(10)
    assert sink.indices == [0, 8, 9, 10]
    assert (output.written, output.dropped, sink.closed) == (4, 7, True)


def test_a_sink_that_hangs_does_not_hold_up_the_end(sink: Recording) -> None:
    sink.gate.clear()
    output = Output(lambda: sink, "hanging")
    output.start()
    output.put(result(0))
    output.end(drain_s=0.05)
    assert not output.join(0.2)
    sink.gate.set()
    assert output.join(10)


def test_after_the_time_to_drain_no_write_begins(sink: Recording) -> None:
    sink.gate.clear()
    output = Output(lambda: sink, "slow")
    output.start()
    for i in range(5):
        output.put(result(i))
    wait_for(lambda: output.counts()["queued"] == 4)
    output.end(drain_s=0.0)
    sink.gate.set()
    assert output.join(10)
    assert (sink.indices, output.dropped) == ([0], 4)


def test_a_sink_that_fails_is_opened_again(sink: Recording) -> None:
    opened = []

    class Failing(Sink):
        def write(self, frame: Frame, *_: object) -> None:
            raise DynaMaskError("rtsp://u:secret@h is full")

    def open_sink() -> Sink:
        opened.append(time.monotonic())
        if len(opened) < 3:
            raise DynaMaskError("it does not open")
        return Failing() if len(opened) == 3 else sink

    output = Output(open_sink, "failing")
    output.start()
    for i in range(6):
        output.put(result(i))
    wait_for(lambda: output.written == 3)
    assert (output.failures, output.dropped, output.error) == (3, 3, None)
    assert sink.indices == [3, 4, 5]
    assert (np.diff(opened) >= 0.05).all()
    output.end()
    assert output.join(10)


def test_results_of_other_streams_are_not_taken(sink: Recording) -> None:
    output = Output(lambda: sink, "one", {"cam"})
    output.start()
    assert output.put(result(0, "cam"))
    assert output.put(result(1, "other"))
    output.end()
    assert output.join(10)
    assert sink.indices == [0]


KILLED = """
import os, sys, time
from fractions import Fraction
from pathlib import Path
from runtime.sinks import JsonLinesSink, VideoSink
from tests.runtime.streams.test_output import result
folder = Path(sys.argv[1])
sinks = [VideoSink(folder / "o.mp4", Fraction(25), live=True), JsonLinesSink(folder / "o.jsonl")]
i = 0
while True:
    one = result(i)
    for sink in sinks:
        sink.write(one.frame, one.instances)
    i += 1
    if i == 110:
        print("ready", flush=True)
"""


def test_a_killed_process_loses_two_seconds_of_video_and_no_whole_line(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    [video], [lines] = tmp_path.glob("o.*.partial.mp4"), tmp_path.glob("o.*.partial.jsonl")
    whole = [json.loads(line) for line in lines.read_bytes().split(b"\n")[:-1]]
    assert [line["index"] for line in whole] == list(range(len(whole)))
    assert len(whole) >= 110
    assert len(whole) - 50 <= count_frames(video) <= len(whole) + 1


def test_parquet_parts_are_readable_before_the_end(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path, part_s=0.0)
    for i in range(2):
        sink.write(result(i).frame, result(i).instances)
    parts = sorted(tmp_path.iterdir())
    rows = [row for part in parts for row in parquet.read_table(part).to_pylist()]
    assert len(parts) == 2
    assert [(row["source"], row["index"]) for row in rows] == [("cam", 0)] * 3 + [("cam", 1)] * 3
    expected = result(1).instances
    assert [row["grid"] for row in rows[3:]] == expected.grids.tolist()
    assert rows[3]["mask"] == expected.to_coco(1)[0]["segmentation"]["counts"]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed")
    port = free_port()
    (tmp_path / "m.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    process = subprocess.Popen([program, "-c", str(tmp_path / "m.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listens() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            return False
        return True

    wait_for(listens)
    yield port, process
    process.kill()
    process.wait()


def test_mqtt_messages_are_lines_of_json(broker: tuple[int, subprocess.Popen[bytes]]) -> None:
    got: list[tuple[str, dict[str, object]]] = []
    listener = mqtt.Client(CallbackAPIVersion.VERSION2)
    listener.on_message = lambda client, data, message: got.append((message.topic, json.loads(message.payload)))
    listener.connect("127.0.0.1", broker[0])
    listener.subscribe("site/#")
    listener.loop_start()
    time.sleep(0.2)
    sink = MqttSink(Address(f"mqtt://127.0.0.1:{broker[0]}/site"))
    sink.write(result(7).frame, result(7).instances)
    wait_for(lambda: got)
    sink.close()
    listener.disconnect()
    listener.loop_stop()
    assert got[0][0] == "site/cam"
    assert got[0][1]["index"] == 7


def test_a_broker_that_goes_away_is_counted_and_stops_nobody(broker: tuple[int, subprocess.Popen[bytes]]) -> None:
    port, process = broker
    output = Output(lambda: MqttSink(Address(f"mqtt://u:secret@127.0.0.1:{port}/site")), "mqtt", queued=4)
    output.start()
    output.put(result(0))
    wait_for(lambda: output.written == 1)
    process.kill()
    process.wait()

    def failed() -> bool:
        output.put(result(1))
        return output.failures > 0

    wait_for(failed)
    wait_for(lambda: "cannot be reached" in (output.error or "") or output.put(result(2)) is None)
    assert "secret" not in (output.error or "")
    output.end(drain_s=0.2)
    assert output.join(10)


def test_a_published_video_arrives(tmp_path: Path) -> None:
    with rtsp_server("record", str(tmp_path / "got.ts")) as port:
        sink = PublishSink(Address(f"rtsp://127.0.0.1:{port}/cam"), Fraction(25))
        for i in range(60):
            sink.write(result(i).frame, result(i).instances)
        time.sleep(0.5)
        sink.close()
        wait_for(lambda: (tmp_path / "got.ts").stat().st_size > 0)
        time.sleep(0.3)
    assert count_frames(tmp_path / "got.ts") >= 30


def test_a_server_that_takes_no_video_is_an_error_without_the_password() -> None:
    sink = PublishSink(Address(f"rtsp://u:secret@127.0.0.1:{free_port()}/cam"), Fraction(25))
    with pytest.raises(DynaMaskError, match="does not take the video") as caught:
        sink.write(result(0).frame, result(0).instances)
    assert "secret" not in str(caught.value)
