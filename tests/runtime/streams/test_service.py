"""Configurations, services and results in Python, and their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import dynamask
from runtime.errors import DynaMaskError, InputError
from runtime.frames import Frame
from runtime.streams.address import Address
from runtime.streams.config import ServiceSettings, load_settings
from runtime.streams.pipeline import ENGINE_FAILURES, Pipeline
from runtime.streams.reader import Reader, SourceSettings
from runtime.streams.service import Service
from tests.runtime.fake_stream import FakePredictor, count_frames, make_instances, write_video
from tests.runtime.streams.servers import free_port, rtsp_server, wait_for


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("streams:\n  - source: a.mp4\n  - source: rtsp://u:secret@h/x\n    stall_s: -1\n", r"line 4: streams\.2\.stall_s is wrong"),
        ("streams:\n  - source: gopher://u:secret@h/x\n", r"line 2: streams\.1\.source is wrong \(gopher:// addresses"),
        ("streams:\n  - source: rtsp://u:secret@/x\n", r"line 2: streams\.1\.source is wrong \(rtsp://\*\*\*@/x names no host"),
        ("streams:\n  - sauce: rtsp://u:secret@h/x\n", r"line 2: (the field .*source is missing|there is no field .*sauce)"),
        ("streams: []\n", r"line 1: streams is wrong"),
        ("score: 2\nstreams:\n  - source: a.mp4\n", r"line 1: score is wrong"),
        ("streams:\n  - source: [rtsp://u:secret@h/x\n", r"line 3 is not valid YAML"),
        ("- rtsp://u:secret@h/x\n", r"line 1: the file is wrong"),
        ("", r"line 1: the file is wrong"),
        ("streams:\n  - source: a.mp4\noutputs:\n  mqtt: http://u:secret@h\n", r"line 4: outputs\.mqtt is wrong"),
    ],
)
def test_a_wrong_configuration_names_its_line_and_no_password(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        load_settings(tmp_path / "s.yaml")
    assert "secret" not in str(caught.value)


def test_a_configuration_gives_each_stream_a_name(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("streams:\n  - {source: a/x.mp4}\n  - {source: b/x.mp4}\n  - {source: c.mp4, name: door}\n")
    assert list(load_settings(tmp_path / "s.yaml").named_streams()) == ["x", "x-2", "door"]


def test_the_settings_of_a_source_are_printed_without_it() -> None:
    settings = ServiceSettings.model_validate({"streams": [{"source": "rtsp://u:secret@h/x"}], "outputs": {"mqtt": "mqtt://u:secret@h"}})
    assert "secret" not in repr(settings)


def test_files_at_once_give_what_they_give_alone(example_files: dict[str, Any]) -> None:
    with dynamask.load(example_files["bundle"]) as predictor, dynamask.open_source(example_files["clip"]) as source:
        alone = [predictor(frame.image, min_score=0.3) for frame in source]
    with dynamask.stream(example_files["bundle"], [example_files["clip"]] * 3) as results:
        found = list(results)
    for name in ("clip", "clip-2", "clip-3"):
        mine = [result for result in found if result.source == name]
        assert [result.frame.index for result in mine] == list(range(len(alone)))
        for result, expected in zip(mine, alone, strict=True):
            assert (result.instances.boxes == expected.boxes).all()
            assert (result.instances.masks == expected.masks).all()


def test_leaving_the_block_early_ends_the_streams(example_files: dict[str, Any]) -> None:
    with dynamask.stream(example_files["bundle"], [example_files["clip"]], retry=True) as results:
        next(iter(results))
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("dynamask")])


def test_a_wrong_setting_is_refused(example_files: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="stall_s is wrong"):
        dynamask.stream(example_files["bundle"], ["rtsp://h/x"], stall_s=-1)
    with pytest.raises(InputError, match="gopher"):
        dynamask.stream(example_files["bundle"], ["gopher://h/x"])


def run_files(tmp_path: Path, predictor: FakePredictor, frames: int = 20) -> Service:
    write_video(tmp_path / "in.mp4", frames=frames)
    settings = ServiceSettings.model_validate({"streams": [{"source": str(tmp_path / "in.mp4")}], "outputs": {"jsonl": tmp_path / "out"}})
    service = Service(predictor, settings)  # type: ignore[arg-type]
    service.start()
    assert service.pipeline.wait(30)
    return service


def test_an_engine_that_raises_once_costs_one_frame(tmp_path: Path) -> None:
    service = run_files(tmp_path, FakePredictor(error=RuntimeError("boom"), at=5))
    assert service.end() is None
    report = service.report()
    assert (report["frames"], report["engine_failures"]) == (19, 1)
    assert report["streams"]["in"]["discarded"] == {"engine failed": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "in.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [i for i in range(20) if i != 4]
    assert lines[0]["source"] == "in"


def test_an_engine_that_always_raises_ends_the_service(tmp_path: Path) -> None:
    class Broken(FakePredictor):
        def __call__(self, *_: object, **__: object):  # type: ignore[no-untyped-def]
            raise DynaMaskError("no device")

    service = run_files(tmp_path, Broken())
    assert isinstance(service.end(), DynaMaskError)
    assert service.pipeline.engine_failures == ENGINE_FAILURES


def test_a_hanging_engine_is_unhealthy_and_does_not_hold_up_the_end(tmp_path: Path) -> None:
    release = threading.Event()
    changed = threading.Condition()
    reader = Reader(Address(write_video(tmp_path / "in.mp4")), SourceSettings(), changed, "in")

    def hang(name: str, frame: Frame, age_s: float):  # type: ignore[no-untyped-def]
        release.wait(30)
        return frame, make_instances(0, (64, 96))

    pipeline = Pipeline([reader], hang, [], changed, service=True)
    pipeline.start()
    wait_for(lambda: pipeline.waiting() == 4)
    assert pipeline.healthy(seconds=60)
    wait_for(lambda: not pipeline.healthy(seconds=0.1))
    pipeline.stop()
    began = time.monotonic()
    pipeline.finish(0.5, 1.0)
    # What a service promises: it ends within two seconds.
    assert time.monotonic() - began < 2
    release.set()


@pytest.mark.parametrize("state", ["start-up", "running", "retrying"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_in_every_state(tmp_path: Path, example_files: dict[str, Any], state: str, number: int) -> None:
    if state == "running":
        with rtsp_server("live") as port:
            check_signal(tmp_path, example_files["bundle"], f"rtsp://u:s3cret@127.0.0.1:{port}/cam", state, number)
        assert count_frames(tmp_path / "video" / "127.0.0.1-cam.mp4") > 0
        assert json.loads((tmp_path / "lines" / "127.0.0.1-cam.jsonl").read_text().splitlines()[0])["source"] == "127.0.0.1-cam"
    else:
        check_signal(tmp_path, example_files["bundle"], f"rtsp://u:s3cret@127.0.0.1:{free_port()}/cam", state, number)


def check_signal(tmp_path: Path, bundle: Path, source: str, state: str, number: int) -> None:
    command = [sys.executable, "-m", "cli.main", "stream", str(bundle), source, "--output", str(tmp_path / "video")]
    command += ["--jsonl", str(tmp_path / "lines"), "--json", str(tmp_path / "report.json")]
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root), "DYNAMASK_TRACEBACK": "1"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=tmp_path, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)
    assert child.stderr is not None
    printed = b""
    if state != "start-up":
        for line in child.stderr:
            printed += line
            if f": {state}".encode() in line or f"{state} in".encode() in line:
                break
        time.sleep(0.7 if state == "running" else 0)
    else:
        time.sleep(0.6)
    began = time.monotonic()
    child.send_signal(number)
    _, rest = child.communicate(timeout=30)
    # The limit for the end of a service, and as much again for a machine that is busy.
    assert time.monotonic() - began < 4
    if state != "start-up":
        assert child.returncode == 128 + number
    written = b"".join([printed, rest, *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())])
    assert b"s3cret" not in written
