"""`shapes`: a seeded generator of images with exact instance masks, in which difficulty and size are independent.

Two classes have smooth outlines, which a 14 x 14 mask holds well, and five have thin teeth, branches or strokes, which it loses. The side
of an object is drawn before its class, from one distribution for all classes, so that the outline alone says which grid an object needs.
"""

from dynamask.data.shapes.dataset import ShapesDataset
from dynamask.data.shapes.outlines import CLASSES, INTRICATE, SMOOTH, categories
from dynamask.data.shapes.scenes import draw_frames, draw_image
from dynamask.data.shapes.write import write_dataset, write_video

__all__ = [
    "CLASSES",
    "INTRICATE",
    "SMOOTH",
    "ShapesDataset",
    "categories",
    "draw_frames",
    "draw_image",
    "write_dataset",
    "write_video",
]
