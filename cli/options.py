"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def check_file(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written, before the work whose result it is for.

    Raises:
        InputError: it is a folder, or its folder cannot be made or written.
    """
    from runtime.errors import InputError
    from runtime.files import check_folder

    if path is not None:
        if path.is_dir():
            raise InputError(f"{path} is a folder, and a file is to be written there: give the file's name too.")
        check_folder(path.parent)
    return path


Json = Annotated[Optional[Path], typer.Option(metavar="FILE", help="Write the result here.", callback=check_file)]  # noqa: UP045
"""`--json`"""
