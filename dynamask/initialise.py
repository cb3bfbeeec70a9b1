"""How new layers begin: convolutions and linear layers, all others are passed over."""

from __future__ import annotations

from torch import nn


def kaiming(*modules: nn.Module) -> None:
    """Weights of He et al. (ICCV 2015), for layers that a ReLU follows; biases 0."""
    for layer in _layers(*modules):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def gaussian(std: float, *modules: nn.Module) -> None:
    """Normal weights of a standard deviation, for predictors, and with 0 for layers that must begin silent; biases 0."""
    for layer in _layers(*modules):
        nn.init.normal_(layer.weight, std=std)


def _layers(*modules: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layers
