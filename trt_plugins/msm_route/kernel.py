"""MsmRoute's kernel: one program, as every instance's grid depends on all the others through the budget."""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl


@triton.jit
def msm_route(
    logits,
    boxes,
    override,
    slots,
    budget,
    grids,
    onward_28,
    onward_56,
    onward_112,
    here_14,
    here_28,
    here_56,
    here_112,
    slots_14,
    slots_28,
    slots_56,
    slots_112,
    n1,
    n2,
    n3,
    m0,
    m1,
    m2,
    m3,
    n,
    slot_count,
    canvas_area,
    COST0: tl.constexpr,
    COST1: tl.constexpr,
    COST2: tl.constexpr,
    COST3: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_LAMBDAS: tl.constexpr,
):
    """Everything of the operator, for n <= slot_count <= BLOCK_N instances, in fp32."""
    i = tl.arange(0, BLOCK_N)
    listed = i < n
    p0, p1, p2, p3 = _log_probabilities(logits, i, listed)
    wish = tl.load(override + i, mask=listed, other=0)
    free = (listed & (wish == -1)).to(tl.float32)
    weight = tl.div_rn(free, tl.maximum(tl.sum(free), 1.0))
    limit = tl.load(budget)
    ceiling = limit * (1 + 1e-6)

    penalty = 0.0
    grid = _argmax(p0, p1, p2, p3, penalty, COST0, COST1, COST2, COST3)
    if (limit > 0.0) & (tl.sum(_cost(grid, COST0, COST1, COST2, COST3) * weight) > ceiling):
        beyond = tl.max(tl.where(listed, _dearest_indifference(p0, p1, p2, p3, COST0, COST1, COST2, COST3), 0.0)) + 1.0
        least = tl.full([BLOCK_LAMBDAS], 0.0, tl.float32) + beyond
        for first in range(0, n, BLOCK_LAMBDAS):
            j = first + tl.arange(0, BLOCK_LAMBDAS)
            q0, q1, q2, q3 = _log_probabilities(logits, j, j < n)
            for pair in tl.static_range(6):
                if pair == 0:
                    lambdas = _indifference(q0, q1, COST1 - COST0)
                elif pair == 1:
                    lambdas = _indifference(q0, q2, COST2 - COST0)
                elif pair == 2:
                    lambdas = _indifference(q0, q3, COST3 - COST0)
                elif pair == 3:
                    lambdas = _indifference(q1, q2, COST2 - COST1)
                elif pair == 4:
                    lambdas = _indifference(q1, q3, COST3 - COST1)
                else:
                    lambdas = _indifference(q2, q3, COST3 - COST2)
                tried = _argmax(p0[None, :], p1[None, :], p2[None, :], p3[None, :], lambdas[:, None], COST0, COST1, COST2, COST3)
                mean_cost = tl.sum(_cost(tried, COST0, COST1, COST2, COST3) * weight[None, :], axis=1)
                least = tl.minimum(least, tl.where((j < n) & (mean_cost <= ceiling), lambdas, beyond))
        penalty = tl.min(least)
    grid = _argmax(p0, p1, p2, p3, penalty, COST0, COST1, COST2, COST3)
    grid = tl.where(wish == 4, _size_based(boxes, i, listed, canvas_area), grid)
    grid = tl.where((wish >= 0) & (wish < 4), wish.to(tl.int32), grid)

    slot = tl.load(slots + i, mask=listed, other=0)
    tl.store(grids + i, tl.full([BLOCK_N], -1, tl.int64), mask=i < slot_count)
    # Slots that are listed are written twice, by different threads: first all -1, then the grids.
    tl.debug_barrier()
    tl.store(grids + slot, grid.to(tl.int64), mask=listed)

    at1, at2, at3 = listed & (grid >= 1), listed & (grid >= 2), listed & (grid >= 3)
    # place_k: position in stage k's set, the instances whose grid is k or larger; stage 0 has all.
    place1, place2, place3 = _positions(at1), _positions(at2), _positions(at3)
    tl.store(onward_28 + place1, i.to(tl.int64), mask=at1)
    tl.store(onward_56 + place2, place1.to(tl.int64), mask=at2)
    tl.store(onward_112 + place3, place2.to(tl.int64), mask=at3)
    # Those that end in stage k and come before are those before in its set, less those that go on.
    _list_here(here_14, slots_14, i, i - place1, slot, listed & (grid == 0))
    _list_here(here_28, slots_28, place1, place1 - place2, slot, listed & (grid == 1))
    _list_here(here_56, slots_56, place2, place2 - place3, slot, listed & (grid == 2))
    _list_here(here_112, slots_112, place3, place3, slot, at3)
    count1, count2, count3 = tl.sum(at1.to(tl.int32)), tl.sum(at2.to(tl.int32)), tl.sum(at3.to(tl.int32))
    tl.store(n1, count1.to(tl.int64))
    tl.store(n2, count2.to(tl.int64))
    tl.store(n3, count3.to(tl.int64))
    tl.store(m0, (n - count1).to(tl.int64))
    tl.store(m1, (count1 - count2).to(tl.int64))
    tl.store(m2, (count2 - count3).to(tl.int64))
    tl.store(m3, count3.to(tl.int64))


@triton.jit
def _log_probabilities(logits, rows, listed):
    """log-softmax of the four logits of some rows, 0 where a row is not listed: `x - max - log(sum)`, in PyTorch's order."""
    x0 = tl.load(logits + 4 * rows, mask=listed, other=0.0).to(tl.float32)
    x1 = tl.load(logits + 4 * rows + 1, mask=listed, other=0.0).to(tl.float32)
    x2 = tl.load(logits + 4 * rows + 2, mask=listed, other=0.0).to(tl.float32)
    x3 = tl.load(logits + 4 * rows + 3, mask=listed, other=0.0).to(tl.float32)
    most = tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))
    x0, x1, x2, x3 = x0 - most, x1 - most, x2 - most, x3 - most
    total = tl.log(tl.exp(x0) + tl.exp(x1) + tl.exp(x2) + tl.exp(x3))
    return x0 - total, x1 - total, x2 - total, x3 - total


@triton.jit
def _argmax(p0, p1, p2, p3, penalty, COST0: tl.constexpr, COST1: tl.constexpr, COST2: tl.constexpr, COST3: tl.constexpr):
    """The grid with the largest `log p - penalty cost`, the smallest of equals."""
    best = p0 - penalty * COST0
    grid = tl.zeros(best.shape, tl.int32)
    score = p1 - penalty * COST1
    grid = tl.where(score > best, 1, grid)
    best = tl.maximum(score, best)
    score = p2 - penalty * COST2
    grid = tl.where(score > best, 2, grid)
    best = tl.maximum(score, best)
    return tl.where(p3 - penalty * COST3 > best, 3, grid)


@triton.jit
def _cost(grid, COST0: tl.constexpr, COST1: tl.constexpr, COST2: tl.constexpr, COST3: tl.constexpr):
    return tl.where(grid < 2, tl.where(grid == 0, COST0, COST1), tl.where(grid == 2, COST2, COST3))


@triton.jit
def _indifference(lower, upper, gap: tl.constexpr):
    """A hair above the lambda at which two grids score the same, whose costs are `gap` apart: the hair forgives the quick division."""
    return tl.maximum((upper - lower) / gap, 0.0) * (1 + 1e-5) + 1e-6


@triton.jit
def _dearest_indifference(p0, p1, p2, p3, COST0: tl.constexpr, COST1: tl.constexpr, COST2: tl.constexpr, COST3: tl.constexpr):
    """The largest of an instance's six."""
    most = tl.maximum(_indifference(p0, p1, COST1 - COST0), _indifference(p0, p2, COST2 - COST0))
    most = tl.maximum(most, _indifference(p0, p3, COST3 - COST0))
    most = tl.maximum(most, _indifference(p1, p2, COST2 - COST1))
    most = tl.maximum(most, _indifference(p1, p3, COST3 - COST1))
    return tl.maximum(most, _indifference(p2, p3, COST3 - COST2))


@triton.jit
def _size_based(boxes, rows, listed, canvas_area):
    """The size-based rule (Eq. 8) of boxes, each step rounded as in dynamask.msm: sides that are powers of two are common."""
    left = tl.load(boxes + 4 * rows, mask=listed, other=0.0)
    top = tl.load(boxes + 4 * rows + 1, mask=listed, other=0.0)
    right = tl.load(boxes + 4 * rows + 2, mask=listed, other=0.0)
    bottom = tl.load(boxes + 4 * rows + 3, mask=listed, other=0.0)
    side = tl.sqrt_rn(tl.div_rn(tl.maximum((right - left) * (bottom - top), 0.0), canvas_area))
    grid = tl.floor(4.0 + tl.log2(tl.maximum(side, 1e-6)))
    return tl.clamp(grid, 0.0, 3.0).to(tl.int32)


@triton.jit
def _positions(chosen):
    """How many are chosen before each."""
    chosen = chosen.to(tl.int32)
    return tl.cumsum(chosen, axis=0) - chosen


@triton.jit
def _list_here(here, here_slots, place, position, slot, chosen):
    tl.store(here + position, place.to(tl.int64), mask=chosen)
    tl.store(here_slots + position, slot, mask=chosen)
