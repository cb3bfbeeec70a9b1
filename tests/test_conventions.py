"""Conventions of the tests: short names, no imports between test files, shared fixtures in conftest.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
LONGEST_NAME = 80


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported(file: Path) -> set[str]:
    """The names of modules that a file imports, and of the names that it imports from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_names_of_tests_are_short() -> None:
    tests = [(file.name, node.name) for file in FILES for node in functions(file) if node.name.startswith("test_")]
    assert len(tests) > 700
    assert [name for name in tests if len(name[1]) > LONGEST_NAME] == []


def test_no_file_imports_a_test_file_or_a_conftest() -> None:
    modules = {file.stem for file in FILES if file.stem.startswith("test_") or file.stem == "conftest"}
    found = [(file.name, name) for file in FILES for name in imported(file) if modules & set(name.split("."))]
    assert found == []


def test_a_fixture_has_one_definition_for_all_files_above_it() -> None:
    """No test file redefines a fixture of a conftest that it would otherwise get."""
    fixtures = {
        file: {node.name for node in functions(file) if any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)}
        for file in FILES
    }
    shared = {file.parent: names for file, names in fixtures.items() if file.name == "conftest.py"}
    assert shared[TESTS]
    redefined = [
        (file.name, name)
        for file, names in fixtures.items()
        if file.name != "conftest.py"
        for folder, given in shared.items()
        if folder in file.parents
        for name in sorted(names & given)
    ]
    assert redefined == []
