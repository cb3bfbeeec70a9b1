"""The kernel of RoiAlign: each program computes one block of bins of one RoI, for one block of channels."""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl

from trt_plugins.levels import of_level


@triton.jit
def roi_align(
    x0,
    x1,
    x2,
    x3,
    x4,
    rois,
    places,
    regions,
    images,
    height0,
    width0,
    height1,
    width1,
    height2,
    width2,
    height3,
    width3,
    height4,
    width4,
    PER_IMAGE: tl.constexpr,
    PLACED: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALE0: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE2: tl.constexpr,
    SCALE3: tl.constexpr,
    SCALE4: tl.constexpr,
    LOG2_CANONICAL: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
):
    """`regions [n, CHANNELS, SIZE, SIZE]` of `rois [n, 4]` from `x_l [images, CHANNELS, height_l, width_l]`, l < LEVELS.

    A RoI's image is its place // PER_IMAGE, or image 0 if PER_IMAGE is 0; its place is in `places [n]` if PLACED, else its row in `rois`.
    The grid has one axis: blocks of bins within blocks of channels within RoIs, so that neighbouring programs read the same part of a map.
    """
    BINS: tl.constexpr = SIZE * SIZE
    BIN_BLOCKS: tl.constexpr = (BINS + BLOCK_BINS - 1) // BLOCK_BINS
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    roi = program // (BIN_BLOCKS * CHANNEL_BLOCKS)
    first_channel = program // BIN_BLOCKS % CHANNEL_BLOCKS * BLOCK_C
    first_bin = program % BIN_BLOCKS * BLOCK_BINS

    left, top = tl.load(rois + 4 * roi), tl.load(rois + 4 * roi + 1)
    right, bottom = tl.load(rois + 4 * roi + 2), tl.load(rois + 4 * roi + 3)
    x, height, width, scale = x0, height0, width0, SCALE0
    if LEVELS > 1:
        level = _level(right - left, bottom - top, LEVELS, LOG2_CANONICAL)
        x = of_level(level, x0, x1, x2, x3, x4)
        height = of_level(level, height0, height1, height2, height3, height4)
        width = of_level(level, width0, width1, width2, width3, width4)
        scale = of_level(level, SCALE0, SCALE1, SCALE2, SCALE3, SCALE4)
    first_row, row_step = _span(top, bottom, scale, SIZE, ALIGNED)
    first_column, column_step = _span(left, right, scale, SIZE, ALIGNED)

    bins = first_bin + tl.arange(0, BLOCK_BINS)
    channels = tl.arange(0, BLOCK_C)
    inside = (first_channel + channels < CHANNELS)[:, None] & (bins < BINS)[None, :]
    plane = height * width
    planes = x + first_channel.to(tl.int64) * plane + (channels * plane)[:, None]
    if PER_IMAGE > 0:
        place = roi
        if PLACED:
            place = tl.load(places + roi)
        # A place beyond the images reads from the last one, one before them from the first.
        image = tl.minimum(tl.maximum(place // PER_IMAGE, 0), images - 1)
        planes += image.to(tl.int64) * CHANNELS * plane
    total = tl.zeros([BLOCK_C, BLOCK_BINS], tl.float32)
    for i in tl.static_range(SAMPLES):
        upper, lower, of_upper, of_lower = _neighbours(first_row, row_step, bins // SIZE, (i + 0.5) / SAMPLES, height)
        for j in tl.static_range(SAMPLES):
            before, after, of_before, of_after = _neighbours(first_column, column_step, bins % SIZE, (j + 0.5) / SAMPLES, width)
            total += (of_upper * of_before)[None, :] * _read(planes, upper * width + before, inside)
            total += (of_upper * of_after)[None, :] * _read(planes, upper * width + after, inside)
            total += (of_lower * of_before)[None, :] * _read(planes, lower * width + before, inside)
            total += (of_lower * of_after)[None, :] * _read(planes, lower * width + after, inside)
    mean = total / (SAMPLES * SAMPLES)
    target = regions + (roi.to(tl.int64) * CHANNELS + first_channel) * BINS + first_bin
    places = (channels * BINS)[:, None] + tl.arange(0, BLOCK_BINS)[None, :]
    tl.store(target + places, mean.to(regions.dtype.element_ty), mask=inside)


@triton.jit
def _level(width, height, LEVELS: tl.constexpr, LOG2_CANONICAL: tl.constexpr):
    # The steps of dynamask.roi.pyramid_level, each rounded as there: at the boundary of two levels the last bit decides.
    side = tl.sqrt_rn(tl.maximum(width * height, 1e-6))
    level = tl.floor(4.0 + tl.log2(side) - LOG2_CANONICAL + 1e-6)
    return tl.clamp(level, 2.0, LEVELS + 1.0).to(tl.int32) - 2


@triton.jit
def _span(start, end, scale, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """Along one axis, in cells of the map: the start of a RoI and the extent of each of its bins."""
    first = start * scale
    last = end * scale
    if ALIGNED:
        first -= 0.5
        last -= 0.5
        extent = last - first
    else:
        extent = tl.maximum(last - first, 1.0)
    return first, tl.div_rn(extent, SIZE * 1.0)


@triton.jit
def _neighbours(first, step, index, fraction: tl.constexpr, limit):
    """Along one axis, for the sample at `fraction` of each bin: the two cells around it and their weights, which are 0 more than a cell
    outside the map."""
    position = first + index * step + fraction * step
    counts = (position >= -1.0) & (position <= limit)
    # Not a maximum of the position and 0, which may be NaN where the position is.
    position = tl.where(position > 0.0, tl.minimum(position, limit - 1.0), 0.0)
    low = position.to(tl.int32)
    to_high = position - low
    return low, tl.minimum(low + 1, limit - 1), tl.where(counts, 1.0 - to_high, 0.0), tl.where(counts, to_high, 0.0)


@triton.jit
def _read(planes, cells, inside):
    return tl.load(planes + cells[None, :], mask=inside, other=0.0).to(tl.float32)
