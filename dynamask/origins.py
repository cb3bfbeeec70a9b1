"""Weights of other libraries: recognised by their tensors' names, and converted to our conventions.

Ours are torchvision's: its names, background as class 0, RGB. Box deltas (dx, dy, dw, dh with standard deviations 0.1, 0.1, 0.2, 0.2;
1 in the RPN), the order of a cell's anchors (height over width 0.5, 1, 2), of the pyramid's levels and of the 7 x 7 region's elements are
the same in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from dynamask.backbone import CAFFE
from runtime.errors import InputError

BODY = "backbone.body."
PREDICTOR = "roi_heads.box_predictor."
MASKS = "mask_branch.heads.masks."

_COCO: tuple[str, ...] = tuple(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:])
_CLASS_LISTS = {len(_COCO): _COCO, len(_COCO) - _COCO.count("N/A"): tuple(name for name in _COCO if name != "N/A")}
"""COCO's class names by the number of classes that a head has: torchvision counts the gaps in the category ids, 90; others do not, 80."""


@dataclass(frozen=True)
class Origin:
    """A library's names and conventions."""

    name: str
    mark: str
    """A tensor that only this library's files have."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and their replacements, applied in order, from its names to ours."""
    left_out: str = r"(?!)"
    """Matches the beginning of names that are known to have no place in our model."""
    provides: tuple[str, ...] = ("backbone.", "rpn.", "roi_heads.")
    """Prefixes of our names: every tensor of ours with such a prefix must be in the file."""
    background_last: bool = False
    """Class C is background; the box deltas have no rows for it."""
    own_strides: bool = False
    """Whether its ResNets may have MSRA's strides without showing it in their batch norm."""
    note: str = ""
    """Its conventions that our model cannot follow."""

    def rename(self, name: str) -> str:
        """Our name of its tensor; if we have none, a name that the model does not have."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


_SAMPLING = (
    "it samples box features half a pixel apart from ours (RoIAlign aligned, with one sample per pixel of a bin; ours: not aligned, 2 x 2)"
    " and rounds no anchors: boxes move a little until the model is fine-tuned"
)

TORCHVISION = Origin(
    name="torchvision",
    mark="rpn.head.cls_logits.weight",
    renames=(  # its published files are older than these names of its modules
        (r"^backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)$", r"backbone.fpn.\1_blocks.\2.0.\3"),
        (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    ),
    left_out=r"roi_heads\.mask_(head|predictor)\.",
)
MMDETECTION = Origin(
    name="mmdetection",
    mark="roi_head.bbox_head.fc_cls.weight",
    renames=(
        (r"^backbone\.", BODY),
        (r"^neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
        (r"^neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
        (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
        (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
        (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
        (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
        (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
        (r"^roi_head\.bbox_head\.fc_cls\.", PREDICTOR + "cls_score."),
        (r"^roi_head\.bbox_head\.fc_reg\.", PREDICTOR + "bbox_pred."),
    ),
    left_out=r"roi_head\.mask_head\.",
    background_last=True,
    own_strides=True,
    note=_SAMPLING,
)
DYNAMASK = replace(
    MMDETECTION,
    name="the DynaMask release",
    mark="roi_head.mask_head.final_detail_logits.weight",
    renames=(
        *MMDETECTION.renames,
        (r"^roi_head\.mask_head\.instance_convs\.0\.conv\.", "mask_branch.rfpn.tiny.0."),
        (r"^roi_head\.mask_head\.instance_convs\.1\.conv\.", "mask_branch.rfpn.tiny.2."),
        (r"^roi_head\.mask_head\.stages\.0\.instance_logits\.", MASKS + "0."),
    ),
    left_out=r"roi_head\.(mask_predictor|mask_head\.(final_|stages\.[12]|stages\.0\.(?!instance_logits)))",
    note="its finer stages, edge heads and mask predictor differ from the paper's, so those keep random weights; " + _SAMPLING,
)
DETECTRON2 = Origin(
    name="Detectron2",
    mark="proposal_generator.rpn_head.anchor_deltas.weight",
    renames=(
        (r"^backbone\.bottom_up\.stem\.conv1\.norm\.", BODY + "bn1."),
        (r"^backbone\.bottom_up\.stem\.conv1\.", BODY + "conv1."),
        *((rf"^backbone\.bottom_up\.res{i + 1}\.", f"{BODY}layer{i}.") for i in range(1, 5)),
        (r"\.conv(\d)\.norm\.", r".bn\1."),
        (r"\.shortcut\.norm\.", ".downsample.1."),
        (r"\.shortcut\.", ".downsample.0."),
        *((rf"^backbone\.fpn_lateral{i + 2}\.", f"backbone.fpn.inner_blocks.{i}.0.") for i in range(4)),
        *((rf"^backbone\.fpn_output{i + 2}\.", f"backbone.fpn.layer_blocks.{i}.0.") for i in range(4)),
        (r"^proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
        (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
        (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
        (r"^roi_heads\.box_head\.fc1\.", "roi_heads.box_head.fc6."),
        (r"^roi_heads\.box_head\.fc2\.", "roi_heads.box_head.fc7."),
    ),
    left_out=r"roi_heads\.mask_head\.|pixel_(mean|std)$|proposal_generator\.anchor_generator\.",
    background_last=True,
    own_strides=True,
    note=_SAMPLING,
)
RESNET = Origin(
    name="a ResNet",
    mark="layer1.0.conv1.weight",
    renames=((r"^", BODY),),
    left_out=r"fc\.",
    provides=(BODY,),
)
EFFICIENTNET = Origin(
    name="timm's EfficientNet",
    mark="blocks.0.0.conv_dw.weight",
    renames=((r"^", BODY),),
    left_out=r"(conv_head|bn2|classifier)\.",
    provides=(BODY,),
)
EFFICIENTNET_PACKAGE = Origin(
    name="an EfficientNet package",
    mark="_conv_stem.weight",
    left_out=r"(_conv_head|_bn1|_fc)\.",
    provides=(BODY,),
)
_ORIGINS = (DYNAMASK, MMDETECTION, DETECTRON2, TORCHVISION, RESNET, EFFICIENTNET, EFFICIENTNET_PACKAGE)


def origin_of(state: Mapping[str, Tensor], file: str) -> Origin:
    """The library whose names the file has.

    Raises:
        InputError: no library has these names, or they are those of mmdetection 1, which has another layout of boxes.
    """
    for origin in _ORIGINS:
        if origin.mark in state:
            return origin
    if "bbox_head.fc_cls.weight" in state:
        raise InputError(f"{file} is of mmdetection 1: convert it to version 2 with mmdetection's upgrade_model_version.py.")
    raise InputError(
        f"{file} begins with the tensor {next(iter(state), '(none)')}, as in no backbone or Mask R-CNN known here:"
        " give weights of torchvision, timm, mmdetection or Detectron2."
    )


def our_names(origin: Origin, state: Mapping[str, Tensor], own: Sequence[str]) -> dict[str, str]:
    """The file's names -> ours, without those that are left out and batch norm's counters; `own` are the model's, in order."""
    taken = [name for name in state if not re.match(origin.left_out, name) and not is_counter(name)]
    if origin is not EFFICIENTNET_PACKAGE:
        return {name: origin.rename(name) for name in taken}
    # The packages' names are not timm's, but the order is the same.
    bodies = [name for name in own if name.startswith(BODY) and not is_counter(name)]
    return {name: bodies[i] if i < len(bodies) and _leaf(name) == _leaf(bodies[i]) else name for i, name in enumerate(taken)}


def is_counter(name: str) -> bool:
    """Whether the tensor is a counter of batch norm, which nothing here reads and some files lack."""
    return name.endswith(".num_batches_tracked")


def class_rows(foreground: int, classes: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """For each of our classes, which of a head's `foreground` classes it is; None if they are other classes.

    A head of 80 or 90 classes is taken for COCO's if all of ours are among COCO's, and ours are found by name. Otherwise as many classes
    are the same ones.
    """
    names = [str(entry["name"]) for entry in classes]
    coco = _CLASS_LISTS.get(foreground, ())
    if all(name in coco for name in names):
        return [coco.index(name) for name in names]
    return list(range(foreground)) if foreground == len(names) else None


def of_our_classes(tensors: dict[str, Tensor], rows: Sequence[int], background_last: bool, file: str) -> dict[str, Tensor]:
    """The box predictor and the mask heads with our classes only, background first; names are ours, the other tensors are kept.

    Of `cls_score` `[C + 1, ...]` and `bbox_pred` `[4 (C + 1), ...]`, or with `background_last` `[4 C, ...]` (`[4, ...]` if all classes
    share their deltas), rows are chosen and background is put first; its deltas are never used, and 0 where there were none.

    Raises:
        InputError: the deltas are of another number of classes, or of other boxes.
    """
    changed = dict(tensors)
    foreground, deltas_rows = len(tensors[PREDICTOR + "cls_score.bias"]) - 1, len(tensors[PREDICTOR + "bbox_pred.bias"])
    if deltas_rows not in ((4 * foreground, 4) if background_last else (4 * foreground + 4,)):
        raise InputError(f"{file} has {deltas_rows} box deltas for {foreground} classes: give weights of a detector of upright boxes.")
    for kind in ("weight", "bias"):
        scores, deltas = tensors[f"{PREDICTOR}cls_score.{kind}"], tensors[f"{PREDICTOR}bbox_pred.{kind}"]
        deltas = deltas.reshape(-1, 4, *deltas.shape[1:])
        if background_last:
            scores = torch.cat([scores[-1:], scores[:-1]])
            deltas = torch.cat([torch.zeros_like(deltas[:1]), deltas.expand(foreground, *deltas.shape[1:])])
        chosen = [0, *(row + 1 for row in rows)]
        changed[f"{PREDICTOR}cls_score.{kind}"] = scores[chosen]
        changed[f"{PREDICTOR}bbox_pred.{kind}"] = deltas[chosen].flatten(0, 1)
    for name, tensor in tensors.items():
        if name.startswith(MASKS) and len(tensor) == foreground:
            changed[name] = tensor[list(rows)]
    return changed


@dataclass(frozen=True)
class Pixels:
    """The normalisation of a model's input, `(value of 0..255 - mean) / std`; mean and std in the order R, G, B."""

    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    bgr: bool = False

    def __str__(self) -> str:
        return f"{'BGR' if self.bgr else 'RGB'}, mean {self.mean} and std {self.std} in the order R, G, B"


def resnet_pixels(origin: Origin, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], backbone: str, file: str) -> Pixels:
    """The input that a ResNet's weights expect.

    Batch norm folded to scale and shift tells weights that descend from MSRA's or Detectron's: BGR, in the ResNets with std 1 and a
    stage's stride in its first 1 x 1 convolution. Detectron2's `pixel_mean` and `pixel_std`, where the file has them, come before that.

    Args:
        origin: the library whose names `state`, the file's tensors, has.
        tensors: the same, by our names.
        backbone: the model's, as in its configuration.
        file: for the messages.

    Raises:
        InputError: the model's backbone has its strides elsewhere.
    """
    folded = origin is not TORCHVISION and _folded(tensors)
    resnext = backbone.startswith("resnext")
    caffe = backbone.endswith(CAFFE)
    if folded and not resnext and not caffe:
        raise InputError(
            f"{file} descends from MSRA's ResNet, with a stage's stride in its first 1 x 1 convolution:"
            f" --set model.backbone={backbone}{CAFFE}."
        )
    if caffe and not folded and not origin.own_strides:
        raise InputError(f"{file} has a stage's stride in its 3 x 3 convolution: --set model.backbone={backbone.removesuffix(CAFFE)}.")
    if "pixel_mean" in state and "pixel_std" in state:
        mean, std = (tuple(round(value, 3) for value in state[name].flatten().tolist()) for name in ("pixel_mean", "pixel_std"))
        bgr = mean[0] < mean[-1]  # ImageNet is redder than blue
        return Pixels(mean[::-1], std[::-1], bgr) if bgr else Pixels(mean, std, bgr)
    if caffe:
        return Pixels(std=(1.0, 1.0, 1.0), bgr=True)
    return Pixels(bgr=folded)


def for_our_pixels(weight: Tensor, pixels: Pixels, mean: Sequence[float], std: Sequence[float], file: str) -> Tensor:
    """The first convolution `[O, 3, k, k]` for our input, RGB of 0..1 less `mean`, over `std`, instead of the source's.

    Raises:
        InputError: the means differ, which a convolution without bias cannot make up for.
    """
    if any(abs(255 * ours - theirs) > 0.01 for ours, theirs in zip(mean, pixels.mean, strict=True)):
        means = [round(value / 255, 3) for value in pixels.mean]
        raise InputError(f"{file} is for images less the mean {means}, the model's is {list(mean)}: --set 'model.mean={means}'.")
    scale = 255 * torch.tensor(std, dtype=torch.float64) / torch.tensor(pixels.std, dtype=torch.float64)
    return (weight.flip(1) if pixels.bgr else weight) * scale.to(weight.dtype)[:, None, None]


def without_epsilon(tensors: dict[str, Tensor], epsilon: float) -> dict[str, Tensor]:
    """Batch norm of a body that was trained with an epsilon of 0, for one that adds `epsilon` to the variance: in the scale."""
    changed = dict(tensors)
    for name, variance in tensors.items():
        if name.startswith(BODY) and name.endswith(".running_var"):
            scale = name.removesuffix("running_var") + "weight"
            changed[scale] = tensors[scale] * torch.sqrt((variance + epsilon) / variance)
    return changed


def _folded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the first batch norm has only scale and shift, its statistics being those of no data."""
    mean, variance, shift = (tensors[f"{BODY}bn1.{name}"] for name in ("running_mean", "running_var", "bias"))
    return bool((mean == 0).all() and (variance.max() - variance.min() < 1e-6) and (shift != 0).any())


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
