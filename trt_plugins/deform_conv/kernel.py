"""Deformable convolution as an implicit GEMM: sampled values are interpolated in registers and multiplied at once, never stored."""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl


@triton.jit
def deform_conv(
    x,
    packed,
    offset,
    bias,
    mask,
    y,
    MODULATED: tl.constexpr,
    RELU: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_OUTPUTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute one tile of BLOCK_P pixels x BLOCK_O outputs of one instance. HEIGHT and WIDTH are at least 2; `mask` is read if MODULATED.

    Axis 0 of the grid runs over the instances and, fastest, their tiles of pixels, so that neighbours share an instance in the L2
    cache; axis 1 runs over blocks of outputs. Tiles are [pixel, channel] because Triton lays lanes along the first axis of gathered
    pointers: a warp's lanes are neighbouring pixels of one channel.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    PLANE: tl.constexpr = HEIGHT * WIDTH
    PIXELS: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
    TILES: tl.constexpr = (PIXELS + BLOCK_P - 1) // BLOCK_P

    # Offsets within an instance fit 32 bits; offsets within the whole batch need 64.
    instance = (tl.program_id(0) // TILES).to(tl.int64)
    pixel = tl.program_id(0) % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = tl.arange(0, BLOCK_C)
    inside = pixel < PIXELS
    planes = x + instance * (GROUPS * GROUP_CHANNELS * PLANE)
    offsets = offset + instance * (GROUPS * TAPS * 2 * PIXELS) + pixel
    masks = mask + instance * (GROUPS * TAPS * PIXELS) + pixel
    weights = packed + channel[:, None] * PADDED_OUTPUTS + output[None, :]

    total = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)
    for sample in range(GROUPS * TAPS):
        group = sample // TAPS
        tap = sample % TAPS
        row = tl.load(offsets + sample * 2 * PIXELS, mask=inside, other=0.0).to(tl.float32)
        column = tl.load(offsets + (sample * 2 + 1) * PIXELS, mask=inside, other=0.0).to(tl.float32)
        row += (pixel // OUT_WIDTH * STRIDE_Y - PAD_Y + tap // KERNEL_WIDTH * DILATION_Y).to(tl.float32)
        column += (pixel % OUT_WIDTH * STRIDE_X - PAD_X + tap % KERNEL_WIDTH * DILATION_X).to(tl.float32)
        # The 2 x 2 block of the map nearest to the position, each pixel weighted by max(0, 1 - distance) in both directions: bilinear
        # interpolation with zeros beyond the border. No load needs to test for the border.
        # Not a maximum of the position and 0, which may be NaN where the position is.
        top = tl.floor(tl.where(row > 0.0, tl.minimum(row, HEIGHT - 2.0), 0.0))
        left = tl.floor(tl.where(column > 0.0, tl.minimum(column, WIDTH - 2.0), 0.0))
        top_share = tl.maximum(1.0 - tl.abs(row - top), 0.0)
        bottom_share = tl.maximum(1.0 - tl.abs(row - top - 1.0), 0.0)
        left_share = tl.maximum(1.0 - tl.abs(column - left), 0.0)
        right_share = tl.maximum(1.0 - tl.abs(column - left - 1.0), 0.0)
        if MODULATED:
            scale = tl.load(masks + sample * PIXELS, mask=inside, other=0.0).to(tl.float32)
            top_share *= scale
            bottom_share *= scale
        corner = planes + group * (GROUP_CHANNELS * PLANE) + top.to(tl.int32) * WIDTH + left.to(tl.int32)
        for first in range(0, PADDED_CHANNELS, BLOCK_C):
            # One pointer serves all four pixels: the distances between them become constants of the load instructions.
            place = corner[:, None] + (first + channel)[None, :] * PLANE
            known = (first + channel < GROUP_CHANNELS)[None, :]
            value = tl.load(place, mask=known, other=0.0).to(tl.float32) * (top_share * left_share)[:, None]
            value += tl.load(place + 1, mask=known, other=0.0).to(tl.float32) * (top_share * right_share)[:, None]
            value += tl.load(place + WIDTH, mask=known, other=0.0).to(tl.float32) * (bottom_share * left_share)[:, None]
            value += tl.load(place + WIDTH + 1, mask=known, other=0.0).to(tl.float32) * (bottom_share * right_share)[:, None]
            tile = tl.load(weights + (sample * PADDED_CHANNELS + first) * PADDED_OUTPUTS)
            total = tl.dot(value.to(tile.dtype), tile, total, input_precision="ieee")

    total += tl.load(bias + output, mask=output < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0)
    results = y + instance * (OUTPUTS * PIXELS) + output[None, :] * PIXELS + pixel[:, None]
    tl.store(results, total.to(y.dtype.element_ty), mask=inside[:, None] & (output < OUTPUTS)[None, :])
