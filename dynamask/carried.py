"""The checkpoints that come with the package."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import InputError

CHECKPOINTS = {"everyday": "everyday.safetensors", "lite0-shapes": "lite0-shapes.safetensors"}
"""Name -> file in `dynamask/assets`."""


def carried_checkpoint(name: str) -> Path:
    """The file of a checkpoint that comes with the package.

    Args:
        name: `everyday`, which finds everyday things in photos, or `lite0-shapes`, which finds drawn shapes.

    Raises:
        InputError: the package lacks it.
    """
    path = Path(__file__).parent / "assets" / CHECKPOINTS[name]
    if not path.is_file():
        raise InputError(f"{path} is missing, so this installation has no model {name}: install the package again, or name a checkpoint.")
    return path
