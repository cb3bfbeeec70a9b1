from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from runtime.errors import DynaMaskError, InputError
from runtime.frames import Frame
from runtime.sinks import FolderSink, JsonLinesSink, Sink, VideoSink
from tests.runtime.fake_stream import count_frames, make_instances

TIMES = {"preprocess": 1.0, "detector": 2.0, "masks": 3.0}


def frame(index: int, height: int = 64, width: int = 96, time_s: float | None = None) -> Frame:
    noise = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Frame(index, index / 10 if time_s is None else time_s, noise)


def write(sink: Sink, one: Frame, count: int = 3) -> None:
    sink.write(one, make_instances(count, one.image.shape[:2], seed=one.index))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 95), (1, 1), (1, 400)])
def test_a_video_holds_every_frame_written_at_any_size(tmp_path: Path, height: int, width: int) -> None:
    path = tmp_path / "out.mp4"
    with VideoSink(path, 12.5) as sink:
        for i in range(25):
            write(sink, frame(i, height, width))
    assert count_frames(path) == 25
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.height, context.width) == (height + height % 2, width + width % 2)
    assert list(tmp_path.iterdir()) == [path]


def test_frames_keep_their_times_and_their_picture(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    times = [0.0, 0.1, 0.2, 0.7, 0.8]
    with VideoSink(path, 10) as sink:
        for i, time_s in enumerate(times):
            image = np.full((64, 96, 3), 40 * i, np.uint8)
            sink.write(Frame(i, time_s, image), make_instances(0, (64, 96)))
    with av.open(str(path)) as container:
        read = [(one.time, one.to_ndarray(format="rgb24").mean()) for one in container.decode(video=0)]
    np.testing.assert_allclose([time for time, _ in read], times, atol=1e-3)
    np.testing.assert_allclose([mean for _, mean in read], 40 * np.arange(5), atol=6)


def test_frames_of_other_sizes_are_fitted_into_the_first(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with VideoSink(path, 10) as sink:
        for i, (height, width) in enumerate([(64, 96), (200, 50), (1, 300)]):
            write(sink, frame(i, height, width))
    assert count_frames(path) == 3


def test_json_lines_give_back_boxes_classes_grids_and_masks(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with JsonLinesSink(path) as sink:
        for i in range(3):
            write(sink, frame(i), count=(0, 4, 300)[i])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["index"], line["time_s"], len(line["detections"])) for line in lines] == [
        (0, 0.0, 0),
        (1, 0.1, 4),
        (2, 0.2, 300),
    ]
    assert lines[1]["times_ms"] == TIMES
    expected = make_instances(4, (64, 96), seed=1)
    for i, detection in enumerate(lines[1]["detections"]):
        x, y, width, height = detection["bbox"]
        np.testing.assert_allclose([x, y, x + width, y + height], expected.boxes[i], atol=1e-3)
        assert (detection["class"], detection["category_id"]) == [("star", 1), ("gear", 7)][expected.labels[i]]
        assert detection["grid"] == expected.grids[i]
        np.testing.assert_array_equal(coco_mask.decode(detection["segmentation"]).astype(bool), expected.masks[i])


@pytest.mark.parametrize("kind", ["video", "jsonl"])
def test_abandoned_output_keeps_its_partial_name_and_the_old_file_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("out.mp4" if kind == "video" else "out.jsonl")
    path.write_text("before")
    sink: Sink = VideoSink(path, 10) if kind == "video" else JsonLinesSink(path)
    with pytest.raises(RuntimeError, match="boom"), sink:
        for i in range(4):
            write(sink, frame(i))
        raise RuntimeError("boom")
    assert path.read_text() == "before"
    [partial] = tmp_path.glob("out.*.partial.*")
    if kind == "video":
        assert count_frames(partial) == 4
    else:
        assert len(partial.read_text().splitlines()) == 4


def test_lines_are_on_disk_before_the_end(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "out.jsonl") as sink:
        write(sink, frame(0))
        [partial] = tmp_path.glob("out.*.partial.jsonl")
        assert partial.read_bytes().endswith(b"}\n")
        assert not (tmp_path / "out.jsonl").exists()


def test_a_full_disk_is_one_sentence_and_the_earlier_lines_are_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(DynaMaskError, match=r"out\.jsonl could not be written") as caught, largest_file(5000), JsonLinesSink(path) as sink:
        for i in range(100):
            write(sink, frame(i))
    assert "\n" not in str(caught.value)
    [partial] = tmp_path.glob("out.*.partial.jsonl")
    assert str(partial) in str(caught.value)
    lines = partial.read_text().splitlines()
    assert len(lines) > 1
    assert [json.loads(line)["index"] for line in lines] == list(range(len(lines)))
    assert not path.exists()


def test_a_full_disk_while_a_video_is_written_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with pytest.raises(DynaMaskError, match=r"out\.mp4 could not be written"), largest_file(20_000), VideoSink(path, 10) as sink:
        for i in range(60):
            write(sink, frame(i))
    assert not path.exists()


def test_a_folder_gets_one_annotated_picture_a_frame(tmp_path: Path) -> None:
    with FolderSink(tmp_path / "frames") as sink:
        write(sink, frame(0))
        write(sink, frame(7))
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == ["000000.jpg", "000007.jpg"]
    assert cv2.imread(str(tmp_path / "frames" / "000007.jpg")).shape == (64, 96, 3)


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.mp4"):
        VideoSink(tmp_path / "out.avi", 10)
    (tmp_path / "file").touch()
    for make in (lambda: VideoSink(tmp_path / "file" / "a.mp4", 10), lambda: JsonLinesSink(tmp_path / "file" / "a.jsonl")):
        with pytest.raises(InputError, match=r"could not be written .* is a file.*: nothing was replaced"):
            make()
    (tmp_path / "folder.mp4").mkdir()
    for make in (lambda: VideoSink(tmp_path / "folder.mp4", 10), lambda: JsonLinesSink(tmp_path / "folder.mp4")):
        with pytest.raises(InputError, match="it is a folder"):
            make()
    with pytest.raises(InputError, match="is a file already"):
        FolderSink(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.mp4"]


def test_two_runs_with_one_output_do_not_mix(tmp_path: Path) -> None:
    for make in (lambda: JsonLinesSink(tmp_path / "out.jsonl"), lambda: VideoSink(tmp_path / "out.mp4", 10)):
        with make() as first, make() as second:
            for i in range(3):
                write(first, frame(i), count=2)
                write(second, frame(10 + i), count=1)
    # Closed last is the first: its three lines are there, whole, and nothing of the other's.
    assert [json.loads(line)["index"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert count_frames(tmp_path / "out.mp4") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.mp4"]


def test_lines_go_into_a_pipe_as_they_come_and_a_video_at_the_end(tmp_path: Path) -> None:
    for name, kind in (("lines", JsonLinesSink), ("video", lambda path: VideoSink(path, 10))):
        os.mkfifo(tmp_path / name)
        reader = os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK)
        with kind(tmp_path / name) as sink:
            write(sink, frame(0, 16, 16), count=0)
            if name == "lines":
                assert json.loads(os.read(reader, 10_000))["index"] == 0
        if name == "video":
            (tmp_path / "read.mp4").write_bytes(os.read(reader, 60_000))
            assert count_frames(tmp_path / "read.mp4") == 1
        os.close(reader)
        assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


def test_errors_name_a_full_device_and_a_reader_that_has_gone(tmp_path: Path) -> None:
    with (
        pytest.raises(DynaMaskError, match=r"/dev/full could not be written \(No space left on device\); free some space"),
        JsonLinesSink("/dev/full") as sink,
    ):
        write(sink, frame(0))
    os.mkfifo(tmp_path / "lines")
    reader = os.open(tmp_path / "lines", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(DynaMaskError, match="its reader has gone"), JsonLinesSink(tmp_path / "lines") as sink:
        os.close(reader)
        write(sink, frame(0))


def test_an_abandoned_video_for_a_pipe_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RuntimeError, match="boom"), VideoSink(tmp_path / "pipe", 10) as sink:
        write(sink, frame(0))
        assert list((tmp_path / "temporary").iterdir())
        raise RuntimeError("boom")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_folder_that_is_removed_while_a_stream_is_written_is_said(tmp_path: Path) -> None:
    for make in (lambda: JsonLinesSink(tmp_path / "f" / "out.jsonl"), lambda: VideoSink(tmp_path / "f" / "out.mp4", 10)):
        with pytest.raises(DynaMaskError, match="its folder does not exist"), make() as sink:
            write(sink, frame(0))
            shutil.rmtree(tmp_path / "f")


@pytest.mark.parametrize("name", ["-x", ".x", "a:b %03d", "n" * 240, os.fsdecode(b"caf\xe9")])
def test_any_name_can_be_written(tmp_path: Path, name: str) -> None:
    sinks = [JsonLinesSink(tmp_path / f"{name}.jsonl"), VideoSink(tmp_path / f"{name}.mp4", 10), FolderSink(tmp_path / name)]
    for sink in sinks:
        with sink:
            write(sink, frame(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.jsonl", f"{name}.mp4"]


def test_gaps_of_days_do_not_end_a_video(tmp_path: Path) -> None:
    with VideoSink(tmp_path / "out.mp4", 1) as sink:
        for i, time_s in enumerate([0, 10, 500_000, 1_000_000, 1_500_000, 1_500_010]):
            write(sink, frame(i, time_s=time_s), count=0)
    with av.open(str(tmp_path / "out.mp4")) as container:
        times = [one.time for one in container.decode(video=0)]
    np.testing.assert_allclose(times, [0, 10, 10 + 7200, 10 + 2 * 7200, 10 + 3 * 7200, 20 + 3 * 7200])


@pytest.mark.parametrize(("height", "width", "expected"), [(100, 20_001, (82, 16_384)), (20_000, 3, (16_384, 2))])
def test_frames_wider_than_the_encoder_takes_are_scaled(tmp_path: Path, height: int, width: int, expected: tuple[int, int]) -> None:
    with VideoSink(tmp_path / "out.mp4", 1) as sink:
        write(sink, frame(0, height, width), count=0)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == expected


def test_a_video_without_frames_leaves_no_file(tmp_path: Path) -> None:
    with VideoSink(tmp_path / "out.mp4", 10):
        pass
    assert list(tmp_path.iterdir()) == []
