"""Every operator of this package by name, imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from trt_plugins.operator import Operator

PREFIX = "DynaMask"
"""The prefix of the names of TensorRT plugins and ONNX nodes, so that no parser uses its own operator instead."""
DOMAIN = "dynamask"
"""The domain of these ONNX nodes."""


class _Operators(Mapping[str, type[Operator]]):
    """Name -> class; a class is imported when it is looked up."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> type[Operator]:
        operator: type[Operator] = getattr(importlib.import_module(self._modules[name]), name)
        return operator

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


OPERATORS: Mapping[str, type[Operator]] = _Operators(
    {
        "DeformConv": "trt_plugins.deform_conv",
        "RoiAlign": "trt_plugins.roi_align",
        "Proposals": "trt_plugins.proposals",
        "Detections": "trt_plugins.detections",
        "MsmRoute": "trt_plugins.msm_route",
    }
)
