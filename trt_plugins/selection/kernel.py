"""Kernels that select boxes: exact top-k, decoding, non-maximum suppression. No atomics: the same input gives the same bits.

A *row* is an independent set of candidates (one level, or all classes, of one image). A candidate is an `int32` key, which has the order
of the scores, and an `int32` index, its place in the row's scores. A place without a candidate has the key EMPTY. Of equal keys, the first
one is better; candidates are in the order of their indices until they are ranked.
"""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2**31))
"""Less than the key of any score."""
MAX_LOG_SCALE = tl.constexpr(4.135166556742356)
"""log(1000 / 16): the limit of dw and dh in torchvision's BoxCoder."""


@triton.jit
def score_key(score):
    """fp32 scores -> `int32` keys in the same order."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_score(key):
    """Keys -> the fp32 scores that they were computed from."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_places(key, k):
    """A mask of the k best of `key [CHUNK]`, k <= CHUNK < 2**15, and their places once they are packed without gaps, in the same order.

    The k-th largest key is found bit by bit, from the highest.
    """
    bound = tl.full((), EMPTY, tl.int32)
    one = tl.full((), 1, tl.int32)
    for step in range(32):
        higher = bound ^ (one << (31 - step))
        bound = tl.where(tl.sum((key >= higher).to(tl.int32)) >= k, higher, bound)
    above = (key > bound).to(tl.int32)
    level = (key == bound).to(tl.int32)
    needed = k - tl.sum(above)
    # One scan counts both: those above the bound in the high half, those on it in the low one.
    counts = tl.cumsum((above << 16) | level)
    on_bound = counts & 0xFFFF
    chosen = (key > bound) | ((key == bound) & (on_bound <= needed))
    return chosen, (counts >> 16) + tl.minimum(on_bound, needed) - 1


@triton.jit
def select(keys, indices, best_keys, best_indices, width, k, CHUNK: tl.constexpr):
    """The k best of each CHUNK of `keys [rows, width]` -> `best_keys [rows, chunks * k]`; grid (chunks, rows)."""
    row = tl.program_id(1)
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(keys + row * width + place, mask=place < width, other=EMPTY)
    chosen, best_place = best_places(key, k)
    best_place += (row * tl.num_programs(0) + tl.program_id(0)) * k
    tl.store(best_keys + best_place, key, mask=chosen)
    index = tl.load(indices + row * width + place, mask=chosen & (place < width), other=0)
    tl.store(best_indices + best_place, index, mask=chosen)


@triton.jit
def rank(keys, width, place, key, BLOCK: tl.constexpr):
    """The number of `keys [width]` that are better than the candidate `key` at `place`: its place once sorted. Places from `width` on
    stay as they are."""
    better = tl.zeros([place.shape[0], BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        other = start + tl.arange(0, BLOCK)
        against = tl.load(keys + other, mask=other < width, other=EMPTY)
        ahead = (against[None, :] > key[:, None]) | ((against[None, :] == key[:, None]) & (other[None, :] < place[:, None]))
        better += ahead.to(tl.int32)
    return tl.where(place < width, tl.sum(better, axis=1), place)


@triton.jit
def decode(left, top, right, bottom, dx, dy, dw, dh, canvas_height, canvas_width):
    """Boxes moved by deltas (torchvision's `BoxCoder.decode_single`, weights applied before), clipped to the canvas."""
    width, height = right - left, bottom - top
    center_x = dx * width + (left + 0.5 * width)
    center_y = dy * height + (top + 0.5 * height)
    half_width = 0.5 * tl.exp(tl.minimum(dw, MAX_LOG_SCALE)) * width
    half_height = 0.5 * tl.exp(tl.minimum(dh, MAX_LOG_SCALE)) * height
    return (
        tl.clamp(center_x - half_width, 0.0, canvas_width),
        tl.clamp(center_y - half_height, 0.0, canvas_height),
        tl.clamp(center_x + half_width, 0.0, canvas_width),
        tl.clamp(center_y + half_height, 0.0, canvas_height),
    )


@triton.jit
def load_box(boxes, k, place, mask):
    """Left, top, right and bottom of `boxes [4, k]` at `place`."""
    return (
        tl.load(boxes + place, mask=mask, other=0.0),
        tl.load(boxes + k + place, mask=mask, other=0.0),
        tl.load(boxes + 2 * k + place, mask=mask, other=0.0),
        tl.load(boxes + 3 * k + place, mask=mask, other=0.0),
    )


@triton.jit
def overlaps(boxes, indices, better, k, threshold, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """For each box, the better boxes of its group that it overlaps: `boxes [rows, 4, k]`, best first -> bits `better [rows, words, k]`.

    Bit b of word w of box i is set if its IoU with box 32 w + b < i is above the threshold (as in torchvision's nms) and their indices
    agree modulo GROUPS. Words whose first box comes after box i are not written. Grid (blocks of boxes, words, rows).
    """
    word, row = tl.program_id(1), tl.program_id(2)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = word * 32
    if first < (tl.program_id(0) + 1) * BLOCK:
        bit = tl.arange(0, 32)
        left, top, right, bottom = load_box(boxes + row * 4 * k, k, place, place < k)
        other_left, other_top, other_right, other_bottom = load_box(boxes + row * 4 * k, k, first + bit, first + bit < k)
        width = tl.minimum(right[None, :], other_right[:, None]) - tl.maximum(left[None, :], other_left[:, None])
        height = tl.minimum(bottom[None, :], other_bottom[:, None]) - tl.maximum(top[None, :], other_top[:, None])
        shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        areas = ((right - left) * (bottom - top))[None, :] + ((other_right - other_left) * (other_bottom - other_top))[:, None]
        # The IoU of two boxes without area is 0, not 0 / 0.
        iou = tl.div_rn(shared, tl.maximum(areas - shared, 1e-30))
        hit = (iou > threshold) & (first + bit[:, None] < place[None, :])
        if GROUPS > 1:
            group = tl.load(indices + row * k + place, mask=place < k, other=0) % GROUPS
            other_group = tl.load(indices + row * k + first + bit, mask=first + bit < k, other=0) % GROUPS
            hit = hit & (group[None, :] == other_group[:, None])
        one = tl.full([32, 1], 1, tl.int32)
        words = tl.sum(tl.where(hit, one << bit[:, None], 0), axis=0)
        tl.store(better + (row * tl.num_programs(1) + word) * k + place, words, mask=place < k)


@triton.jit
def _pack(bits, bit):
    one = tl.full([32], 1, tl.int32)
    return tl.sum(tl.where(bits, one << bit, 0))


@triton.jit
def suppress(keys, better, kept_keys, kept_counts, k, words, WORDS: tl.constexpr):
    """Greedy NMS: `keys [rows, k]`, best first, and `overlaps`' bits -> `kept_keys [rows, k]`, EMPTY where not kept, and how many are.

    One program per row, 32 boxes at a time. Boxes that no kept box of earlier words overlaps are free. Among them, the greedy choice is the
    only fixed point of "free, and no kept better box overlaps it"; the iteration from "all free" reaches it in at most 32 steps. The
    next 32 boxes are loaded meanwhile. `words` is k / 32, rounded up, and WORDS the next power of two.
    """
    row = tl.program_id(0)
    bit, word = tl.arange(0, 32), tl.arange(0, WORDS)
    keys += row * k
    kept_keys += row * k
    better += row * words * k
    kept = tl.zeros([WORDS], tl.int32)
    count = tl.full((), 0, tl.int32)
    key = tl.load(keys + bit, mask=bit < k, other=EMPTY)
    own = tl.load(better + bit, mask=bit < k, other=0)
    earlier = tl.zeros([WORDS, 32], tl.int32)
    for block in range(words):
        place = (block + 1) * 32 + bit
        next_key = tl.load(keys + place, mask=place < k, other=EMPTY)
        next_own = tl.load(better + (block + 1) * k + place, mask=place < k, other=0)
        known = (word[:, None] <= block) & (place[None, :] < k)
        next_earlier = tl.load(better + word[:, None] * k + place[None, :], mask=known, other=0)

        free = (key != EMPTY) & (tl.max(((earlier & kept[:, None]) != 0).to(tl.int32), axis=0) == 0)
        chosen = _pack(free, bit)
        previous = ~chosen
        while chosen != previous:
            previous = chosen
            chosen = _pack(free & ((own & previous) == 0), bit)
        alive = (chosen >> bit) & 1
        count += tl.sum(alive)
        kept = tl.where(word == block, chosen, kept)
        tl.store(kept_keys + block * 32 + bit, tl.where(alive == 1, key, EMPTY), mask=block * 32 + bit < k)
        key, own, earlier = next_key, next_own, next_earlier
    tl.store(kept_counts + row, count)
