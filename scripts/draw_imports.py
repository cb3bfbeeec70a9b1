"""Print which package imports which, read off the code: the drawing in docs/architecture.md.

python scripts/draw_imports.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]


def edges() -> list[tuple[str, str]]:
    """Pairs (importing package, imported package) of this repository, sorted; imports inside functions count."""
    packages = sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))
    graph = grimp.build_graph(packages[0], *packages[1:], cache_dir=None)
    imports = {(module, name) for module in graph.modules for name in graph.find_modules_directly_imported_by(module)}
    between = {(module.partition(".")[0], name.partition(".")[0]) for module, name in imports}
    return sorted(pair for pair in between if pair[0] != pair[1])


def drawing() -> str:
    """One line for each package, with arrows to the packages that it imports; no line imports a package of a line above.

    Raises:
        ValueError: packages import each other in a circle.
    """
    imported: dict[str, set[str]] = {name: set() for edge in edges() for name in edge}
    for importing, name in edges():
        imported[importing].add(name)
    order: list[str] = []
    while len(order) < len(imported):
        ready = sorted(name for name in imported.keys() - set(order) if imported[name] <= set(order))
        if not ready:
            raise ValueError(f"{', '.join(sorted(imported.keys() - set(order)))} import each other in a circle.")
        order += reversed(ready)
    width = max(map(len, order))
    lines = []
    for name in reversed(order):
        targets = [target for target in reversed(order) if target in imported[name]]
        arrow = f" {'─' * (width - len(name))}──▶ {', '.join(targets)}" if targets else ""
        lines.append(f"    {name}{arrow}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(drawing())
