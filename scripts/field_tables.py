"""Writes the tables of fields in docs/training.md from `dynamask/config.py`: `python -m scripts.field_tables`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dynamask.config import Config, DataConfig, ModelConfig, TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
SECTIONS: dict[str, type[BaseModel]] = {"train": TrainConfig, "data": DataConfig, "model": ModelConfig, "": Config}


def with_tables(page: str) -> str:
    """The page, in which the part after each mark `<!-- fields of SECTION -->` is the table of that section."""
    for section, fields in SECTIONS.items():
        mark = f"<!-- fields of {section or 'the top level'} -->\n\n"
        before, found, after = page.partition(mark)
        if not found:
            raise ValueError(f"{PAGE} has no line {mark.strip()}")
        page = before + mark + table(section, fields) + re.sub(r"\A(\|.*\n)*", "", after)
    return page


def table(section: str, fields: type[BaseModel]) -> str:
    """One row for each field: name, default as JSON, meaning."""
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for name, field in fields.model_fields.items():
        if field.default is not PydanticUndefined:
            default = json.dumps(field.default, default=list)
            meaning = " ".join((field.description or "").split())
            if get_origin(field.annotation) is Literal:
                meaning += " One of " + ", ".join(f"`{value}`" for value in get_args(field.annotation)) + "."
            rows.append(f"| `{f'{section}.' if section else ''}{name}` | `{default}` | {meaning} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
