"""Data sets in COCO format, the `shapes` generator, and the canvas the model sees."""
