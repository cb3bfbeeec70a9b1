"""Multiply-accumulates (MACs), counted while modules run; the paper calls them FLOPs (Table 7)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dynamask.deform_conv import DeformConv2d

PAPER_GMACS: tuple[float, float, float, float] = (0.23, 0.62, 1.01, 1.40)
"""Table 7: GMAC per instance at 14, 28, 56 and 112. The last one is the unit of C_t (Eq. 5) in training."""


class MacCounter:
    """Counts the multiply-accumulates of the convolutions (deformable, transposed) and linear layers that run while it is open.

    The counts have the modules' names, `{name: MACs}`. Element-wise work, sampling and pooling are not counted, as in the paper.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(10, 20)
        >>> with MacCounter(layer) as counter:
        ...     output = layer(torch.zeros(3, 10))
        >>> counter.total() * 1e9
        600.0
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.macs: dict[str, int] = {}

    def __enter__(self) -> MacCounter:
        self._handles = [
            layer.register_forward_hook(self._hook(name))
            for name, layer in self.module.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, DeformConv2d))
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            # A transposed convolution applies each tap at every input position; the others apply it at every output position.
            applied = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
            positions = applied.numel() // applied.shape[-1 if isinstance(layer, nn.Linear) else 1]
            self.macs[name] = self.macs.get(name, 0) + positions * weight.numel()

        return count

    def total(self) -> float:
        """The sum over all modules, GMAC."""
        return sum(self.macs.values()) / 1e9
