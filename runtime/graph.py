"""The portable graph as everything sees it from outside: its grids, inputs, outputs, and what its inputs mean.

`export/graph.py` writes this graph, every target runs it, and `docs/architecture.md` gives the shapes.
"""

from __future__ import annotations

GRIDS: tuple[int, int, int, int] = (14, 28, 56, 112)
"""The mask grids, tiny to large (paper, section 3.2): index k of the graph is a grid of `GRIDS[k]` cells a side."""

MSM = -1
"""The value of `grid_override` that leaves the choice of the grid to the model."""
SIZE_BASED = len(GRIDS)
"""The value of `grid_override` that chooses the grid by the instance's size (paper, Eq. 8); 0 to 3 force that grid."""

PYRAMID = ("p2", "p3", "p4", "p5")
"""The i-FPN's maps, which pass from the detector to the mask branch."""
DETECTIONS = ("boxes", "scores", "labels")
"""The detector's other outputs; outputs of the whole graph too."""
SLOTS = tuple(f"slots_{grid}" for grid in GRIDS)
"""By grid: the detection slots that got it."""
MASKS = tuple(f"masks_{grid}" for grid in GRIDS)
"""By grid: the mask logits of those slots."""

DETECTOR_INPUTS = ("image", "min_score")
MASK_CONTROLS = ("budget", "grid_override")
"""What the mask branch takes besides the detector's outputs."""
MASK_OUTPUTS = ("grids", *SLOTS, *MASKS)
INPUTS = (*DETECTOR_INPUTS, *MASK_CONTROLS)
OUTPUTS = (*DETECTIONS, *MASK_OUTPUTS)
