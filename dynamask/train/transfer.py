"""Fine-tuning on other classes: the rows of a checkpoint's layers that depend on its classes, put in the order of a model's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ROWS_OF_CLASSES = {
    r"roi_heads\.box_predictor\.cls_score\.(weight|bias)": (1, 1),
    r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)": (4, 4),
    r"mask_branch\.heads\.masks\.(\d+\.)?(weight|bias)": (0, 1),
}
"""Names of the tensors -> their rows for the background, which come first, and for each class."""


def with_rows_of_classes(
    tensors: Mapping[str, Tensor], theirs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """A model's tensors with the rows of other classes.

    A class takes the rows of the class of the same name, whatever the case of its letters. Any other class takes the mean over all
    classes: its boxes and masks are then those of an object in general, and it is as likely as any other class until it is trained.

    Args:
        tensors: of the model, by name.
        theirs: the classes of `tensors`, in the order of their labels; each has a `name`.
        ours: the classes wanted, in the order of their labels.

    Returns:
        All tensors. Those that do not depend on the classes are the same objects; so are mask heads that all classes share.
    """
    positions = {_key(entry): position for position, entry in enumerate(theirs)}
    chosen = [positions.get(_key(entry)) for entry in ours]  # position of the same class, or None
    changed = dict(tensors)
    for name, tensor in tensors.items():
        layout = next((layout for pattern, layout in _ROWS_OF_CLASSES.items() if re.fullmatch(pattern, name)), None)
        if layout is not None and len(tensor) == layout[0] + layout[1] * len(theirs):
            background, rows = tensor[: layout[0]], tensor[layout[0] :].unflatten(0, (len(theirs), layout[1]))
            changed[name] = torch.cat([background, *(rows.mean(dim=0) if i is None else rows[i] for i in chosen)])
    return changed


def _key(entry: Mapping[str, Any]) -> str:
    return str(entry["name"]).strip().casefold()
