"""Deformable convolution, versions 1 and 2, with a fused ReLU."""

from trt_plugins.deform_conv.operator import DeformConv

__all__ = ["DeformConv"]
