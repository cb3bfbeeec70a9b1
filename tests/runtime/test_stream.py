from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import DynaMaskError
from runtime.frames import Frame
from runtime.policies import Policy
from runtime.sinks import JsonLinesSink, Sink, VideoSink
from runtime.sources import open_source
from runtime.stream import StreamReport, run_stream
from runtime.streams.output import QUEUED_FRAMES
from tests.runtime.fake_stream import GRID_GMACS, FakePredictor, count_frames, write_video


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("dynamask")]


class RecordingSink(Sink):
    """Remembers the frames it got and how it ended; may be slow, may fail at a frame."""

    def __init__(self, seconds: float = 0.0, fail_at: int | None = None) -> None:
        self.indices: list[int] = []
        self.ended = ""
        self._seconds, self._fail_at = seconds, fail_at

    def write(self, frame: Frame, *_: object) -> None:
        if frame.index == self._fail_at:
            raise DynaMaskError("the disk is full")
        time.sleep(self._seconds)
        self.indices.append(frame.index)

    def close(self) -> None:
        self.ended = "closed"

    def abandon(self) -> None:
        self.ended = "abandoned"


def test_a_budget_is_kept_over_the_stream(tmp_path: Path) -> None:
    free, kept = FakePredictor(4), FakePredictor(4, budget_gmacs=0.8)
    for predictor in (free, kept):
        run_stream(predictor, open_source(write_video(tmp_path / "in.mp4", frames=4)), [])
    assert free.budgets == [0.0] * 4
    saved = 4 * 0.8 - kept.costs[0]
    assert kept.budgets[:2] == pytest.approx([0.8, min(max(0.8 + saved / 4, 0.2), 1.4)])


def test_every_frame_of_a_video_arrives_in_order_and_is_reported(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in.mp4", frames=30)
    done: list[int] = []
    sinks = [VideoSink(tmp_path / "out.mp4", 10), JsonLinesSink(tmp_path / "out.jsonl")]
    report = run_stream(FakePredictor(4), open_source(source), sinks, progress=done.append)
    assert count_frames(tmp_path / "out.mp4") == 30
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(30))
    assert set(lines[0]["times_ms"]) == {"preprocess", "detector", "masks", "paste", "total"}
    assert done == list(range(1, 31))
    assert (report.frames, report.broken, report.missing, report.interrupted) == (30, 0, 0, False)
    assert report.fps == pytest.approx(30 / report.seconds)
    grids = [detection["grid"] for line in lines for detection in line["detections"]]
    assert report.instances == len(grids) == 120
    assert report.gmacs == pytest.approx(sum(GRID_GMACS[grid] for grid in grids) / 120)
    assert report.share == {str(grid): grids.count(grid) / 120 for grid in GRID_GMACS}
    assert report.latency_ms["detector"] == {"p50": 2.0, "p95": 2.0, "p99": 2.0, "mean": 2.0}
    assert 0 < report.latency_ms["paste"]["p50"] <= report.latency_ms["total"]["p99"]
    assert report.peak_rss_mb > 20
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("count", [0, 300])
def test_frames_without_and_with_300_instances(tmp_path: Path, count: int) -> None:
    sinks = [VideoSink(tmp_path / "out.mp4", 10), JsonLinesSink(tmp_path / "out.jsonl")]
    report = run_stream(FakePredictor(count), open_source(write_video(tmp_path / "in.mp4", frames=6)), sinks)
    assert (report.frames, report.instances) == (6, 6 * count)
    assert report.gmacs is None if count == 0 else report.gmacs is not None
    assert sum(report.share.values()) == pytest.approx(min(count, 1))


def test_the_score_and_the_limit_hold(tmp_path: Path) -> None:
    sink = RecordingSink()
    report = run_stream(FakePredictor(10), open_source(write_video(tmp_path / "in.mp4")), [sink], score=0.75, limit=7)
    assert sink.indices == list(range(7))
    assert report.instances == 7 * 5
    assert report.missing == 0, "what was not asked for is not missing"


def test_a_truncated_video_is_finished_with_the_frames_it_has(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "in.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    report = run_stream(FakePredictor(), open_source(tmp_path / "cut.mp4"), [VideoSink(tmp_path / "out.mp4", 10)])
    assert 0 < report.frames < 30
    assert count_frames(tmp_path / "out.mp4") == report.frames == 30 - report.broken - report.missing


def test_decoding_inference_and_writing_overlap(tmp_path: Path) -> None:
    """Each frame is written only once the next one is in the predictor: one after the other, that would never come."""
    entered = [threading.Event() for _ in range(31)]
    entered[30].set()

    class Announcing(FakePredictor):
        def __call__(self, *arguments, **options):  # type: ignore[no-untyped-def]
            entered[self.calls].set()
            return super().__call__(*arguments, **options)

    class Waiting(RecordingSink):
        def write(self, frame: Frame, *_: object) -> None:
            assert entered[frame.index + 1].wait(timeout=60)
            super().write(frame)

    sink = Waiting()
    run_stream(Announcing(0), open_source(write_video(tmp_path / "in.mp4")), [sink])
    assert len(sink.indices) == 30


def test_a_slow_sink_makes_the_source_wait(tmp_path: Path) -> None:
    sink = RecordingSink(seconds=0.01)
    ahead = []

    class Watching(FakePredictor):
        def __call__(self, *arguments, **options):  # type: ignore[no-untyped-def]
            ahead.append(self.calls - len(sink.indices))
            return super().__call__(*arguments, **options)

    run_stream(Watching(0), open_source(write_video(tmp_path / "in.mp4")), [sink])
    assert len(sink.indices) == 30
    assert max(ahead) <= QUEUED_FRAMES + 2


@pytest.mark.parametrize("fail_at", [0, 10, 29])
def test_a_failing_sink_ends_the_stream_and_the_others_are_abandoned(tmp_path: Path, fail_at: int) -> None:
    healthy = RecordingSink()
    with pytest.raises(DynaMaskError, match="disk is full"):
        run_stream(FakePredictor(), open_source(write_video(tmp_path / "in.mp4")), [healthy, RecordingSink(fail_at=fail_at)])
    assert healthy.ended == "abandoned"
    assert healthy.indices == list(range(len(healthy.indices)))


def test_a_failing_predictor_ends_the_stream_after_its_results_are_written(tmp_path: Path) -> None:
    sink = RecordingSink()
    with pytest.raises(DynaMaskError, match="engine"):
        run_stream(FakePredictor(error=DynaMaskError("the engine failed"), at=5), open_source(write_video(tmp_path / "in.mp4")), [sink])
    assert (sink.indices, sink.ended) == ([0, 1, 2, 3], "abandoned")


def test_a_failing_source_ends_the_stream(tmp_path: Path) -> None:
    source = open_source(write_video(tmp_path / "in.mp4"))

    class Failing:
        def __getattr__(self, name: str) -> object:
            return getattr(source, name)

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            source.close()

        def __iter__(self) -> Iterator[Frame]:
            yield next(iter(source))
            raise DynaMaskError("the camera is gone")

    with pytest.raises(DynaMaskError, match="camera"):
        run_stream(FakePredictor(), Failing(), [sink := RecordingSink()])  # type: ignore[arg-type]
    assert sink.ended == "abandoned"


def test_ctrl_c_finishes_the_outputs_with_all_finished_frames(tmp_path: Path) -> None:
    sinks = [VideoSink(tmp_path / "out.mp4", 10), JsonLinesSink(tmp_path / "out.jsonl")]
    report = run_stream(FakePredictor(error=KeyboardInterrupt(), at=12), open_source(write_video(tmp_path / "in.mp4")), sinks)
    assert (report.interrupted, report.frames) == (True, 11)
    assert count_frames(tmp_path / "out.mp4") == 11
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 11
    assert not list(tmp_path.glob("*.partial*"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as an interactive shell has it: what a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_real_ctrl_c_ends_a_stream_that_waits(tmp_path: Path) -> None:
    # The main thread waits for the slow sink when the signal comes.
    sink = RecordingSink(seconds=0.05)
    source = open_source(write_video(tmp_path / "in.mp4", frames=60))
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    report = run_stream(FakePredictor(0), source, [sink])
    timer.join()
    assert report.interrupted
    assert (sink.ended, len(sink.indices)) == ("closed", report.frames)
    assert 0 < report.frames < 60


def test_the_report_has_its_documented_fields() -> None:
    names = {field.name for field in dataclasses.fields(StreamReport)}
    assert {"frames", "broken", "seconds", "fps", "latency_ms", "gmacs", "share", "peak_rss_mb"} <= names


@pytest.mark.parametrize(
    ("policy", "budget_gmacs", "override"),
    [("routed@0.6gmac", 0.6, -1), ("uniform-56", 0.0, 2), ("size-based", 0.0, 4), (Policy("mine", 0.7, 3), 0.7, 3), (None, 0.8, -1)],
)
def test_a_policy_reaches_the_engine(tmp_path: Path, policy: str | Policy | None, budget_gmacs: float, override: int) -> None:
    predictor = FakePredictor(0, budget_gmacs=0.8)
    run_stream(predictor, open_source(write_video(tmp_path / "in.mp4", frames=1)), [], policy)
    assert (predictor.budgets, predictor.overrides) == ([budget_gmacs], [override])
