"""The notebook for a first look runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_notebook_is_kept_without_outputs(notebook: nbformat.NotebookNode) -> None:
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_the_notebook_runs(notebook: nbformat.NotebookNode) -> None:
    ran = NotebookClient(notebook.copy(), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    assert any("112 x 112" in printed(cell) for cell in code)
    (sweep,) = (printed(cell) for cell in code if "no budget" in printed(cell))
    means = [float(line.split("mean ")[1].split()[0]) for line in sweep.splitlines()]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[-1]
    assert any("model.safetensors" in str(cell.outputs) for cell in code)
