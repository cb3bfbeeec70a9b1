"""Instance segmentation in which every instance pays only for the mask resolution it needs.

The public names come when they are first used, so that importing the package loads neither PyTorch nor an engine:

    predictor = dynamask.load("lite0.bundle")       # runtime only: works where PyTorch is not installed
    instances = predictor(dynamask.read_image("photo.jpg"))
    model = dynamask.build_model(dynamask.load_config("lite0-shapes"), classes=[{"id": 1, "name": "leaf"}])   # the `train` extra
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamask.config import PRESETS, ModelConfig, load_config
    from dynamask.model import DynaMask, build_model
    from runtime.bundle import Bundle
    from runtime.errors import DynaMaskError, InputError
    from runtime.images import read_image
    from runtime.instances import Instances
    from runtime.predictor import Predictor, load
    from runtime.stream import run_stream as stream
    from runtime.validate import validate

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Bundle",
    "DynaMask",
    "DynaMaskError",
    "InputError",
    "Instances",
    "ModelConfig",
    "Predictor",
    "__version__",
    "build_model",
    "load",
    "load_config",
    "read_image",
    "stream",
    "validate",
]

_HOMES = {
    "Bundle": ("runtime.bundle", "Bundle"),
    "DynaMask": ("dynamask.model", "DynaMask"),
    "DynaMaskError": ("runtime.errors", "DynaMaskError"),
    "InputError": ("runtime.errors", "InputError"),
    "Instances": ("runtime.instances", "Instances"),
    "ModelConfig": ("dynamask.config", "ModelConfig"),
    "PRESETS": ("dynamask.config", "PRESETS"),
    "Predictor": ("runtime.predictor", "Predictor"),
    "build_model": ("dynamask.model", "build_model"),
    "load": ("runtime.predictor", "load"),
    "load_config": ("dynamask.config", "load_config"),
    "read_image": ("runtime.images", "read_image"),
    "stream": ("runtime.stream", "run_stream"),
    "validate": ("runtime.validate", "validate"),
}
"""Public name -> (module, name in it)."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynamask' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
