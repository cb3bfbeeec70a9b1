from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from runtime.errors import InputError
from runtime.sources import VideoSource, open_source
from tests.runtime.fake_stream import write_video


def test_a_video_gives_every_frame_with_its_time_and_content(tmp_path: Path) -> None:
    with open_source(write_video(tmp_path / "v.mp4", frames=30)) as source:
        frames = list(source)
    assert (source.size, source.frame_rate, source.frame_count) == ((64, 96), 10, 30)
    assert [frame.index for frame in frames] == list(range(30))
    np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(30) / 10, atol=1e-3)
    # Brightness says which frame it is (write_video): none is swapped, doubled or left out.
    np.testing.assert_allclose([frame.image.mean() for frame in frames], 40 + 4 * np.arange(30), atol=3)
    assert frames[0].image.dtype == np.uint8
    assert (source.broken, source.missing) == (0, 0)


def test_a_truncated_video_ends_with_what_could_be_decoded_and_says_how_much_is_missing(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "v.mp4", frames=30).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    with open_source(tmp_path / "cut.mp4") as source:
        frames = list(source)
    assert 5 < len(frames) < 25
    assert source.missing > 0
    assert len(frames) + source.broken + source.missing == 30


def test_frames_damaged_midway_are_left_out_and_counted(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "v.mp4", frames=30).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = np.random.default_rng(1).bytes(600)
    (tmp_path / "noise.mp4").write_bytes(data)
    with open_source(tmp_path / "noise.mp4") as source:
        frames = list(source)
    assert source.broken > 0
    assert len(frames) + source.broken + source.missing == 30
    assert frames[-1].index == 29


def test_a_folder_is_read_in_the_order_of_names_without_its_broken_image(tmp_path: Path) -> None:
    for i, name in enumerate(["b.png", "a.png", "d.jpg"]):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), 50 * i, np.uint8))
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("no image")
    with open_source(tmp_path) as source:
        frames = list(source)
    assert [(frame.index, frame.name) for frame in frames] == [(0, "a.png"), (1, "b.png"), (3, "d.jpg")]
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [50, 0, 100]
    assert source.broken == 1


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "text as mp4", "no index", "empty folder", "only broken images"])
def test_bad_input_is_refused_with_its_name_before_the_first_frame(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x.txt" if kind == "text" else "x.mp4" if "folder" not in kind and "images" not in kind else "x")
    if kind == "empty":
        path.touch()
    elif kind.startswith("text"):
        path.write_text("no video at all\n" * 100)
    elif kind == "no index":
        whole = write_video(tmp_path / "v.mp4").read_bytes()
        path.write_bytes(whole[:200])
    elif kind != "missing":
        path.mkdir()
        if kind == "only broken images":
            (path / "a.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="x") as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_colon_in_the_name_is_no_protocol(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", frames=2).rename(tmp_path / "pipe:1.mp4")
    with open_source(path) as source:
        assert isinstance(source, VideoSource)
        assert len(list(source)) == 2


def test_audio_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(InputError, match="holds no video"):
        open_source(path)
