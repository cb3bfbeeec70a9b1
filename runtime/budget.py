"""Keeps a budget over many images; the engine keeps one within each image."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

HORIZON = 16
"""Number of images after which unused budget lapses, so that an hour with few instances does not allow a minute of high cost."""


class BudgetKeeper:
    """Gives each image the budget with which the mean cost of all instances so far comes to `mean_gmacs`.

    Within one image the mean cost moves in steps, and the fewer instances there are, the larger the steps. A budget that each image
    keeps for itself is therefore not used up on average. Later images may use the budget that an image leaves over.
    """

    def __init__(self, mean_gmacs: float, grid_gmacs: Mapping[int, float]) -> None:
        """Keep to `mean_gmacs` per instance, where an instance at grid g costs `grid_gmacs[g]`; 0 sets no limit (and needs no costs)."""
        self._mean_gmacs = mean_gmacs
        self._grid_gmacs = grid_gmacs
        self._saved: deque[float] = deque(maxlen=HORIZON)
        self._counts: deque[int] = deque(maxlen=HORIZON)

    def budget_gmacs(self) -> float:
        """Mean GMAC per instance for the next image, between the costs of the smallest and the largest grid; 0 without a limit."""
        if not self._mean_gmacs:
            return 0.0
        # The next image is assumed to have as many instances as the fullest recent one, so that no budget is used twice.
        expected = max(self._counts, default=0)
        budget = self._mean_gmacs + (sum(self._saved) / expected if expected else 0.0)
        return float(np.clip(budget, min(self._grid_gmacs.values()), max(self._grid_gmacs.values())))

    def spend(self, grids: npt.NDArray[np.integer]) -> None:
        """Record the grids (14, 28, 56 or 112) of the image's instances."""
        if not self._mean_gmacs:
            return
        saved = sum(self._mean_gmacs - self._grid_gmacs[int(grid)] for grid in grids)
        # An overrun is taken from the oldest unused budget first: otherwise it would lapse together with it.
        for index, earlier in enumerate(self._saved):
            if saved < 0 < earlier:
                paid = min(earlier, -saved)
                self._saved[index] -= paid
                saved += paid
        self._saved.append(saved)
        self._counts.append(len(grids))
