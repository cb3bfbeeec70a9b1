"""RoIAlign on one map or over the levels of a pyramid: crops of a fixed size, in one launch."""

from trt_plugins.roi_align.operator import RoiAlign

__all__ = ["RoiAlign"]
