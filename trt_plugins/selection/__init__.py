"""What choosing proposals and choosing detections share: exact top-k, box decoding and non-maximum suppression, in a few launches."""

from trt_plugins.selection.selection import Selection

__all__ = ["Selection"]
