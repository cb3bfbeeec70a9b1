from __future__ import annotations

import itertools
import os
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from runtime.errors import InputError
from runtime.frames import Frame, Source
from runtime.images import read_image
from runtime.sources import AnimationSource, open_source
from runtime.video import Clock, VideoSource, _upright
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


def test_a_truncated_video_gives_its_frames_and_the_number_of_missing_ones(tmp_path: Path) -> None:
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


def encode(
    path: Path,
    frames: int = 10,
    size: tuple[int, int] = (48, 64),
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = 10,
    times_s: list[float] | None = None,
    aspect: Fraction | None = None,
    container_options: dict[str, str] | None = None,
    orient: np.ndarray | None = None,
) -> Path:
    """A video whose top left quarter is white, and whose frame i else has the brightness 40 + 10 i; without B-frames."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"bf": "0"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = Fraction(1, 90_000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if orient is not None:
            stream.set_display_matrix([int(value) for value in orient.ravel()])
        for i in range(frames):
            image = np.full((*size, 3), 40 + 10 * i, np.uint8)
            image[: (size[0] + 1) // 2, : (size[1] + 1) // 2] = 255
            picture = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            picture.time_base = Fraction(1, 90_000)
            picture.pts = round(90_000 * (i / rate if times_s is None else times_s[i]))
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def read(path: Path) -> tuple[Source, list[Frame]]:
    with open_source(path) as source:
        frames = list(source)
    assert all(later.time_s > earlier.time_s for earlier, later in itertools.pairwise(frames)), "times rise"
    return source, frames


def join(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


ORIENTATIONS = {
    "as it is": ((1, 0, 0, 1), lambda image: image),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda image: image[::-1]),
    "half turn": ((-1, 0, 0, -1), lambda image: image[::-1, ::-1]),
    "clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "counterclockwise": ((0, -1, 1, 0), lambda image: np.rot90(image)),
    "transposed": ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
    "transversed": ((0, -1, -1, 0), lambda image: image[::-1, ::-1].transpose(1, 0, 2)),
}
"""Name -> a, b, c, d of the display matrix, and the same in NumPy."""


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_video_is_turned_and_mirrored_as_players_show_it(tmp_path: Path, name: str) -> None:
    (a, b, c, d), shown = ORIENTATIONS[name]
    matrix = np.array([[a << 16, b << 16, 0], [c << 16, d << 16, 0], [0, 0, 1 << 30]])
    _, [plain, *_] = read(encode(tmp_path / "plain.mp4", 2))
    source, [turned, *_] = read(encode(tmp_path / "turned.mp4", 2, orient=matrix))
    np.testing.assert_allclose(turned.image.astype(int), shown(plain.image), atol=3)
    assert source.size == turned.image.shape[:2]


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.diag([-2, 1, 1]) * 65536, [[60000, 20000, 0], [-20000, 60000, 0], [0, 0, 1]]])
def test_any_display_matrix_comes_to_quarter_turns(matrix: list[list[int]]) -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    expected = image[:, ::-1] if np.array(matrix)[0, 0] < 0 else image
    np.testing.assert_array_equal(_upright(image, np.array(matrix, np.int32)), expected)


@pytest.mark.parametrize(("aspect", "size"), [("2", (48, 128)), ("1/2", (96, 64)), ("64/45", (48, 91)), ("1/1000", (48, 64))])
def test_pixels_that_are_not_square_are_made_square(tmp_path: Path, aspect: str, size: tuple[int, int]) -> None:
    source, frames = read(encode(tmp_path / "v.mkv", 2, aspect=Fraction(aspect)))
    assert source.size == frames[0].image.shape[:2] == size
    height, width = size
    assert frames[0].image[: height // 2 - 4, : width // 2 - 4].min() > 240, "the white quarter is a quarter still"
    assert frames[0].image[:, width // 2 + 4 :].max() < 60


def with_cover(path: Path, video: Path | None) -> Path:
    """A container whose first stream is an attached picture; then a video, or sound."""
    with av.open(str(path), "w") as container:
        cover = container.add_stream("png" if path.suffix == ".mp4" else "mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 320, "rgb24" if path.suffix == ".mp4" else "yuvj420p"
        cover.disposition = Disposition.attached_pic
        picture = cover.encode(av.VideoFrame.from_ndarray(np.full((320, 320, 3), 99, np.uint8), format="rgb24")) + cover.encode(None)
        if video is None:
            sound = container.add_stream("aac", rate=44_100)
            container.mux(picture)
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 44_100
            container.mux(sound.encode(samples) + sound.encode(None))
            return path
        with av.open(str(video)) as read_from:
            copied = container.add_stream_from_template(read_from.streams.video[0])
            container.mux(picture)
            for packet in read_from.demux(video=0):
                if packet.dts is not None:
                    packet.stream = copied
                    container.mux(packet)
    return path


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    source, frames = read(with_cover(tmp_path / "clip.mp4", encode(tmp_path / "v.mp4", 7)))
    assert (len(frames), source.size) == (7, (48, 64))
    with pytest.raises(InputError, match="holds no video, only sound"):
        open_source(with_cover(tmp_path / "song.mp4", None))


def test_of_several_videos_the_default_one_is_taken_else_the_largest(tmp_path: Path) -> None:
    for name, default, expected in (("a.mkv", 0, 32), ("b.mkv", None, 96)):
        with av.open(str(tmp_path / name), "w") as container:
            streams = []
            for i, width in enumerate((32, 96, 64)):
                stream = container.add_stream("ffv1", rate=5)
                stream.width, stream.height, stream.pix_fmt = width, width, "yuv420p"
                stream.disposition = Disposition.default if i == default else Disposition(0)
                streams.append(stream)
            for stream in streams:
                grey = av.VideoFrame.from_ndarray(np.full((stream.height, stream.width, 3), 9, np.uint8), format="rgb24")
                container.mux(stream.encode(grey) + stream.encode(None))
        source, _ = read(tmp_path / name)
        assert source.size == (expected, expected), name


def test_recordings_one_after_the_other_go_on_in_time(tmp_path: Path) -> None:
    first, other = encode(tmp_path / "a.ts"), encode(tmp_path / "b.ts", size=(64, 96))
    source, frames = read(join(tmp_path / "joined.ts", first, other, first))
    assert len(frames) == 30
    np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(30) / 10, atol=0.02)
    assert (source.broken, source.missing, source.bridged) == (0, 0, 2)
    assert [frame.image.shape[:2] for frame in frames] == [(48, 64)] * 10 + [(64, 96)] * 10 + [(48, 64)] * 10
    # Brightness says which frame it is: what was joined is whole.
    np.testing.assert_allclose([frame.image[-1, -1, 0] for frame in frames], np.tile(40 + 10 * np.arange(10), 3), atol=3)


@pytest.mark.parametrize(
    ("name", "jump_s", "bridged"),
    [("hour.ts", 3600, 1), ("hour.mkv", 3600, 0), ("days.mkv", 40 * 3600, 1), ("short.ts", 5, 0)],
)
def test_jumps_forward_are_bridged_where_clocks_begin_again(tmp_path: Path, name: str, jump_s: int, bridged: int) -> None:
    times = [i / 10 + (jump_s if i >= 5 else 0) for i in range(10)]
    source, frames = read(encode(tmp_path / name, times_s=times))
    np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(10) / 10 if bridged else times, atol=0.02)
    assert (source.broken, source.missing, source.bridged) == (0, 0, bridged)


@pytest.mark.parametrize(
    ("stamps", "expected", "bridged"),
    [
        ([5, 5.1, 5.2], [0, 0.1, 0.2], 0),
        ([-1, -0.9, -0.8], [0, 0.1, 0.2], 0),
        ([None, None, None], [0, 0.1, 0.2], 1),
        ([None, 7, 7.1], [0, 0.1, 0.2], 1),
        ([0, 0.1, None, 0.3], [0, 0.1, 0.2, 0.3], 1),
        ([0, 0, 0, 0], [0, 0.1, 0.2, 0.3], 1),
        ([0, 0.1, 0.1, 0.3], [0, 0.1, 0.2, 0.3], 1),
        ([0, 0, 0.25, 0.25], [0, 0.1, 0.25, 0.35], 2),
        ([9, 9.1, 0, 0.1, 0.5], [0, 0.1, 0.2, 0.3, 0.7], 1),
        ([0, 0.1, 1e9, 1e9 + 0.1], [0, 0.1, 0.2, 0.3], 1),
        ([0, 0.1, -(2**33) / 90_000, 0.2 - (2**33) / 90_000], [0, 0.1, 0.2, 0.4], 1),
        ([0, 3600, 3600.1], [0, 3600, 3600.1], 0),
        ([0, 0.1, 0.30000000000000004, 0.2, 0.3, 0.4], [0, 0.1, 0.3, 0.4, 0.5, 0.6], 1),
    ],
)
def test_times_rise_whatever_the_time_stamps(stamps: list[float | None], expected: list[float], bridged: int) -> None:
    clock = Clock(Fraction(10), begins_again=False)
    np.testing.assert_allclose([clock.time_s(stamp) for stamp in stamps], expected, atol=1e-6)
    assert clock.bridged == bridged


def test_times_that_differ_by_rounding_alone_are_equal() -> None:
    clock = Clock(Fraction(25), begins_again=False)
    times = [clock.time_s(stamp) for stamp in (0.04, 0.08, 0.12, 0.2, 0.16, 0.24, 0.32, 0.28, 0.36, 0.4)]
    assert all(round(later, 6) > round(earlier, 6) for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (1, 200)])
@pytest.mark.parametrize("frames", [1, 3])
def test_small_odd_and_short_videos(tmp_path: Path, size: tuple[int, int], frames: int) -> None:
    source, read_frames = read(encode(tmp_path / "v.mkv", frames, size, codec="ffv1"))
    assert (source.size, len(read_frames), source.missing) == (size, frames, 0)


@pytest.mark.parametrize("pixels", ["gray", "gray10le", "yuv444p10le", "bgra", "yuv422p", "gray16le", "yuva420p"])
def test_every_pixel_format_becomes_rgb(tmp_path: Path, pixels: str) -> None:
    _, frames = read(encode(tmp_path / "v.mkv", 2, codec="ffv1", pixels=pixels))
    assert frames[0].image[:20, :28].min() > 240
    np.testing.assert_allclose(frames[1].image[-10:, -10:], 50, atol=4)


@pytest.mark.parametrize("rate", [1, 240, 90_000])
def test_absurd_frame_rates_are_not_believed(tmp_path: Path, rate: int) -> None:
    source, frames = read(encode(tmp_path / "v.mp4", 5, rate=rate))
    assert source.frame_rate == (rate if rate <= 1000 else 25)
    assert len(frames) == 5


def test_frames_too_large_for_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "v.mkv", 2)
    monkeypatch.setattr("runtime.video.MAX_FRAME_PIXELS", 48 * 64 - 1)
    with pytest.raises(InputError, match="has frames of 64x48, more than"):
        open_source(path)


def test_a_stream_without_times_is_played_at_its_frame_rate(tmp_path: Path) -> None:
    source, frames = read(encode(tmp_path / "v.h264"))
    np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(10) / float(source.frame_rate), atol=1e-6)


def test_a_recording_without_an_announced_length(tmp_path: Path) -> None:
    source, frames = read(encode(tmp_path / "v.mkv", container_options={"live": "1"}))
    assert (source.frame_count, len(frames), source.missing) == (None, 10, 0)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".mp4"])
def test_animations_are_played(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.new("RGB", (8, 6), (60 * i, 60 * i, 60 * i)) for i in range(4)]
    kind = "GIF" if suffix == ".mp4" else suffix[1:]
    pictures[0].save(tmp_path / f"a{suffix}", kind, save_all=True, append_images=pictures[1:], duration=[100, 200, 100, 100], lossless=True)
    source, frames = read(tmp_path / f"a{suffix}")
    assert isinstance(source, AnimationSource)
    assert [int(frame.image.mean()) for frame in frames] == [0, 60, 120, 180]
    np.testing.assert_allclose([frame.time_s for frame in frames], [0, 0.1, 0.3, 0.4])
    assert (source.frame_rate, source.frame_count) == (10, 4)


def test_a_truncated_animation_ends_at_its_last_whole_frame(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    pictures = [Image.fromarray(image) for image in noise]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[:-100])
    source, frames = read(tmp_path / "a.gif")
    assert 0 < len(frames) < 5
    assert len(frames) + source.broken + source.missing == source.frame_count


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    video = encode(tmp_path / "v.mp4", 3)
    for name in ("v.jpg", "v.txt", "v", os.fsdecode(b"caf\xe9.mp4"), "-%03d.mp4", "a\nb.mp4"):
        (tmp_path / name).write_bytes(video.read_bytes())
        assert len(read(tmp_path / name)[1]) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nv.ts\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nhttp://127.0.0.1:9/v.ts\n#EXT-X-ENDLIST\n"),
        ("list.txt", "ffconcat version 1.0\nfile v.ts\n"),
        ("list.mpd", '<?xml version="1.0"?><MPD><Period></Period></MPD>'),
    ],
)
def test_a_playlist_opens_nothing(tmp_path: Path, name: str, content: str) -> None:
    encode(tmp_path / "v.ts", 2)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="is a playlist, which names other files; give the video itself"):
        open_source(tmp_path / name)


def test_an_address_is_refused_without_its_password() -> None:
    with pytest.raises(InputError, match="rtsp:// addresses are not read") as caught:
        open_source(Path("rtsp://user:secret@camera/1"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_a_pipe_or_device_is_no_source(tmp_path: Path, make: object) -> None:
    make(tmp_path / "v.mp4")  # type: ignore[operator]
    with pytest.raises(InputError, match="is a device or a pipe"):
        open_source(tmp_path / "v.mp4")


def test_a_video_whose_index_at_the_end_is_cut_off_says_so(tmp_path: Path) -> None:
    data = encode(tmp_path / "v.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"moov") - 8])
    with pytest.raises(InputError, match=r"cut\.mp4 cannot be opened as a video: it is truncated, its index \(moov\)"):
        open_source(tmp_path / "cut.mp4")


def test_a_video_whose_index_is_cut_off_in_its_middle_says_so(tmp_path: Path) -> None:
    data = encode(tmp_path / "v.mp4").read_bytes()
    for cut in range(data.index(b"moov") + 8, data.index(b"stbl"), 40):
        (tmp_path / "cut.mp4").write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"truncated|cannot be decoded"):
            open_source(tmp_path / "cut.mp4")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"PK\x03\x04" + bytes(99), "is an archive"),
        (bytes(999), "zeros only"),
    ],
)
def test_what_stands_under_a_videos_name_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_source(tmp_path / "a.mp4")


def test_a_page_under_an_images_name_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(InputError, match="is a web page"):
        open_source(tmp_path / "a.jpg")


def test_a_folder_is_read_in_natural_order_without_hidden_files(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    for name in ("10.jpg", "9.JPG", "1.Jpeg", "img2.png", "img10.png", "IMG1.PNG"):
        picture.save(tmp_path / name)
    (tmp_path / "._9.JPG").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".hidden.png").touch()
    (tmp_path / "sub.jpg").mkdir()
    (tmp_path / "v.mp4").touch()
    os.mkfifo(tmp_path / "5.jpg")
    (tmp_path / "7.jpg").symlink_to(tmp_path / "10.jpg")
    (tmp_path / "8.jpg").symlink_to("nothing")
    source, frames = read(tmp_path)
    assert [frame.name for frame in frames] == ["1.Jpeg", "7.jpg", "9.JPG", "10.jpg", "IMG1.PNG", "img2.png", "img10.png"]
    assert (source.broken, source.frame_count) == (1, 8)


@pytest.mark.parametrize(
    ("name", "said"), [("v.mp4", "holds videos and no image"), ("sub", "only folders"), ("notes.txt", "holds no image")]
)
def test_the_error_for_a_folder_without_images_names_its_content(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).mkdir() if name == "sub" else (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=said):
        open_source(tmp_path)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_video_with_exif_is_turned_as_its_pictures_are(tmp_path: Path, orientation: int) -> None:
    # PyAV does not know this kind of side data.
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.mjpeg").write_bytes(3 * (tmp_path / "a.jpg").read_bytes())
    _, frames = read(tmp_path / "a.mjpeg")
    assert len(frames) == 3
    expected = read_image(tmp_path / "a.jpg")
    assert frames[0].image.shape == expected.shape
    assert np.abs(frames[0].image.astype(int) - expected).max() <= 3


def test_a_title_that_is_no_utf_8_does_not_matter(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.avi"), "w") as container:
        container.metadata["title"] = "c-a-f-e"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    data = (tmp_path / "v.avi").read_bytes()
    assert b"c-a-f-e" in data
    (tmp_path / "v.avi").write_bytes(data.replace(b"c-a-f-e", b"caf\xe9\xff ."))
    assert len(read(tmp_path / "v.avi")[1]) == 3


def test_an_animation_whose_frames_cannot_be_counted_is_played_to_the_damage(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 6), (60 * i, 60 * i, 60 * i)) for i in range(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[50, 200, 100, 100])
    data = (tmp_path / "a.gif").read_bytes()
    # The file ends in the description of the last picture, which follows the extension that holds its duration.
    (tmp_path / "a.gif").write_bytes(data[: data.rindex(b"\x21\xf9\x04") + 8 + 10])
    source, frames = read(tmp_path / "a.gif")
    assert [int(frame.image.mean()) for frame in frames] == [0, 60, 120]
    assert (source.frame_count, source.frame_rate) == (None, 20)
