"""The interface of the exported graph: its mask grids, its inputs and its outputs.

`export/graph.py` writes this graph and every target runs it; `docs/architecture.md` gives shapes and types.
"""

from __future__ import annotations

GRIDS: tuple[int, int, int, int] = (14, 28, 56, 112)
"""The mask grids, smallest first (paper, section 3.2): index k in the graph is a grid of `GRIDS[k]` x `GRIDS[k]` cells."""

MSM = -1
"""The value of `grid_override` with which the model (its mask switch module) chooses the grid."""
SIZE_BASED = len(GRIDS)
"""The value of `grid_override` with which the size of the box chooses the grid (paper, Eq. 8); 0 to 3 are indices of `GRIDS`."""

PYRAMID = ("p2", "p3", "p4", "p5")
"""The feature maps of the image-level pyramid, which pass from the detector to the mask branch."""
DETECTIONS = ("boxes", "scores", "labels")
"""The other outputs of the detector; the whole graph has them too."""
SLOTS = tuple(f"slots_{grid}" for grid in GRIDS)
"""For each grid, the detection slots whose masks have it."""
CONTINUE = tuple(f"continue_{grid}" for grid in GRIDS[1:])
"""By grid from 28 on: the instances that continue to its stage, as positions among those of the stage before."""
EXIT = tuple(f"exit_{grid}" for grid in GRIDS)
"""By grid: the instances that exit there, as positions among those that run through its stage."""
MASKS = tuple(f"masks_{grid}" for grid in GRIDS)
"""For each grid, the mask logits of these slots."""

DETECTOR_INPUTS = ("image", "min_score")
COST_CONTROLS = ("total_budget", "costs")
"""The inputs that graphs of earlier versions lack: those have their costs in GMAC inside, and keep the mean of an instance alone."""
MASK_CONTROLS = ("budget", *COST_CONTROLS, "grid_override")
"""The inputs of the mask branch besides the outputs of the detector."""
MASK_OUTPUTS = ("grids", *SLOTS, *MASKS)
INPUTS = (*DETECTOR_INPUTS, *MASK_CONTROLS)
OUTPUTS = (*DETECTIONS, *MASK_OUTPUTS)
