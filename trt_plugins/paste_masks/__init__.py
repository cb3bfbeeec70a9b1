"""Pasting mask logits into the frame, as packed bits."""

from trt_plugins.paste_masks.operator import PasteMasks

__all__ = ["PasteMasks"]
