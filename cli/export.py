"""`dynamask export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import Json

PARITY_IMAGES = 20
"""At most this many of the folder's images are compared: PyTorch runs on each."""


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint of dynamask train (.safetensors), or a preset (r50, lite0, …): random weights, for speed.")
    ],
    bundle: Annotated[Path, typer.Argument(help="The folder to write: manifest.json and model.onnx.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Height and width of the model's input, multiples of 32; by default those it was trained at."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help=f"A folder of images to compare ONNX with PyTorch on (the first {PARITY_IMAGES}); drawn shapes by default."),
    ] = None,
    json: Json = None,
) -> None:
    """Write a checkpoint as a bundle: one ONNX graph that computes for each instance only the layers that its mask grid needs.

    The graph is compared with PyTorch before the bundle is written.

    Example: dynamask export runs/shapes/best.safetensors lite0.bundle --size 384x384
    """
    from cli.data import parse_size
    from runtime.bundle import check_replaceable
    from runtime.files import check_apart, write_json
    from runtime.images import read_image

    canvas = None if size is None else parse_size(size)
    chosen = None if images is None else find_images(images)
    # The destination and the images are checked first: an export takes a while.
    check_replaceable(bundle)
    check_apart([json], [Path(checkpoint)], bundle)
    for image in chosen or ():
        read_image(image)

    from export.export import export_bundle

    result = export_bundle(checkpoint, bundle, canvas, chosen)
    if json is not None:
        write_json(json, result)
    typer.echo(_summary(bundle, result))


def find_images(folder: Path) -> list[Path]:
    """The first images of a folder, in the order of `image_files`.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    from runtime.errors import InputError
    from runtime.sources import image_files

    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; --images takes a folder of images.")
    return image_files(folder)[:PARITY_IMAGES]


def _summary(bundle: Path, result: dict[str, Any]) -> str:
    from runtime.graph import GRIDS

    height, width = result["canvas"]
    gmacs = result["gmacs"]
    lines = [
        f"{bundle} ({result['bytes'] / 1e6:.1f} MB, {height} × {width}, {sum(result['operators'].values())} nodes)",
        "GMAC per instance: " + ", ".join(f"{gmacs[str(grid)]:.4f} at {grid}" for grid in GRIDS),
        f"GMAC per image: {gmacs['detector']:.2f} for the detector",
    ]
    parity = result["parity"]
    if parity and not parity["instances"]:
        largest = max(parity["raw_outputs"].values())
        lines.append(
            f"against PyTorch: the model found no instance in {parity['images']} images, so raw outputs were compared:"
            f" largest relative difference {largest:.1e}"
        )
    elif parity:
        lines.append(
            f"against PyTorch, {parity['instances']} instances in {parity['images']} images:"
            f" boxes within {parity['box_pixels']:.1e} pixels,"
            f" scores {parity['score']:.1e}, mask probabilities {parity['mask_probability']:.1e}, {parity['other_grids']} other grids"
        )
    return "\n".join(lines)
