"""The lower bounds of pyproject.toml are the versions that `make test-lowest` installs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = {"tensorrt-cu13"}
"""The package of the extra `tensorrt`."""


def requirements(project: dict[str, Any]) -> list[Requirement]:
    """The direct dependencies of the project and of its extras."""
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]


def lowest_versions(python: str) -> dict[str, str]:
    """Version by package name, as pip reads constraints-lowest.txt on a Python."""
    versions = {}
    for line in (ROOT / "constraints-lowest.txt").read_text().splitlines():
        if not line.startswith("#"):
            pinned = Requirement(line)
            if pinned.marker is None or pinned.marker.evaluate({"python_version": python}):
                assert pinned.name not in versions, line
                versions[canonicalize_name(pinned.name)] = str(pinned.specifier).removeprefix("==")
    return versions


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_lower_bound_is_installed(python: str) -> None:
    versions = lowest_versions(python)
    for requirement in requirements(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]):
        name = canonicalize_name(requirement.name)
        if name not in NOT_INSTALLED:
            (bound,) = requirement.specifier
            # A release may have a fourth number: 1.7.1 stands for 1.7.1.116.
            release = f"=={bound.version}.*" if name == "tensorrt-rtx-cu13" else f"=={bound.version}"
            assert bound.operator == ">=" and SpecifierSet(release).contains(versions[name]), requirement
