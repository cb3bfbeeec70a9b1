"""`dynamask bench`: the mask branch, and a whole frame beside another model."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from cli.options import BundleFolder, Json, Target

if TYPE_CHECKING:
    from runtime.bench import Eager, Frame
    from runtime.bundle import Manifest

app = typer.Typer(help="Latency of the mask branch, or of a whole frame beside another model.", no_args_is_help=True)

DRAWN_IMAGES = 8
"""Number of images of shapes that are drawn if no folder is given."""


class Peer(str, enum.Enum):
    """The other model."""

    maskrcnn = "torchvision-maskrcnn"


class PeerSize(str, enum.Enum):
    """The peer's input size: the bundle's canvas, or the peer's usual size (shorter side 800, longer side at most 1333)."""

    same = "same"
    usual = "usual"


@app.command()
def routing(
    bundle: BundleFolder,
    instances: Annotated[int, typer.Option(help="Number of instances in the image.")] = 100,
    distribution: Annotated[str, typer.Option(metavar="A,B,C,D", help="Shares of the instances at 14, 28, 56 and 112.")] = "35,34,21,10",
    repeats: Annotated[int, typer.Option(help="Timed rounds; the figures are medians.")] = 20,
    checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The checkpoint or preset that the bundle was exported from; its mask branch in PyTorch is timed too."),
    ] = None,
    target: Target = "auto",
    threads: Annotated[Optional[int], typer.Option(min=1, help="CPU threads of the engine, and of PyTorch; all cores by default.")] = None,  # noqa: UP045
    json: Json = None,
) -> None:
    """Mask-branch latency: routed, and with all instances at one grid.

    Example: dynamask bench routing lite0.bundle --instances 100 --distribution 35,34,21,10
    """
    from runtime.bench import bench_routing
    from runtime.files import check_apart, write_json
    from runtime.predictor import load

    check_apart([json], bundle=bundle)
    parts = parse_distribution(distribution)
    with load(bundle, target, threads=threads) as predictor:
        eager = None if checkpoint is None else _eager(checkpoint, predictor.bundle.manifest, threads)
        result = bench_routing(predictor.engine, instances, parts, repeats, eager)
    _print_routing(result)
    if json is not None:
        write_json(json, result)


@app.command()
def latency(
    bundle: BundleFolder,
    against: Annotated[Peer, typer.Option(help="The other model, with random weights, in PyTorch on the CPU.")] = Peer.maskrcnn,
    peer_size: Annotated[
        PeerSize, typer.Option(help="The other model's input: same is the bundle's canvas, usual is 800 x 1333.")
    ] = PeerSize.same,
    images: Annotated[Optional[Path], typer.Option(help="A folder of images; drawn shapes by default.")] = None,  # noqa: UP045
    repeats: Annotated[int, typer.Option(help="Rounds over the images.")] = 3,
    target: Target = "auto",
    threads: Annotated[Optional[int], typer.Option(min=1, help="CPU threads of the engine, and of PyTorch; all cores by default.")] = None,  # noqa: UP045
    json: Json = None,
) -> None:
    """Latency of a frame, from the decoded image to pasted masks, beside another model on the same images.

    Example: dynamask bench latency lite0.bundle --against torchvision-maskrcnn
    """
    from runtime.bench import bench_latency
    from runtime.files import check_apart, write_json
    from runtime.predictor import load

    check_apart([json], bundle=bundle)
    with load(bundle, target, threads=threads) as predictor:
        manifest = predictor.bundle.manifest
        peer = _maskrcnn(manifest, peer_size, threads)
        result = bench_latency(predictor, frames(images, manifest), {against.value: peer}, repeats)
    result["peer_size"] = peer_size.value
    _print_latency(result)
    if json is not None:
        write_json(json, result)


def parse_distribution(distribution: str) -> list[float]:
    """`"35,34,21,10"` as numbers.

    Raises:
        InputError: a part is no number.
    """
    from runtime.errors import InputError

    try:
        return [float(part) for part in distribution.split(",")]
    except ValueError:
        raise InputError(f"--distribution {distribution} is not four numbers; write them as in 35,34,21,10.") from None


def frames(folder: Path | None, manifest: Manifest) -> list[Any]:
    """The images of a folder, or drawn shapes of the canvas's size, `[H, W, 3] uint8` RGB."""
    if folder is not None:
        from cli.export import find_images
        from runtime.images import read_image

        return [read_image(path) for path in find_images(folder)]

    import numpy as np

    from dynamask.data.shapes import draw_image

    return [draw_image(np.random.default_rng([i]), *manifest.canvas)[0] for i in range(DRAWN_IMAGES)]


def _eager(checkpoint: str, manifest: Manifest, threads: int | None) -> Eager:
    """PyTorch's mask branch, eager, with torchvision's deformable convolution, on the engine's inputs."""
    import torch

    from dynamask.deform_conv import DeformConv2d
    from dynamask.detector import Detections
    from export.export import read_model
    from runtime.errors import InputError
    from runtime.machine import usable_cores

    model, _ = read_model(checkpoint)
    preset, classes = model.config.model.preset, len(model.classes)
    if preset != manifest.preset or classes != len(manifest.classes):
        ours, theirs = f"{preset}, {classes} classes", f"{manifest.preset}, {len(manifest.classes)} classes"
        raise InputError(f"{checkpoint} ({ours}) is not the checkpoint that the bundle ({theirs}) was exported from; give that one.")
    torch.set_num_threads(threads or usable_cores())
    branch = model.mask_branch
    for module in branch.modules():
        if isinstance(module, DeformConv2d):
            module.by_torchvision = True
    no_budget = branch.gmac_budget()

    @torch.inference_mode()
    def eager(features: Any, boxes: Any, scores: Any, labels: Any, grid_override: Any) -> None:
        pyramid = [torch.from_numpy(feature) for feature in features]
        detections = Detections(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels))
        branch.segment(pyramid, detections, manifest.canvas, no_budget, torch.from_numpy(grid_override))

    return eager


def _maskrcnn(manifest: Manifest, size: PeerSize, threads: int | None) -> Frame:
    """torchvision's Mask R-CNN with a ResNet-50 and random weights, which pastes its masks as the predictor does."""
    import torch
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    from runtime.machine import usable_cores

    torch.set_num_threads(threads or usable_cores())
    limits = {"min_size": min(manifest.canvas), "max_size": max(manifest.canvas)} if size is PeerSize.same else {}
    peer = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **limits).eval()

    @torch.inference_mode()
    def frame(image: Any) -> int:
        tensor = torch.from_numpy(image).permute(2, 0, 1).float().div_(255)
        return len((peer([tensor])[0]["masks"] > 0.5).flatten(1).any(1))

    return frame


def _print_routing(result: dict[str, Any]) -> None:
    spread = " / ".join(str(count) for count in result["distribution"])
    typer.echo(f"mask branch, {result['instances']} instances, {spread} at 14 / 28 / 56 / 112; medians of {result['repeats']}")
    rows = [("routed", result["routed_ms"]), *((f"all at {grid}", time) for grid, time in result["uniform_ms"].items())]
    if "engine_speedup" in result:
        rows += [("PyTorch eager, routed", result["eager_routed_ms"]), ("PyTorch eager, all at 112", result["eager_largest_ms"])]
    for name, time in rows:
        typer.echo(f"{name:26}{time:10.2f} ms")
    typer.echo(f"{'routed / all at 112':26}{result['ratio']:10.3f}    by counted cost {result['gmacs_ratio']:.3f}")
    if "engine_speedup" in result:
        speedup = result["engine_speedup"]
        typer.echo(f"{'eager / engine':26}{speedup['routed']:10.2f}    all at 112: {speedup['largest']:.2f}")


def _print_latency(result: dict[str, Any]) -> None:
    typer.echo(f"from decoded frame to pasted masks, {result['images']} images, {result['repeats']} times each; medians")
    for name, title in (("engine", "DynaMask"), ("peer", result["peer"])):
        time, rate, instances = (result[f"{name}_{figure}"] for figure in ("ms", "fps", "instances"))
        typer.echo(f"{title:22}{time:9.1f} ms  {rate:6.1f} frames/s  {instances:5.1f} instances")
    typer.echo(f"{'ratio':22}{result['ratio']:9.3f}")
