"""Fuzzing: strange files of each kind that DynaMask reads, made by Hypothesis.

`python -m tests.fuzzing` (`make fuzz`) runs it for a given time, `test_fuzzing.py` for some seconds. Each kind is a module with two
functions:

- `inputs()`, a strategy of `Files`;
- `check(folder)`, which reads the files from a folder with the product's own functions. It returns whether they were accepted. Any
  exception that leaves it is a finding: those of the product (`InputError`, `DynaMaskError`) are caught in it.
"""

from __future__ import annotations

from pathlib import Path

KINDS = ("coco", "bundle", "image", "video", "config", "checkpoint")
"""Names of the modules."""


class Files(dict[str, bytes]):
    """The files of one input: path inside a folder -> content."""

    def __repr__(self) -> str:
        return f"Files({', '.join(f'{name}: {len(content)} bytes' for name, content in self.items())})"


def write(files: Files, folder: Path) -> None:
    """Write the files of an input into a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
