from __future__ import annotations

import time

import numpy as np
import pytest

from runtime.annotate import GRID_COLORS, annotate
from tests.runtime.fake_stream import make_instances

SIZE = (432, 768)


def test_pixels_are_tinted_with_the_colour_of_the_grid_and_others_stay() -> None:
    image = np.full((*SIZE, 3), 100, np.uint8)
    instances = make_instances(1, SIZE, seed=3)
    drawn = annotate(image, instances)
    x0, y0, crop = next(iter(instances.crops()))
    rows, columns = np.nonzero(crop)
    y, x = y0 + int(rows.mean()), x0 + int(columns.mean())
    expected = 0.6 * 100 + 0.4 * np.array(GRID_COLORS[int(instances.grids[0])])
    np.testing.assert_allclose(drawn[y, x], expected, atol=1)
    assert (image == 100).all(), "the image itself is left alone"
    far = np.ones(SIZE, bool)
    far[max(0, y0 - 30) : y0 + crop.shape[0] + 3, max(0, x0 - 3) : x0 + max(crop.shape[1], 120) + 3] = False
    far[SIZE[0] // 2 :, : SIZE[1] // 3] = False  # the legend
    assert (drawn[far] == 100).all()


def test_instances_below_the_score_are_not_drawn() -> None:
    image = np.zeros((*SIZE, 3), np.uint8)
    instances = make_instances(5, SIZE)
    np.testing.assert_array_equal(annotate(image, instances, score=1.0), annotate(image, instances[:0]))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (33, 17), SIZE])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_any_number_of_instances_fits_on_any_size(size: tuple[int, int], count: int) -> None:
    drawn = annotate(np.zeros((*size, 3), np.uint8), make_instances(count, size))
    assert drawn.shape == (*size, 3)
    assert drawn.dtype == np.uint8


def test_twenty_instances_cost_less_than_a_frame_can_spare() -> None:
    image = np.zeros((*SIZE, 3), np.uint8)
    instances = make_instances(20, SIZE)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        annotate(image, instances, score=0.0)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.015
