"""Kernels of Detections, in their order: class logits to candidates, the best candidates to boxes, the boxes that NMS kept to slots."""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl

from trt_plugins.selection.kernel import EMPTY, decode, key_score, load_box, rank, score_key


@triton.jit
def score_classes(
    class_logits,
    count,
    min_score,
    keys,
    indices,
    rows,
    score_threshold,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Softmax of `class_logits [B, rows, 1 + CLASSES]` -> candidates `[B, rows, CLASSES]`; grid (blocks of ROWS, B).

    A candidate is EMPTY if its row is not below its image's `count [B]`, or its score is not above both thresholds. Column 0 is the
    background.
    """
    image = tl.program_id(1)
    class_logits += image.to(tl.int64) * rows * (CLASSES + 1)
    keys += image.to(tl.int64) * rows * CLASSES
    indices += image.to(tl.int64) * rows * CLASSES
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column <= CLASSES)[None, :]
    places = row[:, None] * (CLASSES + 1) + column[None, :]
    logit = tl.load(class_logits + places, mask=inside, other=float("-inf")).to(tl.float32)
    exponential = tl.exp(logit - tl.where(row < rows, tl.max(logit, axis=1), 0.0)[:, None])
    score = exponential / tl.where(row < rows, tl.sum(exponential, axis=1), 1.0)[:, None]

    threshold = tl.maximum(tl.load(min_score), score_threshold)
    real = (row < tl.load(count + image))[:, None] & (score > threshold)
    places = row[:, None] * CLASSES + column[None, :] - 1
    foreground = inside & (column > 0)[None, :]
    tl.store(keys + places, tl.where(real, score_key(score), EMPTY), mask=foreground)
    tl.store(indices + places, places, mask=foreground)


@triton.jit
def decode_detections(
    box_deltas,
    proposals,
    keys,
    indices,
    boxes,
    best_keys,
    best_indices,
    canvas_height,
    canvas_width,
    rows,
    candidates,
    k,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """Sort `keys` and `indices [B, candidates]`, and decode the k best: `boxes [B, 4, k]`, `best_keys [B, k]`, `best_indices [B, k]`.

    Deltas are `[B, rows, 4 (1 + CLASSES)]`, with torchvision's weights (10, 10, 5, 5). Boxes of EMPTY candidates are 0. Grid (blocks of
    candidates, B).
    """
    image = tl.program_id(1)
    box_deltas += image.to(tl.int64) * rows * (4 * (CLASSES + 1))
    proposals += image * rows * 4
    keys += image * candidates
    indices += image * candidates
    boxes += image * 4 * k
    best_keys += image * k
    best_indices += image * k
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < candidates
    key = tl.load(keys + place, mask=inside, other=EMPTY)
    sorted_place = rank(keys, candidates, place, key, COMPARED)
    best = inside & (sorted_place < k)
    tl.store(best_keys + sorted_place, key, mask=best)

    real = best & (key != EMPTY)
    index = tl.load(indices + place, mask=real, other=0)
    tl.store(best_indices + sorted_place, index, mask=best)
    proposal = proposals + index // CLASSES * 4
    delta = box_deltas + (index // CLASSES * (CLASSES + 1) + index % CLASSES + 1) * 4
    left, top, right, bottom = decode(
        tl.load(proposal, mask=real, other=0.0),
        tl.load(proposal + 1, mask=real, other=0.0),
        tl.load(proposal + 2, mask=real, other=0.0),
        tl.load(proposal + 3, mask=real, other=0.0),
        tl.load(delta, mask=real, other=0.0).to(tl.float32) / 10.0,
        tl.load(delta + 1, mask=real, other=0.0).to(tl.float32) / 10.0,
        tl.load(delta + 2, mask=real, other=0.0).to(tl.float32) / 5.0,
        tl.load(delta + 3, mask=real, other=0.0).to(tl.float32) / 5.0,
        canvas_height.to(tl.float32),
        canvas_width.to(tl.float32),
    )
    box = boxes + sorted_place
    tl.store(box, left, mask=best)
    tl.store(box + k, top, mask=best)
    tl.store(box + 2 * k, right, mask=best)
    tl.store(box + 3 * k, bottom, mask=best)


@triton.jit
def fill_slots(
    boxes,
    best_indices,
    kept_keys,
    kept_counts,
    slot_boxes,
    scores,
    labels,
    slots,
    n,
    k,
    detections,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """Write the best boxes that NMS kept, `kept_keys [B, k]`, to the `detections` slots of their image, best first.

    Empty slots have box and score 0 and label -1. `slots [n]` lists the filled slots, image after image. Grid (blocks of
    max(k, detections), B).
    """
    image = tl.program_id(1)
    boxes += image * 4 * k
    best_indices += image * k
    kept_keys += image * k
    first = image * detections
    slot_boxes += first * 4
    scores += first
    labels += first
    # Each program counts the filled slots of the images before its own; there are few images.
    before = tl.full((), 0, tl.int32)
    for start in range(0, image, BLOCK):
        other = start + tl.arange(0, BLOCK)
        before += tl.sum(tl.minimum(tl.load(kept_counts + other, mask=other < image, other=0), detections))
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(kept_keys + place, mask=place < k, other=EMPTY)
    slot = rank(kept_keys, k, place, key, COMPARED)
    inside = slot < detections
    filled = inside & (key != EMPTY)
    left, top, right, bottom = load_box(boxes, k, place, filled)
    tl.store(slot_boxes + slot * 4, left, mask=inside)
    tl.store(slot_boxes + slot * 4 + 1, top, mask=inside)
    tl.store(slot_boxes + slot * 4 + 2, right, mask=inside)
    tl.store(slot_boxes + slot * 4 + 3, bottom, mask=inside)
    label = tl.load(best_indices + place, mask=filled, other=0) % CLASSES
    tl.store(scores + slot, tl.where(filled, key_score(key), 0.0), mask=inside)
    tl.store(labels + slot, tl.where(filled, label, -1).to(tl.int64), mask=inside)
    tl.store(slots + before + slot, (first + slot).to(tl.int64), mask=filled)
    if (tl.program_id(0) == 0) & (image == tl.num_programs(1) - 1):
        tl.store(n, (before + tl.minimum(tl.load(kept_counts + image), detections)).to(tl.int64))
