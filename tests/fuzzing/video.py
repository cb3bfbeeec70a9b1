"""Videos: MP4, MPEG-TS, Matroska and others with damaged containers and frames."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import av
import numpy as np
from hypothesis import strategies as st

from runtime.errors import DynaMaskError
from runtime.sources import open_source
from runtime.video import MAX_FRAME_PIXELS
from tests.fuzzing import Files
from tests.fuzzing.damage import damaged

_TS_PACKET = 188
_CLUSTER = b"\x1f\x43\xb6\x75"
"""The identifier of a Matroska cluster, before which the headers stand."""


@functools.cache
def sound_files() -> dict[str, tuple[bytes, list[range]]]:
    """Name with suffix -> a video of a few small frames, and the ranges of its headers."""
    files = {
        "mpeg4.mp4": _encode("mp4", "mpeg4"),
        "h264.mp4": _encode("mp4", "libx264", {"movflags": "+faststart"}),
        "fragments.mp4": _encode("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        "sound.mp4": _encode("mp4", "mpeg4", sound="aac"),
        "h264.mkv": _encode("matroska", "libx264"),
        "sound.mkv": _encode("matroska", "mpeg4", sound="aac"),
        "vp9.webm": _encode("webm", "libvpx-vp9"),
        "mpeg2.ts": _encode("mpegts", "mpeg2video"),
        "h264.ts": _encode("mpegts", "libx264", sound="mp2"),
        "mpeg4.avi": _encode("avi", "mpeg4"),
    }
    return {name: (content, _headers(name, content)) for name, content in files.items()}


def _encode(container_format: str, codec: str, options: dict[str, str] | None = None, sound: str | None = None) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        _write(file.name, container_format, codec, options or {}, sound)
        return Path(file.name).read_bytes()


def _write(path: str, container_format: str, codec: str, options: dict[str, str], sound: str | None) -> None:
    with av.open(path, "w", format=container_format, options=options) as container:
        video = container.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream(sound, rate=44100, layout="mono") if sound else None
        pictures = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
        for picture in pictures.repeat(8, axis=1).repeat(8, axis=2):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(video.encode())
        if audio is not None:
            silence = np.zeros((1, 1152), np.int16 if sound == "mp2" else np.float32)
            frame = av.AudioFrame.from_ndarray(silence, "s16" if sound == "mp2" else "fltp", "mono")
            frame.sample_rate = 44100
            container.mux([*audio.encode(frame), *audio.encode(None)])


def _headers(name: str, content: bytes) -> list[range]:
    if name.endswith(".mp4"):
        starts = [content.index(box) - 4 for box in (b"ftyp", b"mdat", b"moov")]
        ends = [start + int.from_bytes(content[start : start + 4], "big") for start in starts]
        # Of the data, the header alone; the index several times: most of what can go wrong is in it.
        return [range(starts[0], ends[0]), range(starts[1], starts[1] + 8), *[range(starts[2], ends[2])] * 4]
    if name.endswith((".mkv", ".webm")):
        return [range(content.index(_CLUSTER) + 32)]
    if name.endswith(".ts"):
        return [range(at, at + 32) for at in range(0, len(content), _TS_PACKET)]
    return [range(400), range(max(0, len(content) - 200), len(content))]


def _crc32_mpeg(data: bytes) -> int:
    """The CRC-32 of MPEG-TS tables (ISO/IEC 13818-1, Annex A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc


def _with_checksums(content: bytes) -> bytes:
    """MPEG-TS whose tables (program association, program map, service description) have the checksum of their content."""
    data = bytearray(content)
    for at in range(0, len(data) - _TS_PACKET + 1, _TS_PACKET):
        begins_section = data[at + 1] & 0x40 and data[at + 3] & 0x30 == 0x10 and data[at + 4] == 0 and data[at + 5] in (0, 2, 0x42)
        size = 3 + int.from_bytes(data[at + 6 : at + 8], "big") % 4096
        if begins_section and 7 < size <= _TS_PACKET - 5:
            end = at + 5 + size
            data[end - 4 : end] = _crc32_mpeg(bytes(data[at + 5 : end - 4])).to_bytes(4, "big")
    return bytes(data)


@st.composite
def inputs(draw: st.DrawFn) -> Files:
    """One video file."""
    name = draw(st.sampled_from(sorted(sound_files())))
    content, headers = sound_files()[name]
    if draw(st.integers(0, 15)) == 15:
        other, _ = sound_files()[draw(st.sampled_from(sorted(sound_files())))]
        at = draw(st.integers(0, len(content)))
        return Files({name: content[:at] + other[draw(st.integers(0, len(other))) :]})
    content = draw(damaged(content, headers))
    return Files({name: _with_checksums(content) if name.endswith(".ts") and draw(st.booleans()) else content})


def check(folder: Path) -> bool:
    """Read every frame as `stream` does."""
    (path,) = folder.iterdir()
    try:
        with open_source(path) as source:
            assert 1 / 86_400 <= source.frame_rate <= 1000
            assert source.frame_count is None or source.frame_count > 0
            index, time_s = -1, -1.0
            for frame in source:
                assert frame.index > index and time_s < frame.time_s < float("inf")
                index, time_s = frame.index, frame.time_s
                image = frame.image
                assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
                assert 0 < image.shape[0] * image.shape[1] <= MAX_FRAME_PIXELS
            assert index >= 0 and min(source.broken, source.missing, source.bridged) >= 0
    except DynaMaskError as error:
        assert str(path) in str(error) and "\n" not in str(error) and "permissions" not in str(error)
        str(error).encode()
        return False
    return True
