"""Kernels of Proposals, in their order: the RPN's maps to candidates, the best candidates to boxes, the boxes that NMS kept to proposals.

A row of candidates is one level of one image: first the levels of the first image, then those of the next.
"""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl

from trt_plugins.levels import of_level
from trt_plugins.selection.kernel import EMPTY, best_places, decode, load_box, rank, score_key


@triton.jit
def select_anchors(
    logits0,
    logits1,
    logits2,
    logits3,
    logits4,
    keys,
    indices,
    cells0,
    cells1,
    cells2,
    cells3,
    cells4,
    k,
    ANCHORS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The k best of each CHUNK of a level's anchors: maps `[B, ANCHORS, cells_l]` -> candidates `[5 B, chunks * k]`; grid (chunks, 5, B).

    An anchor's index is its place in the order (y, x, anchor). A chunk that begins behind its level's last
    anchor writes k EMPTY candidates.
    """
    level, image = tl.program_id(1), tl.program_id(2)
    cells = of_level(level, cells0, cells1, cells2, cells3, cells4)
    logits = of_level(level, logits0, logits1, logits2, logits3, logits4) + image.to(tl.int64) * (ANCHORS * cells)
    target = ((image * tl.num_programs(1) + level) * tl.num_programs(0) + tl.program_id(0)) * k
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if tl.program_id(0) * CHUNK < cells * ANCHORS:
        inside = index < cells * ANCHORS
        logit = tl.load(logits + index % ANCHORS * cells + index // ANCHORS, mask=inside, other=0.0).to(tl.float32)
        key = tl.where(inside, score_key(logit), EMPTY)
        chosen, place = best_places(key, k)
        tl.store(keys + target + place, key, mask=chosen)
        tl.store(indices + target + place, index, mask=chosen)
    else:
        place = tl.arange(0, CHUNK)
        tl.store(keys + target + place, tl.full([CHUNK], EMPTY, tl.int32), mask=place < k)


@triton.jit
def decode_anchors(
    deltas0,
    deltas1,
    deltas2,
    deltas3,
    deltas4,
    anchors,
    keys,
    indices,
    boxes,
    best_keys,
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
    canvas_height,
    canvas_width,
    candidates,
    k,
    ANCHORS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """Sort `keys` and `indices [5 B, candidates]`, and decode the k best of each level: `boxes [5 B, 4, k]`, `best_keys [5 B, k]`.

    Anchors are torchvision's: the level's cell anchor `anchors [5, ANCHORS, 4]`, shifted by the cell's place times canvas // map, in
    whole pixels. Boxes of EMPTY candidates are 0. Grid (blocks of candidates, 5, B).
    """
    level, image = tl.program_id(1), tl.program_id(2)
    row = image * tl.num_programs(1) + level
    height = of_level(level, height0, height1, height2, height3, height4)
    width = of_level(level, width0, width1, width2, width3, width4)
    plane = height * width
    deltas = of_level(level, deltas0, deltas1, deltas2, deltas3, deltas4) + image.to(tl.int64) * (4 * ANCHORS * plane)

    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < candidates
    key = tl.load(keys + row * candidates + place, mask=inside, other=EMPTY)
    sorted_place = rank(keys + row * candidates, candidates, place, key, COMPARED)
    best = inside & (sorted_place < k)
    tl.store(best_keys + row * k + sorted_place, key, mask=best)

    real = best & (key != EMPTY)
    index = tl.load(indices + row * candidates + place, mask=real, other=0)
    kind, cell = index % ANCHORS, index // ANCHORS
    anchor = anchors + (level * ANCHORS + kind) * 4
    shift_x = (cell % width * (canvas_width // width)).to(tl.float32)
    shift_y = (cell // width * (canvas_height // height)).to(tl.float32)
    delta = deltas + kind * 4 * plane + cell
    left, top, right, bottom = decode(
        tl.load(anchor, mask=real, other=0.0) + shift_x,
        tl.load(anchor + 1, mask=real, other=0.0) + shift_y,
        tl.load(anchor + 2, mask=real, other=0.0) + shift_x,
        tl.load(anchor + 3, mask=real, other=0.0) + shift_y,
        tl.load(delta, mask=real, other=0.0).to(tl.float32),
        tl.load(delta + plane, mask=real, other=0.0).to(tl.float32),
        tl.load(delta + 2 * plane, mask=real, other=0.0).to(tl.float32),
        tl.load(delta + 3 * plane, mask=real, other=0.0).to(tl.float32),
        canvas_height.to(tl.float32),
        canvas_width.to(tl.float32),
    )
    box = boxes + row * 4 * k + sorted_place
    tl.store(box, left, mask=best)
    tl.store(box + k, top, mask=best)
    tl.store(box + 2 * k, right, mask=best)
    tl.store(box + 3 * k, bottom, mask=best)


@triton.jit
def merge_levels(
    boxes,
    kept_keys,
    kept_counts,
    proposals,
    count,
    k,
    limit,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """The `limit` best of the boxes that NMS kept on all levels, `kept_keys [B, LEVELS, k]` -> `proposals [B, limit, 4]` and `count [B]`.

    Rows of an image from its count on are 0. Grid (blocks of max(LEVELS * k, limit), B).
    """
    image = tl.program_id(1)
    kept_keys += image * LEVELS * k
    boxes += image * LEVELS * 4 * k
    proposals += image * limit * 4
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(kept_keys + place, mask=place < LEVELS * k, other=EMPTY)
    row = rank(kept_keys, LEVELS * k, place, key, COMPARED)
    left, top, right, bottom = load_box(boxes + place // k * 4 * k, k, place % k, key != EMPTY)
    inside = row < limit
    tl.store(proposals + row * 4, left, mask=inside)
    tl.store(proposals + row * 4 + 1, top, mask=inside)
    tl.store(proposals + row * 4 + 2, right, mask=inside)
    tl.store(proposals + row * 4 + 3, bottom, mask=inside)
    if tl.program_id(0) == 0:
        level = tl.arange(0, 8)
        kept = tl.sum(tl.load(kept_counts + image * LEVELS + level, mask=level < LEVELS, other=0))
        tl.store(count + image, tl.minimum(kept, limit))
