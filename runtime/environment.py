"""Sets environment variables for libraries: no telemetry, and a name and folders for a user who has none."""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
import tempfile
from pathlib import Path


def prepare() -> None:
    """Set the environment variables that libraries read when they are imported; variables that are set already stay.

    - `ORT_DISABLE_TELEMETRY`: otherwise ONNX Runtime 1.29 and later writes an identifier of the device into the user's home folder, and
      sends events to its maker.
    - `LOGNAME` for a user without an entry in the password file (`docker run --user`): PyTorch asks for a name when it is imported.
    - `HOME` for such a user where it is not set, and folders for the caches of matplotlib and Triton where the home folder cannot be
      written: a folder in the system's folder for temporary files, which only this user can read.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on.
        os.environ["LOGNAME"] = f"user{os.getuid()}"
    try:
        home = Path.home()
    except RuntimeError:
        if (folder := _private_folder()) is not None:
            os.environ["HOME"] = str(folder)
        return
    if not os.access(home, os.W_OK) and (folder := _private_folder()) is not None:
        os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def _private_folder() -> Path | None:
    """A folder for temporary files that belongs to this user alone, the same in every process; None where there is no place for it."""
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"dynamask-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            return folder
        return Path(tempfile.mkdtemp(prefix="dynamask-"))
    return None
