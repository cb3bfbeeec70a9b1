"""Labels of photos as labelling tools export them, read into one data set in COCO format.

`read_labels` finds out the format. Each format has a module: `coco`, `yolo`, `labelme`, `cvat`.
"""

from dynamask.data.labels.reader import FORMATS, read_labels
from dynamask.data.labels.tree import Labels

__all__ = ["FORMATS", "Labels", "read_labels"]
