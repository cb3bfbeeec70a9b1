"""Print which package imports which, read off the code, as a Mermaid graph: the drawing in docs/architecture.md.

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
    """The graph as a fenced Mermaid block, an arrow for each edge."""
    return "\n".join(["```mermaid", "graph TD", *(f"    {importing} --> {imported}" for importing, imported in edges()), "```"])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(drawing())
