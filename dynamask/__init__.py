"""Instance segmentation in which the mask of each instance gets the resolution that it needs.

The public names are imported at their first use: importing the package loads neither PyTorch nor an engine.

    predictor = dynamask.load("lite0.bundle")       # works where PyTorch is not installed
    instances = predictor(dynamask.read_image("photo.jpg"))
    model = dynamask.build_model(dynamask.load_config("lite0-shapes"), classes=[{"id": 1, "name": "leaf"}])   # the `train` extra
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from runtime.environment import prepare

if TYPE_CHECKING:
    from dynamask.config import PRESETS, ModelConfig, load_config
    from dynamask.model import DynaMask, build_model
    from runtime.annotate import annotate
    from runtime.bundle import Bundle
    from runtime.coco import read_coco
    from runtime.errors import DynaMaskError, InputError
    from runtime.images import read_image
    from runtime.instances import Instances
    from runtime.policies import Policy
    from runtime.predictor import Predictor, load
    from runtime.sinks import FolderSink, JsonLinesSink, VideoSink
    from runtime.sources import open_source
    from runtime.stream import StreamReport, run_stream
    from runtime.streams.service import stream
    from runtime.validate import validate

__version__ = "0.1.0"

# Before PyTorch or an engine is imported, which read the environment then.
prepare()

_HOMES = {
    "Bundle": ("runtime.bundle", "Bundle"),
    "DynaMask": ("dynamask.model", "DynaMask"),
    "DynaMaskError": ("runtime.errors", "DynaMaskError"),
    "FolderSink": ("runtime.sinks", "FolderSink"),
    "InputError": ("runtime.errors", "InputError"),
    "Instances": ("runtime.instances", "Instances"),
    "JsonLinesSink": ("runtime.sinks", "JsonLinesSink"),
    "ModelConfig": ("dynamask.config", "ModelConfig"),
    "PRESETS": ("dynamask.config", "PRESETS"),
    "Policy": ("runtime.policies", "Policy"),
    "Predictor": ("runtime.predictor", "Predictor"),
    "StreamReport": ("runtime.stream", "StreamReport"),
    "VideoSink": ("runtime.sinks", "VideoSink"),
    "annotate": ("runtime.annotate", "annotate"),
    "build_model": ("dynamask.model", "build_model"),
    "load": ("runtime.predictor", "load"),
    "load_config": ("dynamask.config", "load_config"),
    "open_source": ("runtime.sources", "open_source"),
    "read_coco": ("runtime.coco", "read_coco"),
    "read_image": ("runtime.images", "read_image"),
    "run_stream": ("runtime.stream", "run_stream"),
    "stream": ("runtime.streams.service", "stream"),
    "validate": ("runtime.validate", "validate"),
}
"""Public name -> (module, name in it)."""

__all__ = [
    "PRESETS",
    "Bundle",
    "DynaMask",
    "DynaMaskError",
    "FolderSink",
    "InputError",
    "Instances",
    "JsonLinesSink",
    "ModelConfig",
    "Policy",
    "Predictor",
    "StreamReport",
    "VideoSink",
    "__version__",
    "annotate",
    "build_model",
    "load",
    "load_config",
    "open_source",
    "read_coco",
    "read_image",
    "run_stream",
    "stream",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynamask' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
