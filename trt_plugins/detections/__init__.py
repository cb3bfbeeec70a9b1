"""Detections: the box head's outputs to a fixed number of slots, by score, class and non-maximum suppression."""

from trt_plugins.detections.operator import Detections

__all__ = ["Detections"]
