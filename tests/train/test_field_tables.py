"""The tables of fields in docs/training.md say what `dynamask/config.py` says."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from dynamask.config import Config
from scripts.field_tables import PAGE, SECTIONS, table, with_tables


def test_the_page_has_the_tables_of_the_configuration() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python -m scripts.field_tables"


def test_every_field_stands_in_a_table_and_has_a_meaning() -> None:
    rows = [line.split(" | ") for section, fields in SECTIONS.items() for line in table(section, fields).splitlines()[2:]]
    tree = Config().model_dump()
    names = {f"{section}.{name}" for section in ("train", "data", "model") for name in tree[section]} | {"weights", "weights_part"}
    assert {row[0].strip("| `") for row in rows} == names
    assert all(len(row) == 3 and len(row[2]) > 10 for row in rows)


def test_a_page_without_a_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="has no line"):
        with_tables("# Training")


def test_a_row_has_the_default_and_the_docstring() -> None:
    class Section(BaseModel, use_attribute_docstrings=True):
        side_px: int = 3
        """Of a box,
        pixels."""

    assert table("model", Section).splitlines()[2] == "| `model.side_px` | `3` | Of a box, pixels. |"
