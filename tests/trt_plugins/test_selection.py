"""The kernels that Proposals and Detections share, in Triton's interpreter, against NumPy and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms

from trt_plugins.operator import ALIGNMENT
from trt_plugins.selection import Selection
from trt_plugins.selection.kernel import EMPTY, decode, key_score, overlaps, rank, score_key, select, suppress
from trt_plugins.selection.selection import RANKED, chunk, chunks

NOTHING = EMPTY.value
ITEMS = 16

few = settings(deadline=None, max_examples=10)
"""For what runs in the interpreter."""


@triton.jit
def _round_trip(scores, keys, back, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    key = score_key(tl.load(scores + place))
    tl.store(keys + place, key)
    tl.store(back + place, key_score(key))


@triton.jit
def _ranked(keys, ranks, width, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    key = tl.load(keys + place, mask=place < width, other=EMPTY)
    tl.store(ranks + place, rank(keys, width, place, key, 16))


@triton.jit
def _decoded(anchors, deltas, boxes, height, width, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE) * 4
    left, top, right, bottom = decode(
        tl.load(anchors + place),
        tl.load(anchors + place + 1),
        tl.load(anchors + place + 2),
        tl.load(anchors + place + 3),
        tl.load(deltas + place),
        tl.load(deltas + place + 1),
        tl.load(deltas + place + 2),
        tl.load(deltas + place + 3),
        height,
        width,
    )
    tl.store(boxes + place, left)
    tl.store(boxes + place + 1, top)
    tl.store(boxes + place + 2, right)
    tl.store(boxes + place + 3, bottom)


@few
@given(st.lists(st.floats(allow_nan=False, width=32), min_size=ITEMS, max_size=ITEMS))
def test_keys_order_as_scores_do_and_lead_back_to_them(values: list[float]) -> None:
    scores = torch.tensor([0.0, -0.0, *values[2:]], dtype=torch.float32)
    keys, back = torch.empty(ITEMS, dtype=torch.int32), torch.empty(ITEMS)
    _round_trip[(1,)](scores, keys, back, SIZE=ITEMS)
    assert torch.equal(keys[:, None] < keys, scores[:, None] < scores)
    assert torch.equal(back, scores) and (keys > NOTHING).all()


@few
@given(
    keys=st.lists(st.integers(-3, 3) | st.just(NOTHING) | st.integers(NOTHING, 2**31 - 1), min_size=1, max_size=150),
    k=st.integers(1, 32),
)
def test_each_chunk_gives_its_k_best_in_the_order_in_which_they_stand(keys: list[int], k: int) -> None:
    size = 64
    row = torch.tensor([keys, keys[::-1]], dtype=torch.int32)
    indices = torch.arange(2 * len(keys), dtype=torch.int32).view(2, -1) + 7
    count = -(-len(keys) // size)
    best_keys, best_indices = torch.zeros(2, 2, count, k, dtype=torch.int32)
    select[(count, 2)](row, indices, best_keys, best_indices, len(keys), k, CHUNK=size)
    for values, places, got, got_places in zip(row.numpy(), indices.numpy(), best_keys.numpy(), best_indices.numpy(), strict=True):
        for part in range(count):
            these = values[part * size : (part + 1) * size]
            best = np.sort(np.argsort(-these.astype(np.int64), kind="stable")[:k])
            np.testing.assert_array_equal(got[part][: len(best)], these[best])
            np.testing.assert_array_equal(got_places[part][: len(best)], places[part * size : (part + 1) * size][best])
            assert (got[part][len(best) :] == NOTHING).all()


@few
@given(st.lists(st.integers(-3, 3) | st.just(NOTHING), min_size=1, max_size=48))
def test_ranks_are_places_in_a_stable_sort(keys: list[int]) -> None:
    ranks = torch.empty(64, dtype=torch.int32)
    _ranked[(1,)](torch.tensor(keys, dtype=torch.int32), ranks, len(keys), SIZE=64)
    order = np.argsort(-np.array(keys), kind="stable")
    assert ranks[order].tolist() == list(range(len(keys)))
    assert ranks[len(keys) :].tolist() == list(range(len(keys), 64))


def test_decoding_is_torchvisions() -> None:
    anchors, deltas = torch.tensor([[10.0, -20.0, 70.0, 40.0]]).repeat(ITEMS, 1), torch.randn(ITEMS, 4) * 3
    deltas[0], deltas[1] = 0.0, torch.tensor([0.0, 0.0, 50.0, -50.0])
    boxes = torch.empty(ITEMS, 4)
    _decoded[(1,)](anchors, deltas, boxes, 80.0, 96.0, SIZE=ITEMS)
    expected = clip_boxes_to_image(BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas, anchors), (80, 96))
    torch.testing.assert_close(boxes, expected, atol=1e-4, rtol=1e-6)


def _suppressed(boxes: Tensor, keys: Tensor, indices: Tensor, threshold: float, groups: int) -> Tensor:
    """Which of `boxes [rows, k, 4]`, best first, the kernels keep, `[rows, k] bool`."""
    rows, k = keys.shape
    words = -(-k // 32)
    better = torch.full((rows, words, k), 0x5A5A5A5A, dtype=torch.int32)
    kept_keys, counts = torch.zeros(rows, k, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    columns = boxes.transpose(1, 2).contiguous()
    overlaps[(-(-k // 64), words, rows)](columns, indices, better, k, threshold, GROUPS=groups, BLOCK=64)
    suppress[(rows,)](keys, better, kept_keys, counts, k, words, WORDS=triton.next_power_of_2(words))
    kept = kept_keys != NOTHING
    assert torch.equal(kept_keys[kept], keys[kept]) and torch.equal(kept.sum(1).int(), counts)
    return kept


@pytest.mark.parametrize(("k", "groups", "threshold"), [(1, 1, 0.5), (32, 1, 0.7), (100, 1, 0.25), (97, 3, 0.25), (40, 2, 0.0)])
def test_kept_boxes_are_those_of_torchvisions_nms(k: int, groups: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(k)
    corner = torch.randint(0, 30, (2, k, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + torch.randint(0, 20, (2, k, 2), generator=generator)], dim=2)
    keys = torch.arange(k, 0, -1, dtype=torch.int32).repeat(2, 1)
    real = [k, k - k // 4]
    keys[1, real[1] :] = NOTHING
    indices = torch.randint(0, 1000, (2, k), generator=generator, dtype=torch.int32)
    kept = _suppressed(boxes, keys, indices, threshold, groups)
    for row in range(2):
        expected = torch.zeros(k, dtype=torch.bool)
        for group in range(groups):
            places = torch.nonzero(indices[row, : real[row]] % groups == group)[:, 0]
            expected[places[nms(boxes[row, places], keys[row, places].float(), threshold)]] = True
        assert torch.equal(kept[row], expected)


@pytest.mark.parametrize(("step", "kept"), [(4.0, slice(0, None, 2)), (0.0, slice(0, 1)), (50.0, slice(None))])
def test_chains_of_any_length_are_resolved(step: float, kept: slice) -> None:
    # With step 4 each box overlaps its neighbours alone: whether the last is kept depends on all others.
    k = 80
    left = torch.arange(k) * step
    boxes = torch.stack([left, torch.zeros(k), left + 10, torch.full((k,), 10.0)], dim=1)[None]
    keys = torch.arange(k, 0, -1, dtype=torch.int32)[None]
    expected = torch.zeros(1, k, dtype=torch.bool)
    expected[:, kept] = True
    assert torch.equal(_suppressed(boxes, keys, torch.zeros_like(keys), 0.4, 1), expected)


@given(rows=st.integers(1, 5), width=st.integers(1, 10**6), k=st.integers(1, 4096), groups=st.integers(1, 80))
@settings(deadline=None)
def test_top_k_ends_with_rows_that_can_be_ranked(rows: int, width: int, k: int, groups: int) -> None:
    k = min(k, width)
    selection = Selection(rows, width, k, groups)
    assert selection.widths[0] == width and k <= selection.widths[-1] <= max(RANKED, k)
    assert all(after < before for before, after in zip(selection.widths, selection.widths[1:], strict=False))
    assert len(selection.top_k()) == len(selection.widths) - 1 <= 8
    assert all(launch.grid[0] * k == after for launch, after in zip(selection.top_k(), selection.widths[1:], strict=True))
    assert chunk(k) >= 2 * k and chunks(width, k) * chunk(k) >= width
    offsets = [part.offset for part in selection.workspace.parts.values()]
    assert offsets == sorted(set(offsets)) and not any(offset % ALIGNMENT for offset in offsets)
