"""The mask branches as ONNX graphs of their own, and their times in ONNX Runtime, in turns."""

from __future__ import annotations

import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from dynamask.baselines import MaskRCNNBranch
from dynamask.config import PRESETS, ModelConfig
from dynamask.detector import Detections
from dynamask.fam import FUSIONS
from dynamask.mask_branch import MaskBranch
from dynamask.model import build_mask_branch
from dynamask.roi import image_rois
from export.deform_conv_fallback import replace_deform_conv
from export.graph import OPSET
from runtime.bench import random_boxes, spread
from runtime.errors import InputError
from runtime.graph import DETECTIONS, GRIDS, PYRAMID
from runtime.machine import machine
from runtime.targets.onnxruntime import PROVIDERS, has_deform_conv
from runtime.targets.ort import ort
from runtime.timing import take_turns

PEER = "Mask R-CNN 28"
CLASSES = 80
CANVASES = {"lite0": (384, 384), "r50": (800, 1344)}
STRIDES = (4, 8, 16, 32)
CONTROLS = ("budget", "grid_override")
"""The inputs of the mask branch besides the pyramid and the detections."""


class _Dynamic(nn.Module):
    def __init__(self, branch: MaskBranch, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.branch, self.canvas = branch, canvas

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        pyramid, detections, (budget, override) = inputs[:4], Detections(*inputs[4:7]), inputs[7:]
        masks = self.branch.segment(pyramid, detections, self.canvas, self.branch.gmac_budget(budget), override)
        return (masks.grids, *masks.slots, *masks.logits)


class _MaskRCNN(nn.Module):
    def __init__(self, branch: MaskRCNNBranch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores, labels = inputs[4:]
        slots = torch.nonzero(scores > 0)[:, 0]
        rois = image_rois(boxes.index_select(0, slots))
        (logits,) = self.branch.mask_logits(inputs[:4], rois, labels.index_select(0, slots))
        return slots, logits


def bench_mask_branch(
    preset: str, fusions: Sequence[str], instances: int, distribution: Sequence[float], threads: int, repeats: int, seed: int = 0
) -> dict[str, Any]:
    """Time a preset's mask branch with each fusion, and Mask R-CNN's head at 28 x 28, all with random weights.

    Args:
        preset: a preset with a canvas here, `lite0` (384 x 384) or `r50` (800 x 1344).
        fusions: values of `model.fusion`.
        instances: filled detection slots.
        distribution: shares of the instances at 14, 28, 56 and 112.
        threads: of ONNX Runtime; they do not spin.
        repeats: timed rounds; figures are medians.

    Returns:
        `peer_ms`; and by fusion `routed_ms`, `ratio` (routed over the peer's), `uniform_ms` by grid, `mean_gmacs`.

    Raises:
        InputError: no such preset or fusion, or the other numbers are out of range.
    """
    if preset not in CANVASES:
        raise InputError(f"{preset} has no canvas here: give {' or '.join(CANVASES)}.")
    for fusion in fusions:
        if fusion not in FUSIONS:
            raise InputError(f"{fusion} is no fusion: choose among {', '.join(FUSIONS)}.")
    canvas, random = CANVASES[preset], np.random.default_rng(seed)
    model = PRESETS[preset].model_copy(update={"canvas": canvas})
    counts = spread(instances, distribution)
    values = _values(model, instances, random)
    overrides: dict[str, npt.NDArray[np.int64]] = {f"uniform {grid}": np.full(instances, index) for index, grid in enumerate(GRIDS)}
    overrides["routed"] = random.permutation(np.repeat(np.arange(len(GRIDS)), counts))
    torch.manual_seed(seed)
    peer = build_mask_branch(model.model_copy(update={"mask_head": "maskrcnn", "mask_grid": 28}), CLASSES)
    assert isinstance(peer, MaskRCNNBranch)
    calls = {PEER: _binder(_MaskRCNN(peer), values, threads)(None)}
    gmacs = {}
    for fusion in fusions:
        branch = build_mask_branch(model.model_copy(update={"fusion": fusion}), CLASSES)
        gmacs[fusion] = float(np.dot(counts, branch.grid_gmacs())) / instances
        controls: dict[str, npt.NDArray[Any]] = dict(zip(CONTROLS, (np.array(0, np.float32), overrides["routed"]), strict=True))
        bind = _binder(_Dynamic(branch, canvas), values | controls, threads)
        calls |= {f"{fusion} {name}": bind(override) for name, override in overrides.items()}
    times = {name: statistics.median(elapsed) for name, elapsed in take_turns(calls, repeats).items()}
    return {
        "canvas": list(canvas),
        "peer_ms": times[PEER],
        "fusions": {
            fusion: {
                "routed_ms": times[f"{fusion} routed"],
                "ratio": times[f"{fusion} routed"] / times[PEER],
                "uniform_ms": {str(grid): times[f"{fusion} uniform {grid}"] for grid in GRIDS},
                "mean_gmacs": gmacs[fusion],
            }
            for fusion in fusions
        },
        "instances": instances,
        "distribution": counts,
        "repeats": repeats,
        "threads": threads,
        "machine": machine(),
    }


def _values(model: ModelConfig, instances: int, random: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    """Random features, boxes and labels by the names of the mask branch's inputs."""
    height, width = model.canvas
    features = [random.standard_normal((1, model.fpn_channels, height // s, width // s), np.float32) for s in STRIDES]
    scores = np.sort(random.uniform(0.5, 1, instances).astype(np.float32))[::-1].copy()
    boxes, labels = random_boxes(instances, height, width, random), random.integers(0, CLASSES, instances)
    return dict(zip((*PYRAMID, *DETECTIONS), (*features, boxes, scores, labels), strict=True))


def _binder(module: nn.Module, values: dict[str, npt.NDArray[Any]], threads: int) -> Callable[[Any], Callable[[], Any]]:
    """A function that takes a `grid_override`, or None, and gives a call of the module in ONNX Runtime."""
    session = _session(module, values, threads)
    names = {value.name for value in session.get_inputs()}

    def bind(override: npt.NDArray[np.int64] | None) -> Callable[[], Any]:
        given = values if override is None else {**values, "grid_override": override}
        feed = {name: value for name, value in given.items() if name in names}
        return lambda: session.run(None, feed)

    return bind


def _session(module: nn.Module, values: dict[str, npt.NDArray[Any]], threads: int) -> Any:
    example = tuple(torch.from_numpy(value) for value in values.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, opset_version=OPSET, input_names=list(values), verbose=False, optimize=True
        )
        assert program is not None
        model = onnx.shape_inference.infer_shapes(program.model_proto)
        if not has_deform_conv():
            replace_deform_conv(model)
        path = Path(folder, "branch.onnx")
        onnx.save(model, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return ort.InferenceSession(str(path), options, providers=PROVIDERS)
