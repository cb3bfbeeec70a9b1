"""MsmRoute's kernels: `choose_grids` gives every instance its grid, and `list_stage` lists the instances of one stage.

Without a budget, an instance's grid is the one with the largest log p (paper, Eq. 1). With one, it is `argmax_k (log p_k - lambda
cost_k)` with the smallest lambda for which the mean and the total cost keep to their budgets. Both fall in steps as lambda grows; a step
lies where some instance scores two grids the same: at most 6 values an instance. All of them are tried.
"""

# mypy: ignore-errors
# Triton's language is untyped.

import triton
import triton.language as tl

from runtime import graph

MSM = tl.constexpr(graph.MSM)
SIZE_BASED = tl.constexpr(graph.SIZE_BASED)


@triton.jit
def choose_grids(
    logits,
    boxes,
    override,
    slots,
    budget,
    total_budget,
    costs,
    grids_of_slots,
    grids_of_instances,
    n,
    slot_count,
    canvas_area,
    BLOCK_N: tl.constexpr,
    BLOCK_LAMBDAS: tl.constexpr,
):
    """The grid of each of n <= slot_count <= BLOCK_N instances: `grids_of_instances [n] int32`, and `grids_of_slots [slot_count]`, -1 in
    empty slots. One program, because the budget makes an instance's grid depend on all others. Arithmetic is in fp32."""
    instance = tl.arange(0, BLOCK_N)
    valid = instance < n
    log_p = _log_probabilities(logits, instance, valid)
    given = tl.load(override + instance, mask=valid, other=0)
    routed = (valid & (given == MSM)).to(tl.float32)
    share = tl.div_rn(1.0, tl.maximum(tl.sum(routed), 1.0))
    limits = _limit(budget), _limit(total_budget)
    own = _four(costs)
    fixed = _four(costs + 4)

    penalty = 0.0
    grid = _best_grid(log_p, penalty, own)
    paid = _cost(grid, own) * routed
    largest = tl.max(tl.where(routed > 0.0, grid, 0))
    if not _within(tl.sum(paid * share), tl.sum(paid) + _cost(largest, fixed), limits):
        penalty = _smallest_penalty(logits, n, valid, log_p, routed, share, limits, own, fixed, BLOCK_LAMBDAS)
    grid = _best_grid(log_p, penalty, own)
    grid = tl.where(given == SIZE_BASED, _size_based(boxes, instance, valid, canvas_area), grid)
    grid = tl.where((given >= 0) & (given < SIZE_BASED), given.to(tl.int32), grid)
    tl.store(grids_of_instances + instance, grid, mask=valid)

    slot = tl.load(slots + instance, mask=valid, other=0)
    tl.store(grids_of_slots + instance, tl.full([BLOCK_N], -1, tl.int64), mask=instance < slot_count)
    # Different threads write -1 and the grid to a filled slot: the grid must come second.
    tl.debug_barrier()
    tl.store(grids_of_slots + slot, grid.to(tl.int64), mask=valid & (slot >= 0) & (slot < slot_count))


@triton.jit
def list_stage(
    grids_of_instances,
    slots,
    continuing,
    exiting,
    exit_slots,
    continuing_count,
    exiting_count,
    n,
    stage,
    BLOCK_N: tl.constexpr,
):
    """The lists of one stage, whose instances are those of grid `stage` or larger, in their order.

    `continuing` lists their positions in the previous stage. Stage 0 has all instances, and writes neither this list nor its count.
    `exiting` lists the positions, in this stage, of the instances whose grid is `stage`, and `exit_slots` their slots.
    """
    instance = tl.arange(0, BLOCK_N)
    valid = instance < n
    grid = tl.load(grids_of_instances + instance, mask=valid, other=0)
    continues = valid & (grid >= stage)
    exits = valid & (grid == stage)
    position = _count_before(continues)
    position_in_previous = _count_before(valid & (grid >= stage - 1))
    tl.store(continuing + position, position_in_previous.to(tl.int64), mask=continues & (stage > 0))
    tl.store(continuing_count, tl.sum(continues.to(tl.int32)).to(tl.int64), mask=stage > 0)

    place = _count_before(exits)
    tl.store(exiting + place, position.to(tl.int64), mask=exits)
    tl.store(exit_slots + place, tl.load(slots + instance, mask=valid, other=0), mask=exits)
    tl.store(exiting_count, tl.sum(exits.to(tl.int32)).to(tl.int64))


@triton.jit
def _log_probabilities(logits, rows, valid):
    """`log_softmax` of rows of `logits [n, 4]`: a tuple of four, one for each grid."""
    x0 = tl.load(logits + 4 * rows, mask=valid, other=0.0).to(tl.float32)
    x1 = tl.load(logits + 4 * rows + 1, mask=valid, other=0.0).to(tl.float32)
    x2 = tl.load(logits + 4 * rows + 2, mask=valid, other=0.0).to(tl.float32)
    x3 = tl.load(logits + 4 * rows + 3, mask=valid, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))
    x0, x1, x2, x3 = x0 - largest, x1 - largest, x2 - largest, x3 - largest
    total = tl.log(tl.exp(x0) + tl.exp(x1) + tl.exp(x2) + tl.exp(x3))
    return x0 - total, x1 - total, x2 - total, x3 - total


@triton.jit
def _four(values):
    """Four values in a row: a tuple, one for each grid."""
    return tl.load(values), tl.load(values + 1), tl.load(values + 2), tl.load(values + 3)


@triton.jit
def _best_grid(log_p, penalty, own):
    """The grid with the largest `log p - penalty cost`, the smallest of equals."""
    best = log_p[0] - penalty * own[0]
    grid = tl.zeros(best.shape, tl.int32)
    for k in tl.static_range(1, 4):
        score = log_p[k] - penalty * own[k]
        grid = tl.where(score > best, k, grid)
        best = tl.maximum(score, best)
    return grid


@triton.jit
def _cost(grid, costs):
    return tl.where(grid < 2, tl.where(grid == 0, costs[0], costs[1]), tl.where(grid == 2, costs[2], costs[3]))


@triton.jit
def _within(mean_cost, total_cost, limits):
    """Whether costs keep to the limits on the mean and on the total."""
    return (mean_cost <= limits[0]) & (total_cost <= limits[1])


@triton.jit
def _limit(budget):
    """The limit with its tolerance; infinity for a budget of 0 or less, which sets no limit."""
    value = tl.load(budget)
    return tl.where(value > 0.0, value * (1 + 1e-6), float("inf"))


@triton.jit
def _smallest_penalty(logits, n, valid, log_p, routed, share, limits, own, fixed, BLOCK_LAMBDAS: tl.constexpr):
    """The smallest `_indifference` of all instances that keeps to the limits; the largest plus 1 if none does."""
    largest = tl.zeros(valid.shape, tl.float32)
    for low in tl.static_range(3):
        for high in tl.static_range(low + 1, 4):
            largest = tl.maximum(largest, _indifference(log_p[low], log_p[high], own[high] - own[low]))
    beyond = tl.max(tl.where(valid, largest, 0.0)) + 1.0

    smallest = tl.full([BLOCK_LAMBDAS], 0.0, tl.float32) + beyond
    columns = (log_p[0][None, :], log_p[1][None, :], log_p[2][None, :], log_p[3][None, :])
    counts = (routed > 0.0)[None, :]
    for first in range(0, n, BLOCK_LAMBDAS):
        row = first + tl.arange(0, BLOCK_LAMBDAS)
        row_log_p = _log_probabilities(logits, row, row < n)
        for low in tl.static_range(3):
            for high in tl.static_range(low + 1, 4):
                lambdas = _indifference(row_log_p[low], row_log_p[high], own[high] - own[low])
                tried = _best_grid(columns, lambdas[:, None], own)
                paid = _cost(tried, own) * routed[None, :]
                once = _cost(tl.max(tl.where(counts, tried, 0), axis=1), fixed)
                fits = _within(tl.sum(paid * share, axis=1), tl.sum(paid, axis=1) + once, limits)
                smallest = tl.minimum(smallest, tl.where((row < n) & fits, lambdas, beyond))
    return tl.min(smallest)


@triton.jit
def _indifference(lower, upper, gap):
    """The lambda at which two grids whose costs differ by `gap` score the same, and slightly more, because the division rounds."""
    return tl.maximum((upper - lower) / gap, 0.0) * (1 + 1e-5) + 1e-6


@triton.jit
def _size_based(boxes, rows, valid, canvas_area):
    """The size-based rule (Eq. 8) of boxes. Each step rounds as in dynamask.msm: sides that are powers of two are common."""
    left = tl.load(boxes + 4 * rows, mask=valid, other=0.0)
    top = tl.load(boxes + 4 * rows + 1, mask=valid, other=0.0)
    right = tl.load(boxes + 4 * rows + 2, mask=valid, other=0.0)
    bottom = tl.load(boxes + 4 * rows + 3, mask=valid, other=0.0)
    side = tl.sqrt_rn(tl.div_rn(tl.maximum((right - left) * (bottom - top), 0.0), canvas_area))
    grid = tl.floor(4.0 + tl.log2(tl.maximum(side, 1e-6)))
    return tl.clamp(grid, 0.0, 3.0).to(tl.int32)


@triton.jit
def _count_before(chosen):
    """For each instance, the number of chosen instances before it."""
    chosen = chosen.to(tl.int32)
    return tl.cumsum(chosen, axis=0) - chosen
