"""The direction of imports: import-linter holds it, and docs/architecture.md draws it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["benchmarks", "cli", "dynamask", "export", "runtime", "trt_plugins"]
LINT = "import sys; from importlinter.cli import lint_imports_command; sys.argv[1:] = ['--no-cache']; lint_imports_command()"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The packages, empty, with this repository's contracts."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("cli", "import export"),
        ("export", "import dynamask, trt_plugins"),
        ("dynamask", "import runtime"),
        ("trt_plugins", "import runtime, torch"),
        ("benchmarks", "import cli, export, dynamask, trt_plugins, runtime"),
    ],
)
def test_the_linter_accepts_imports_to_the_right(tree: Path, package: str, line: str) -> None:
    (tree / package / "module.py").write_text(f"{line}\n")
    linted = lint(tree)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("runtime", "import trt_plugins"),
        ("runtime", "import dynamask"),
        ("runtime", "import torch"),
        ("runtime", "from cuda.bindings import driver"),
        ("trt_plugins", "import dynamask"),
        ("dynamask", "import trt_plugins"),
        ("dynamask", "import export"),
        ("export", "import cli"),
        ("cli", "import benchmarks"),
    ],
)
def test_the_linter_refuses_other_imports_inside_functions(tree: Path, package: str, line: str) -> None:
    (tree / package / "module.py").write_text(f"def function():\n    {line}\n")
    linted = lint(tree)
    assert linted.returncode == 1, linted.stdout
    assert f"{package}.module -> {line.split()[1].partition('.')[0]}" in linted.stdout


def test_the_drawing_in_the_docs_is_read_off_the_code() -> None:
    command = [sys.executable, ROOT / "scripts" / "draw_imports.py"]
    drawing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "    cli ──────────▶ export, dynamask, runtime\n" in drawing
    assert drawing in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
