"""Chooses a value by the level of a pyramid; shared by kernels."""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl


@triton.jit
def of_level(level, v0, v1, v2, v3, v4):
    """The value or pointer of a level, of five."""
    value = tl.where(level == 1, v1, v0)
    value = tl.where(level == 2, v2, value)
    value = tl.where(level == 3, v3, value)
    return tl.where(level == 4, v4, value)
