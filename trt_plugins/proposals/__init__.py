"""Proposals: the RPN's maps to a fixed number of boxes, by top-k and non-maximum suppression on each level."""

from trt_plugins.proposals.operator import Proposals

__all__ = ["Proposals"]
