"""The kernel of PasteMasks: each program writes one block of words, 32 pixels of a row each, of one instance's mask."""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl


@triton.jit
def paste_masks(
    logits,
    boxes,
    bits,
    height,
    width,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """`bits [n, height, words]` of `logits [n, SIZE, SIZE]` in `boxes [n, 4]`: bit b of word w of a row is its pixel 32 w + b.

    The grid has one axis: blocks of words within blocks of rows within instances.
    """
    words = (width + 31) // 32
    word_blocks = tl.cdiv(words, BLOCK_WORDS)
    row_blocks = tl.cdiv(height, BLOCK_ROWS)
    program = tl.program_id(0)
    instance = (program // (row_blocks * word_blocks)).to(tl.int64)
    rows = program // word_blocks % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_word = program % word_blocks * BLOCK_WORDS
    columns = 32 * first_word + tl.arange(0, 32 * BLOCK_WORDS)

    left, top = tl.load(boxes + 4 * instance), tl.load(boxes + 4 * instance + 1)
    right, bottom = tl.load(boxes + 4 * instance + 2), tl.load(boxes + 4 * instance + 3)
    upper, of_upper, of_lower, inside_rows = _cells(rows, top, bottom, height, SIZE)
    before, of_before, of_after, inside_columns = _cells(columns, left, right, width, SIZE)
    inside = inside_rows[:, None] & inside_columns[None, :]

    mask = logits + instance * SIZE * SIZE
    probability = of_upper[:, None] * of_before[None, :] * _probability(mask, upper, before, inside, SIZE)
    probability += of_upper[:, None] * of_after[None, :] * _probability(mask, upper, before + 1, inside, SIZE)
    probability += of_lower[:, None] * of_before[None, :] * _probability(mask, upper + 1, before, inside, SIZE)
    probability += of_lower[:, None] * of_after[None, :] * _probability(mask, upper + 1, before + 1, inside, SIZE)
    covered = tl.reshape((inside & (probability > 0.5)).to(tl.int32), [BLOCK_ROWS, BLOCK_WORDS, 32])
    # Each term has a bit of its own: the sum is their union.
    packed = tl.sum(covered << tl.arange(0, 32)[None, None, :], axis=2)
    target = first_word + tl.arange(0, BLOCK_WORDS)
    places = (instance * height + rows)[:, None] * words + target[None, :]
    tl.store(bits + places, packed, mask=(rows < height)[:, None] & (target < words)[None, :])


@triton.jit
def _cells(pixels, start, end, limit, SIZE: tl.constexpr):
    """Along one axis: the first of the two cells around each pixel's centre, their weights, and whether the centre is in box and frame."""
    centre = pixels.to(tl.float32) + 0.5
    extent = end - start
    inside = (centre >= start) & (centre < end) & (pixels < limit)
    # No pixel's centre is in a box without extent; its step must only not be a division by 0.
    position = tl.where(inside, (centre - start) * tl.div_rn(SIZE * 1.0, tl.where(extent > 0, extent, 1.0)) - 0.5, 0.0)
    first = tl.floor(position)
    to_next = position - first
    return first.to(tl.int32), 1.0 - to_next, to_next, inside


@triton.jit
def _probability(mask, row, column, inside, SIZE: tl.constexpr):
    """The probabilities at cells, `[rows, columns]`; 0 beyond the grid."""
    row, column = row[:, None], column[None, :]
    there = inside & (row >= 0) & (row < SIZE) & (column >= 0) & (column < SIZE)
    return tl.where(there, tl.sigmoid(tl.load(mask + row * SIZE + column, mask=there, other=0.0).to(tl.float32)), 0.0)
