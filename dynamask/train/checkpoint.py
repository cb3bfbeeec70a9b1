"""Checkpoints: weights with the run's configuration and classes beside them, and the state a run resumes from. Both are safetensors."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dynamask.config import Config, parse_config, with_current_names
from dynamask.train.transfer import with_rows_of_classes
from runtime.errors import InputError, first_line, is_unicode, shortened
from runtime.files import atomic_path, input_path

FORMAT_VERSION = 1
_KEY = "dynamask"
_WEIGHTS = "weights."
_MOMENTUM = "momentum."
_EARLIER_KEYS = {
    "lessons": "calibration",
    "taught": "calibrated",
    "wanted": "requested",
    "allowed_cost": "target_gmacs",
    "mean_cost": "mean_gmacs",
    "explained": "variance_explained",
}
"""Keys by the names that they had in the `progress` of earlier versions."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file."""

    config: Config
    classes: list[dict[str, Any]]
    """`{"id": category id, "name": str}` in order of label - 1."""
    tensors: dict[str, Tensor]
    """The model's `state_dict`, float32 whatever precision the file had."""
    extra: dict[str, Any]
    """Step, epoch and metrics, as the writer gave them."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on."""

    config: Config
    classes: list[dict[str, Any]]
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]
    """SGD's momentum buffer of each parameter that has one, by the parameter's name."""
    scaler: dict[str, Any]
    """`GradScaler.state_dict()`; empty where there is no mixed precision."""
    progress: dict[str, Any]
    """Steps done, evaluations so far, seconds, as plain JSON."""


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    config: Config,
    classes: list[dict[str, Any]],
    extra: dict[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write the model's weights to `path` (safetensors), whole or not at all; `half` stores the float ones as float16.

    Raises:
        DynaMaskError: the disk is full or the folder cannot be written; what stood at `path` is still there.
    """
    tensors = _plain(model.state_dict())
    if half:
        tensors = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in tensors.items()}
    _write(path, "checkpoint", tensors, {"config": config.model_dump(mode="json"), "classes": classes, "extra": extra or {}})


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, on the CPU.

    Raises:
        InputError: the file is missing, cut short, not a DynaMask checkpoint, of a newer format, or its metadata are damaged.
    """
    tensors, fields = _read(path, "checkpoint")
    tensors = {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}
    return Checkpoint(parse_config(with_current_names(fields["config"], str(path)), str(path)), fields["classes"], tensors, fields["extra"])


def load_model(path: str | os.PathLike[str]) -> tuple[nn.Module, Config, list[dict[str, Any]]]:
    """The model of a checkpoint, on the CPU and in evaluation mode, with its configuration and classes.

    Raises:
        InputError: as `load_checkpoint`, and when the tensors do not fit the model that the configuration describes.
    """
    from dynamask.model import build_model

    checkpoint = load_checkpoint(path)
    try:
        # On the meta device, tensors have shapes and take no memory: a damaged configuration may describe a model that no memory holds.
        with torch.device("meta"):
            expected = build_model(checkpoint.config, checkpoint.classes).state_dict()
    except Exception as error:  # torch and torchvision raise RuntimeError, TypeError and others for sizes that fit nothing.
        fault = shortened(first_line(error))
        raise InputError(f"{path}: no model can be built as its configuration says ({fault}); use another checkpoint.") from error
    _check_fit(expected, checkpoint.tensors, path)
    model = build_model(checkpoint.config, checkpoint.classes)
    model.load_state_dict(checkpoint.tensors)
    return model.eval(), checkpoint.config, checkpoint.classes


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load a whole `state_dict` into the model.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape or kind of numbers; names the first. The model is then unchanged.
    """
    _check_fit(model.state_dict(), tensors, path)
    model.load_state_dict(tensors)


def _check_fit(expected: dict[str, Tensor], tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            fault = "lacks" if name in expected else "holds, unknown to the model,"
            raise InputError(
                f"{path} {fault} the tensor {shortened(name)}: it was made by another version of the model; train or export it again."
            )
        if tensors[name].shape != expected[name].shape:
            shapes = f"{list(tensors[name].shape)} where the model has {list(expected[name].shape)}"
            raise InputError(f"{path}: the tensor {name} is {shapes}; the file's configuration is not the one it was trained with.")
        if _kind(tensors[name]) != _kind(expected[name]):
            types = f"{tensors[name].dtype} where the model has {expected[name].dtype}"
            raise InputError(f"{path}: the tensor {name} is {types}: the file is damaged; copy it again or use another checkpoint.")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """Whether its values are real numbers, and whether they are complex: other conversions keep their meaning."""
    return tensor.is_floating_point(), tensor.is_complex()


def start_from(
    model: nn.Module,
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    without: str | None = None,
    classes: list[dict[str, Any]] | None = None,
) -> list[str]:
    """Copy the tensors whose name and shape fit, for fine-tuning; returns the names of the model's other tensors.

    Args:
        model: changed in place.
        checkpoint: of a model of the same preset.
        classes: the model's; with them, layers that depend on the classes are taken over too (`with_rows_of_classes`).
        path: of the checkpoint, for the message.
        without: prefix of the names of tensors that are left out.

    Raises:
        InputError: nothing fits.
    """
    expected = model.state_dict()
    tensors = checkpoint.tensors if classes is None else with_rows_of_classes(checkpoint.tensors, checkpoint.classes, classes)
    offered = {name: tensor for name, tensor in tensors.items() if without is None or not name.startswith(without)}
    fitting = {name: tensor for name, tensor in offered.items() if name in expected and _fits(tensor, expected[name])}
    if not fitting:
        raise InputError(f"{path} has no tensor that fits this model (it holds a {checkpoint.config.model.preset}): choose its preset.")
    model.load_state_dict(fitting, strict=False)
    return [name for name in expected if name not in fitting]


def _fits(tensor: Tensor, expected: Tensor) -> bool:
    return tensor.shape == expected.shape and _kind(tensor) == _kind(expected)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a DynaMask checkpoint, rather than weights from elsewhere."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def save_state(path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write what a run resumes from: the weights, the optimiser's momentum, and `state` (config, classes, scaler, progress) as JSON.

    The weights are here as well as in the checkpoint, so that one rename replaces weights and momentum together.

    Raises:
        DynaMaskError: the disk is full or the folder cannot be written; what stood at `path` is still there.
    """
    tensors = {_WEIGHTS + name: tensor for name, tensor in _plain(model.state_dict()).items()}
    buffers = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters() if _has_momentum(optimizer, p)}
    tensors |= {_MOMENTUM + name: tensor for name, tensor in _plain(buffers).items()}
    _write(path, "state", tensors, state)


def load_state(path: str | os.PathLike[str]) -> TrainingState:
    """Read what `save_state` wrote.

    Raises:
        InputError: the file is missing, cut short, not a training state, or of a newer format.
    """
    tensors, fields = _read(path, "state")
    return TrainingState(
        config=parse_config(with_current_names(fields["config"], str(path)), str(path)),
        classes=fields["classes"],
        weights=_under(tensors, _WEIGHTS),
        momentum=_under(tensors, _MOMENTUM),
        scaler=fields["scaler"],
        progress=_with_current_keys(fields["progress"]),
    )


def restore_momentum(model: nn.Module, optimizer: torch.optim.Optimizer, momentum: dict[str, Tensor]) -> None:
    """Give each parameter its momentum buffer back."""
    for name, parameter in model.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter).copy_(momentum[name])  # keeps the parameter's device and memory format
            optimizer.state[parameter]["momentum_buffer"] = buffer


def _with_current_keys(value: Any) -> Any:
    """Plain JSON in which keys have the names of this version, at every depth."""
    if isinstance(value, dict):
        return {_EARLIER_KEYS.get(key, key): _with_current_keys(item) for key, item in value.items()}
    return [_with_current_keys(item) for item in value] if isinstance(value, list) else value


def _has_momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    return optimizer.state.get(parameter, {}).get("momentum_buffer") is not None


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors stores no memory format and no shared storage."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _write(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    metadata = {_KEY: kind, "format": str(FORMAT_VERSION), **{name: json.dumps(value) for name, value in fields.items()}}
    with atomic_path(path) as temporary:
        # Written by Python, because the error of safetensors for a full disk is no OSError.
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))


def _read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not input_path(path).is_file():
        fault = "is a folder" if Path(path).is_dir() else "does not exist"
        raise InputError(f"{path} {fault}: give the path of a {kind} that `dynamask train` wrote.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get(_KEY) != kind:
                raise InputError(f"{path} is not a DynaMask {kind}: give a file that `dynamask train` wrote.")
            if int(metadata["format"]) > FORMAT_VERSION:
                raise InputError(f"{path} has format {metadata['format']}, this version reads up to {FORMAT_VERSION}: update dynamask.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        expected = {"checkpoint": ("config", "classes", "extra"), "state": ("config", "classes", "scaler", "progress")}[kind]
        fields = {name: json.loads(metadata[name]) for name in expected}
        _check_fields(fields)
        return tensors, fields
    except (OSError, safetensors.SafetensorError, AttributeError, KeyError, ValueError, RecursionError) as error:
        # AttributeError: PyTorch lacks a type of numbers that safetensors knows.
        fault = shortened(first_line(error))
        raise InputError(f"{path} cannot be read ({fault}): it is damaged or cut short; copy it again or use another {kind}.") from error


def _check_fields(fields: dict[str, Any]) -> None:
    """Raise ValueError unless the classes are classes, and the other fields JSON objects."""
    for name, value in fields.items():
        if name != "classes" and not isinstance(value, dict):
            raise ValueError(f"{name} is not a JSON object")
    classes = fields["classes"]
    if not isinstance(classes, list) or not all(isinstance(entry, dict) and _is_class(entry) for entry in classes):
        raise ValueError("classes is not a list of ids and names")
    if not classes or len({entry["id"] for entry in classes}) < len(classes):
        raise ValueError("classes is empty, or two have one id")


def _is_class(entry: dict[str, Any]) -> bool:
    number, name = entry.get("id"), entry.get("name")
    return isinstance(number, int) and not isinstance(number, bool) and isinstance(name, str) and is_unicode(name)
