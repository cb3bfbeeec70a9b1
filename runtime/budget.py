"""A budget kept over many images, where the engine keeps one within each."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

HORIZON = 16
"""Images whose savings may still be spent: a quiet hour does not pay for a slow minute."""


class BudgetKeeper:
    """Gives each image the budget with which the mean cost of all instances so far comes to `mean_gmacs`.

    Within one image the mean cost moves in steps, larger ones the fewer instances there are, and images that need little leave
    some over: a budget that every image keeps for itself is on average not used up. What is left over goes to the images that follow.
    """

    def __init__(self, mean_gmacs: float, grid_gmacs: Mapping[int, float]) -> None:
        """Keep to `mean_gmacs` an instance, where an instance at grid g costs `grid_gmacs[g]`."""
        self._mean = mean_gmacs
        self._costs = grid_gmacs
        self._saved: deque[float] = deque(maxlen=HORIZON)
        self._counts: deque[int] = deque(maxlen=HORIZON)

    def budget(self) -> float:
        """Mean GMAC an instance for the next image, between the costs of the smallest and of the largest grid."""
        # As if it held as many instances as the fullest of late: what is saved is not spent twice.
        expected = max(self._counts, default=0)
        budget = self._mean + (sum(self._saved) / expected if expected else 0.0)
        return float(np.clip(budget, min(self._costs.values()), max(self._costs.values())))

    def spend(self, grids: npt.NDArray[np.integer]) -> None:
        """Take note of the grids (14 .. 112) that the image's instances got."""
        saved = sum(self._mean - self._costs[int(grid)] for grid in grids)
        # A debt is paid back from the oldest savings first, so that it does not lapse with them.
        for index, earlier in enumerate(self._saved):
            if saved < 0 < earlier:
                paid = min(earlier, -saved)
                self._saved[index] -= paid
                saved += paid
        self._saved.append(saved)
        self._counts.append(len(grids))
