"""Pictures of a model in training: the grids chosen (Figures 7 and 8), edge maps, training curves; all `[H, W, 3] uint8` RGB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dynamask.config import Config
from dynamask.data.canvas import to_canvas
from dynamask.data.coco import InstanceDataset
from dynamask.losses import edge_target
from dynamask.mask_targets import grid_targets
from dynamask.model import DynaMask
from dynamask.roi import image_rois
from dynamask.train.evaluate import detect
from runtime.annotate import GRID_COLORS, annotate
from runtime.files import atomic_path
from runtime.graph import GRIDS
from runtime.preprocess import resize, scaled_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from runtime.instances import Instances

Image = npt.NDArray[np.uint8]

SHOWN_SCORE = 0.3
"""Detections that score less are neither drawn nor counted."""
SIDE = 640
"""Longest side of a drawn image, pixels."""
CELL = GRIDS[-1]
"""Side of an edge map, pixels."""
GAP = 6
"""Between images and edge maps, pixels."""
BACKGROUND = 32
MOST_CLASSES = 30
POINTS = 300
"""On a training curve; each is the mean of its steps."""


def draw_pictures(
    model: DynaMask,
    dataset: InstanceDataset,
    config: Config,
    log: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
) -> dict[str, Image]:
    """`selection`, `classes`, `edges` of the first `train.pictures` images of a data set that have instances, and `curves`.

    A Mask R-CNN head has no `edges`. The model keeps its mode (training or evaluation).

    Args:
        log: the run's steps, lines of `log.jsonl`.
        evaluations: the run's evaluations.
    """
    items = [dataset[index] for index in dataset.indices_with_instances[: config.train.pictures]]
    training = model.training
    model.eval()
    try:
        found = [detect(model, image, config, model.classes) for image, _ in items]
        edges = {"edges": edge_maps(model, items, config)} if model.mask_branch.msm is not None else {}
    finally:
        model.train(training)
    return {
        "selection": grid_selection([image for image, _ in items], found),
        "classes": class_shares(found),
        **edges,
        "curves": training_curves(log, evaluations),
    }


def grid_selection(images: Sequence[Image], found: Sequence[Instances]) -> Image:
    """Images side by side, two in a row, their instances coloured by grid (Figure 7)."""
    tiles = []
    for image, instances in zip(images, found, strict=True):
        drawn = annotate(image, instances, SHOWN_SCORE)
        scale = min(1.0, SIDE / max(drawn.shape[:2]))
        tiles.append(resize(drawn, *scaled_size(drawn.shape[0], drawn.shape[1], scale), scale))
    return _tiled(tiles, columns=2)


def class_shares(found: Sequence[Instances]) -> Image:
    """Share of each grid among the detections of each class, one bar per class, those with most of 112 on top (Figure 8)."""
    names: list[str] = []
    grids: list[int] = []
    for instances in found:
        shown = instances[np.asarray(instances.scores) >= SHOWN_SCORE]
        names += [shown.classes[label].name for label in shown.labels]
        grids += shown.grids.tolist()
    counts = {name: [sum(n == name and g == grid for n, g in zip(names, grids, strict=True)) for grid in GRIDS] for name in set(names)}
    rows = sorted(counts, key=lambda name: ([-count / sum(counts[name]) for count in reversed(counts[name])], name))[:MOST_CLASSES]
    figure = Figure(figsize=(7, 1.4 + 0.28 * max(len(rows), 2)), dpi=100, layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for k, grid in enumerate(GRIDS):
        shares = np.array([100 * counts[name][k] / sum(counts[name]) for name in rows])
        axes.barh(range(len(rows)), shares, left=left, color=_color(grid), label=f"{grid} × {grid}")
        left += shares
    axes.set_yticks(range(len(rows)), [f"{name} ({sum(counts[name])})" for name in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of each grid, %")
    axes.set_title(f"{len(grids)} detections that score {SHOWN_SCORE} or more, {len(found)} images", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(GRIDS), frameon=False)
    return _rendered(figure)


@torch.no_grad()
def edge_maps(model: DynaMask, items: Sequence[tuple[Image, dict[str, Any]]], config: Config) -> Image:
    """One row per image: its largest instance, then at each grid the edge target (Eq. 4) and the edge predicted in the true box."""
    device, sizes = next(model.parameters()).device, config.model
    rows = [_header()]
    for image, target in items:
        canvas, placed = to_canvas(image, target, *sizes.canvas, sizes.mean, sizes.std)
        if not len(placed["labels"]):
            continue
        largest = int(placed["masks"].sum(dim=(1, 2)).argmax())
        rois = image_rois(placed["boxes"][largest, None].to(device))
        pyramid = model.backbone(canvas[None].to(device))
        logits = model.mask_branch.edge_logits(pyramid, rois)
        targets = grid_targets(placed["masks"][largest, None].to(device), rois)
        cells = [_crop(canvas.permute(1, 2, 0).numpy() * sizes.std + sizes.mean, placed["boxes"][largest].tolist())]
        for predicted, mask in zip(logits, targets, strict=True):
            for edge in (edge_target(mask)[0], predicted[0].sigmoid()):
                cells.append(_cell(edge.float().cpu().numpy()))
        rows.append(_tiled(cells, columns=len(cells)))
    return _tiled(rows, columns=1)


def training_curves(log: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> Image:
    """Losses, learning rate, share of each grid among the sampled instances, and AP, over the epochs."""
    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    (losses, rate), (share, precision) = figure.subplots(2, 2)
    chunks = [chunk for chunk in np.array_split(np.array(log, dtype=object), POINTS) if len(chunk)]
    _curve(losses, chunks, "total", lambda line: line["loss"], "black")
    for name in dict.fromkeys(name for line in log for name in line["losses"]):
        _curve(losses, chunks, name.removeprefix("loss_"), lambda line, name=name: line["losses"].get(name))
    _curve(rate, chunks, "rate", lambda line: line["rate"], "black")
    for grid in GRIDS:
        _curve(share, chunks, f"{grid}", lambda line, grid=grid: line["statistics"].get(f"share_{grid}"), _color(grid))
    evaluated = [entry for entry in evaluations if "segm" in entry]
    for name, label in (("segm", "mask AP"), ("bbox", "box AP")):
        precision.plot(
            [entry["epoch"] for entry in evaluated], [entry[name]["AP"] or 0.0 for entry in evaluated], "o-", markersize=3, label=label
        )
    precision.set_visible(bool(evaluated))
    for axes, title in (
        (losses, "losses"),
        (rate, "learning rate"),
        (share, "share of each grid"),
        (precision, "AP on the validation images"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes is not rate and axes.lines:
            axes.legend(fontsize=8)
    share.set_ylim(-0.02, 1.02)
    precision.set_ylim(bottom=0)
    return _rendered(figure)


def write_png(path: Path, image: Image) -> None:
    """Write `[H, W, 3] uint8` RGB as a PNG file, whole or not at all.

    Raises:
        DynaMaskError: the disk is full or the folder cannot be written.
    """
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.tobytes())


def _curve(axes: Axes, chunks: Sequence[Any], label: str, value: Any, color: Any = None) -> None:
    """A line through the means of the chunks in which there is a value."""
    points = []
    for chunk in chunks:
        values = [value(line) for line in chunk if value(line) is not None]
        if values:
            points.append((chunk[-1]["epoch"], sum(values) / len(values)))
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.2)


def _rendered(figure: Figure) -> Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _color(grid: int) -> tuple[float, float, float]:
    red, green, blue = GRID_COLORS[grid]
    return red / 255, green / 255, blue / 255


def _tiled(tiles: Sequence[Image], columns: int) -> Image:
    """Tiles in rows of `columns`, each row as high as its highest, a gap between them."""
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.shape[0] for tile in row) for row in rows]
    widths = [sum(tile.shape[1] for tile in row) + GAP * (len(row) - 1) for row in rows]
    sheet = np.full((sum(heights) + GAP * (len(rows) - 1), max(widths), 3), BACKGROUND, np.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for tile in row:
            sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
            left += tile.shape[1] + GAP
        top += height + GAP
    return sheet


def _header() -> Image:
    cells = []
    for name in ("image", *(f"{kind} {grid}" for grid in GRIDS for kind in ("target", "edge"))):
        cell = np.full((18, CELL, 3), BACKGROUND, np.uint8)
        cv2.putText(cell, name, (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
        cells.append(cell)
    return _tiled(cells, columns=len(cells))


def _crop(pixels: npt.NDArray[Any], box: Sequence[float]) -> Image:
    """The part of an image `[H, W, 3]` of 0 to 1 that is in the box, stretched to a cell as the mask grid stretches it."""
    x0, y0, x1, y1 = (round(edge) for edge in box)
    crop = np.clip(pixels[y0:y1, x0:x1] * 255, 0, 255).astype(np.uint8)
    return np.asarray(cv2.resize(crop, (CELL, CELL), interpolation=cv2.INTER_LINEAR), np.uint8)


def _cell(edge: npt.NDArray[Any]) -> Image:
    """An edge map `[G, G]` of 0 to 1 in grey, each of its cells a square."""
    grey = np.repeat(np.repeat(edge, CELL // len(edge), axis=0), CELL // len(edge), axis=1)
    return np.repeat(np.round(grey * 255).astype(np.uint8)[..., None], 3, axis=2)
