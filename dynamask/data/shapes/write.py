"""Shapes as files: a COCO folder, and a video with its objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.data.coco_writer import mask_annotation, write_image
from dynamask.data.shapes.dataset import shape_annotation, shapes_tree
from dynamask.data.shapes.outlines import Array
from dynamask.data.shapes.scenes import check_size, draw_frames, draw_image
from runtime.errors import InputError
from runtime.files import atomic_path, check_folder, write_json


def write_dataset(
    folder: str | Path,
    images: int,
    seed: int,
    height: int = 320,
    width: int = 320,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `folder/images/000000.jpg`, … and, last, `folder/instances.json` in COCO format (compressed RLE); returns the JSON's path.

    Image i depends on `(seed, i)` and the size alone. `progress(done, images)` is called after each image.

    Raises:
        InputError: no images are asked for, they are too small, or the folder holds a data set already.
        DynaMaskError: the folder cannot be written.
    """
    folder = Path(folder)
    if images < 1:
        raise InputError(f"A data set of {images} images cannot be written: ask for at least 1.")
    check_size(height, width)
    check_folder(folder)
    instances = folder / "instances.json"
    if instances.exists():
        raise InputError(f"{instances} exists already: remove that data set or choose another folder.")
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(images):
        image, objects = draw_image(np.random.default_rng([seed, i]), height, width)
        name = f"{i:06d}.jpg"
        write_image(folder / "images" / name, image)
        entries.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        annotations += [shape_annotation(i + 1, thing) for thing in objects]
        if progress is not None:
            progress(i + 1, images)
    write_json(instances, shapes_tree(entries, annotations, seed))
    return instances


def write_video(path: str | Path, frames: int, seed: int, height: int = 320, width: int = 320, fps: int = 25) -> Path:
    """Write an MP4 (H.264) of shapes in motion, and beside it, with suffix `.json`, its objects in COCO format; returns the video's path.

    In the JSON every frame is an image (`frame_index` from 0), and `track_id` names the object through the video.

    Raises:
        InputError: no frames are asked for, the name does not end in `.mp4`, or the size is odd or too small.
        DynaMaskError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"{path} does not end in .mp4, the only video format that is written: rename it.")
    if frames < 1 or height % 2 or width % 2:
        raise InputError(f"{path} cannot have {frames} frames of {height}x{width}: ask for at least 1 frame and an even height and width.")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with atomic_path(path) as temporary:
        _encode(temporary, _record(draw_frames(frames, seed, height, width), path.name, images, annotations), height, width, fps)
    write_json(path.with_suffix(".json"), shapes_tree(images, annotations, seed))
    return path


def _record(
    frames: Iterator[tuple[Array, list[dict[str, Any]]]], name: str, images: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> Iterator[Array]:
    """Pass the pictures on, noting each frame and its objects."""
    for i, (picture, objects) in enumerate(frames):
        images.append({"id": i + 1, "file_name": name, "frame_index": i, "height": picture.shape[0], "width": picture.shape[1]})
        for thing in objects:
            annotations.append({"image_id": i + 1, "track_id": thing["track"], **mask_annotation(thing["label"] + 1, thing["mask"])})
        yield picture


def _encode(path: Path, pictures: Iterator[Array], height: int, width: int, fps: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
