"""Initial weights of convolutions and linear layers; other layers are left as they are."""

from __future__ import annotations

from torch import nn


def kaiming(*modules: nn.Module) -> None:
    """Weights of He et al. (ICCV 2015), for layers that a ReLU follows; biases 0."""
    for layer in _layers(*modules):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def gaussian(std: float, *modules: nn.Module) -> None:
    """Normal weights of a standard deviation, for predictors; 0 for layers whose first output must be 0. Biases 0."""
    for layer in _layers(*modules):
        nn.init.normal_(layer.weight, std=std)


def _layers(*modules: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layers
