"""`dynamask data`: writes generated data sets, and converts labels to COCO format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from cli.options import Json

app = typer.Typer(help="Convert labels to COCO format, or write generated data sets.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Convert labels to COCO format, or write generated data sets."""


@app.command()
def shapes(
    folder: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads it at run time, on Python 3.10 too)
        typer.Argument(help="The folder to write images/ and instances.json (COCO format) to; leave it out to write only a video."),
    ] = None,
    images: Annotated[int, typer.Option(help="Number of images.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same shapes.")] = 0,
    size: Annotated[str, typer.Option(metavar="HxW", help="Height and width, pixels.")] = "320x320",
    video: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also write a video of moving shapes to this MP4 file, with its objects in a .json file beside it."),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of the video, 25 a second.")] = 250,
    json: Json = None,
) -> None:
    """Draw shapes, smooth and intricate, small and large, with exact masks.

    Example: dynamask data shapes shapes --images 100 --video film.mp4
    """
    from runtime.files import write_json

    height, width = parse_size(size)
    result = prepare(folder, images, seed, height, width, video, frames)
    if json is not None:
        write_json(json, result)
    for key in ("annotations", "video", "video_annotations"):
        if key in result:
            typer.echo(result[key])


def prepare(
    folder: Path | None, images: int, seed: int, height: int, width: int, video: Path | None = None, frames: int = 250
) -> dict[str, Any]:
    """Write a shapes data set, a shapes video, or both, with a progress bar on standard error.

    Returns:
        `annotations` and `images` of the data set, `video`, `video_annotations` and `frames` of the video, as far as written.

    Raises:
        InputError: neither a folder nor a video is given, or as `write_dataset` and `write_video` say.
    """
    from rich.console import Console
    from rich.progress import Progress

    from dynamask.data.shapes import write_dataset, write_video
    from runtime.errors import InputError

    if folder is None and video is None:
        raise InputError("Nothing to write: give a folder for the images, --video FILE.mp4, or both.")
    result: dict[str, Any] = {"seed": seed, "height": height, "width": width}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        if folder is not None:
            task = progress.add_task("images", total=images)
            path = write_dataset(folder, images, seed, height, width, lambda done, _: progress.update(task, completed=done))
            result |= {"annotations": str(path), "images": images}
        if video is not None:
            task = progress.add_task("video", total=None)
            path = write_video(video, frames, seed, height, width)
            progress.update(task, total=1, completed=1)
            result |= {"video": str(path), "video_annotations": str(path.with_suffix(".json")), "frames": frames}
    return result


@app.command("prepare")
def prepare_miniature(
    kind: Annotated[str, typer.Argument(help="The layout: coco, lvis or cityscapes.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write to; train on it with --set data.root=FOLDER.")],
    json: Json = None,
) -> None:
    """Write a few generated images in the layout of COCO 2017, LVIS v1 or Cityscapes, to try out a whole run.

    Example: dynamask data prepare cityscapes miniature
    """
    from dynamask.data.miniatures import write_miniature
    from runtime.files import write_json

    result = write_miniature(kind, folder)
    if json is not None:
        write_json(json, result)
    typer.echo(result["root"])


@app.command()
def convert(
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="The folder of the photos, as the labelling tool exported it.")],
    output: Annotated[Path, typer.Argument(metavar="FILE.json", help="The COCO file to write.")],
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE|FOLDER", help="The labels, if they are not in the folder of the photos."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--format", metavar="coco|yolo|labelme|cvat", help="The format of the labels; by default their content tells."),
    ] = None,
    json: Json = None,
) -> None:
    """Write labels of COCO, YOLO segmentation, LabelMe or CVAT as one COCO file.

    Exports of Roboflow are read too, in COCO and YOLOv8 segmentation. File names in the COCO file are relative to PHOTOS.

    Example: dynamask data convert export labels.json
    """
    from dynamask.data.labels import read_labels
    from runtime.files import check_apart, check_file, write_json

    check_file(output)
    found = read_labels(photos, labels, kind)
    check_apart([output, json], [*found.files, *(photos / image["file_name"] for image in found.images)])
    found.write(output)
    for line in found.summary():
        typer.echo(line, err=True)
    if json is not None:
        write_json(json, {"file": str(output), "format": found.format, **found.counts()})
    typer.echo(f"{output}: {len(found.annotations)} objects of {len(found.classes)} classes in {len(found.images)} photos")
    typer.echo(f"Train on it with --set data.train_annotations={output} --set data.train_images={photos}")


def parse_size(size: str) -> tuple[int, int]:
    """`"320x480"` as (height, width).

    Raises:
        InputError: not two whole numbers with an x between them.
    """
    from runtime.errors import InputError

    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if match is None:
        raise InputError(f"--size {size} is not of the form HxW: write it like --size 320x480.")
    return int(match[1]), int(match[2])
