"""Values of any JSON type that do not belong where they stand."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

Strategy = st.SearchStrategy[Any]

ODD_NUMBERS = (0, -1, 1.5, 2**31, 2**53 + 1, 2**64, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf"))
ODD_TEXTS = (
    "",
    " ",
    "1",
    " 1 ",
    "1.0",
    "-0",
    "٣",
    "null",
    "../x.jpg",
    "/x.jpg",
    "C:\\x.jpg",
    "a\0b",
    "\ud800",
    "\udcff",
    "ä",
    "x" * 300,
    "x/" * 3000,
)
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    *ODD_NUMBERS,
    *ODD_TEXTS,
    [],
    {},
    [[]],
    [None],
    [1],
    ["a", 1],
    {"": None},
    {"id": 1},
    [[[[1.0]]]],
    {"counts": [], "size": []},
)

odd_numbers = st.sampled_from(ODD_NUMBERS)
odd_values = st.one_of(st.sampled_from(ODD_VALUES), st.floats(), st.integers(), st.text(max_size=4))
"""Values of any JSON type, where another one belongs."""


@st.composite
def mostly(draw: st.DrawFn, sound: Strategy, odd: Strategy = odd_values) -> Any:
    """The sound value in eleven of twelve draws, otherwise an odd one. (`one_of` takes equal strategies for one.)"""
    return draw(odd if draw(st.integers(0, 11)) == 7 else sound)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in a tree with each of its keys or indices."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in keys for place in ((tree, key), *_places(tree[key]))]


@st.composite
def changed_trees(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one to three places changed: another value, no value, a value of another place, a new field, or deeply nested."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(tree)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        change = draw(st.integers(0, 11))
        if change < 6:
            # A copy: later changes may be made inside of it.
            container[key] = copy.deepcopy(draw(odd_values))
        elif change < 8:
            del container[key]
        elif change < 10:
            other, name = draw(st.sampled_from(places))
            # A copy: an earlier change may have removed the place itself.
            container[key] = copy.deepcopy(other[name]) if name in (other if isinstance(other, dict) else range(len(other))) else None
        elif change == 10 and isinstance(container, dict):
            container[draw(st.sampled_from([*ODD_TEXTS, "schema_version", "engines", "files"]))] = copy.deepcopy(draw(odd_values))
        else:
            for _ in range(draw(st.sampled_from([2, 10, 40]))):
                container[key] = [container[key]]
    return tree
