"""The routing of instances to mask grids: the MSM's choice under a budget, and the index lists of the four stages."""

from trt_plugins.msm_route.operator import MsmRoute

__all__ = ["MsmRoute"]
