"""The plan of a run: rates, phases and the order of the images."""

from __future__ import annotations

import numpy as np
import pytest

from dynamask.config import TrainConfig
from dynamask.train.schedule import Schedule, StepSampler, mixed_seed

RECIPE = TrainConfig(batch=4, learning_rate=0.02, phase1_epochs=1.0, phase2_epochs=3.0, rate_drop_epochs=(1.0, 2.0), warmup_steps=2)


def test_phase_one_lasts_the_warm_epochs() -> None:
    schedule = Schedule(RECIPE, images=10)  # two whole batches an epoch
    assert schedule.total_steps == 8
    assert [schedule.phase(step) for step in range(8)] == [1, 1, 2, 2, 2, 2, 2, 2]


def test_rate_warms_up_and_drops_after_the_epochs_of_phase_two() -> None:
    schedule = Schedule(RECIPE, images=10)
    full = 0.02 * 4 / 16
    expected = [full / 2, full, full, full, full / 10, full / 10, full / 100, full / 100]
    assert [schedule.rate(step) for step in range(8)] == pytest.approx(expected)


def test_a_cosine_falls_from_the_end_of_the_warm_up_to_zero() -> None:
    schedule = Schedule(RECIPE.model_copy(update={"cosine": True}), images=10)  # 8 steps, 2 of them warm-up
    full = 0.02 * 4 / 16
    falling = full * (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    assert [schedule.rate(step) for step in range(8)] == pytest.approx([full / 2, full, *falling])


def test_evaluation_is_due_every_epoch_and_at_the_end() -> None:
    assert [step for step in range(9) if Schedule(RECIPE, images=10).evaluates(step)] == [2, 4, 6, 8]
    never = RECIPE.model_copy(update={"evaluate_every_epochs": None})
    assert not any(Schedule(never, images=10).evaluates(step) for step in range(9))
    assert Schedule(never, images=10).saves(8)
    seldom = RECIPE.model_copy(update={"evaluate_every_epochs": 0.0})
    assert [step for step in range(9) if Schedule(seldom, images=10).evaluates(step)] == [8]


def test_an_epoch_meets_every_image_once_in_an_order_of_its_own() -> None:
    schedule = Schedule(RECIPE, images=8)
    batches = list(StepSampler(schedule, 0))
    epochs = [[index for batch in batches[first : first + 2] for index, _ in batch] for first in range(0, 8, 2)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [epoch for batch in batches for _, epoch in batch[:1]] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_sampler_that_starts_late_gives_the_rest_of_the_same_batches() -> None:
    schedule = Schedule(RECIPE, images=10)
    whole = list(StepSampler(schedule, 0))
    for first in (1, 2, 5, 8):
        sampler = StepSampler(schedule, first)
        assert list(sampler) == whole[first:]
        assert len(sampler) == len(whole) - first


def test_fewer_images_than_a_batch_make_one_smaller_batch() -> None:
    batches = list(StepSampler(Schedule(RECIPE, images=3), 0))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]


def test_seeds_differ_between_steps_and_runs() -> None:
    seeds = {mixed_seed(run, "step", step) for run in range(10) for step in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
