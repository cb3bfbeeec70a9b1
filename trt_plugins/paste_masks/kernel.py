"""The kernel of PasteMasks: each program writes one block of words, 32 pixels of a row each, of one instance's crop."""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl


@triton.jit
def paste_masks(
    logits,
    boxes,
    windows,
    owners,
    bits,
    instances,
    total_words,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """`bits [total_words]` of `logits [instances, SIZE, SIZE]`; the arguments are those of the operator `PasteMasks`.

    Program i works on instance `owners[i]`. What lies outside of the arrays is neither read nor written, whatever the windows say.
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    exists = (owner >= 0) & (owner < instances)
    instance = tl.where(exists, owner, 0).to(tl.int64)
    window = windows + 6 * instance
    left, top, width, height = tl.load(window), tl.load(window + 1), tl.load(window + 2), tl.load(window + 3)
    first_word, first_block = tl.load(window + 4), tl.load(window + 5)
    words = (width + 31) // 32
    word_blocks = tl.maximum(tl.cdiv(words, BLOCK_WORDS), 1)
    block = program - first_block
    rows = block // word_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = block % word_blocks * BLOCK_WORDS
    columns = 32 * word + tl.arange(0, 32 * BLOCK_WORDS)
    inside = (exists & (rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]

    box = boxes + 4 * instance
    upper, of_upper, of_lower = _cells(top + rows, tl.load(box + 1), tl.load(box + 3), SIZE)
    before, of_before, of_after = _cells(left + columns, tl.load(box), tl.load(box + 2), SIZE)
    mask = logits + instance * SIZE * SIZE
    probability = of_upper[:, None] * of_before[None, :] * _probability(mask, upper, before, inside, SIZE)
    probability += of_upper[:, None] * of_after[None, :] * _probability(mask, upper, before + 1, inside, SIZE)
    probability += of_lower[:, None] * of_before[None, :] * _probability(mask, upper + 1, before, inside, SIZE)
    probability += of_lower[:, None] * of_after[None, :] * _probability(mask, upper + 1, before + 1, inside, SIZE)
    covered = tl.reshape((inside & (probability > 0.5)).to(tl.int32), [BLOCK_ROWS, BLOCK_WORDS, 32])
    # Each term has a bit of its own: the sum is their union.
    packed = tl.sum(covered << tl.arange(0, 32)[None, None, :], axis=2)
    target = word + tl.arange(0, BLOCK_WORDS)
    places = first_word.to(tl.int64) + rows[:, None].to(tl.int64) * words + target[None, :]
    writable = (exists & (rows >= 0) & (rows < height))[:, None] & ((target >= 0) & (target < words))[None, :]
    tl.store(bits + places, packed, mask=writable & (places >= 0) & (places < total_words))


@triton.jit
def _cells(pixels, start, end, SIZE: tl.constexpr):
    """Along one axis: the first of the two cells around each pixel's centre, and their weights."""
    extent = end - start
    # A box without extent has no pixels; its step must only not be a division by 0.
    position = (pixels.to(tl.float32) + 0.5 - start) * tl.div_rn(SIZE * 1.0, tl.where(extent > 0, extent, 1.0)) - 0.5
    # Pixels outside the box have no weight; their positions must only fit an integer.
    position = tl.minimum(tl.maximum(position, -2.0), SIZE + 1.0)
    first = tl.floor(position)
    to_next = position - first
    return first.to(tl.int32), 1.0 - to_next, to_next


@triton.jit
def _probability(mask, row, column, inside, SIZE: tl.constexpr):
    """The probabilities at cells, `[rows, columns]`; 0 beyond the grid."""
    row, column = row[:, None], column[None, :]
    there = inside & (row >= 0) & (row < SIZE) & (column >= 0) & (column < SIZE)
    return tl.where(there, tl.sigmoid(tl.load(mask + row * SIZE + column, mask=there, other=0.0).to(tl.float32)), 0.0)
