"""Exact top-k, box decoding and non-maximum suppression, which `Proposals` and `Detections` share."""

from trt_plugins.selection.selection import Selection

__all__ = ["Selection"]
