"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from runtime.errors import DynaMaskError, InputError

_UNFIT = {
    errno.EACCES: "no permission",
    errno.EEXIST: "a part of its path is a file",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ENOENT: "its folder cannot be made",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
}
"""What the system says of a path that was chosen wrongly, in contrast to a disk that is full or broken."""


@contextlib.contextmanager
def atomic_path(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `destination` to write to; it takes the destination's name only if the block ends well.

    The temporary name keeps the destination's suffix, so that libraries that choose a format by suffix still do.
    Whatever stood at `destination` before stays untouched until then, and when the block fails.

    Raises:
        InputError: nothing can be written at `destination`.
        DynaMaskError: the disk is full.
    """
    destination = Path(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{destination.stem}.", suffix=destination.suffix, dir=destination.parent)
        os.close(handle)
    except OSError as error:
        raise unwritable(destination, error) from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(destination)
    except OSError as error:
        raise unwritable(destination, error) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> DynaMaskError:
    """The sentence for a file that could not be written: an `InputError` where another path would do, not for a full disk."""
    if error.errno in _UNFIT:
        return InputError(f"{path} could not be written ({_UNFIT[error.errno]}): nothing was replaced; choose another place.")
    return DynaMaskError(
        f"{path} could not be written ({error.strerror or error}): nothing was replaced; free some space or choose another folder."
    )


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written, before long work that would end in it; nothing is made.

    Raises:
        InputError: names what stands in the way.
    """
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        fault = "no permission to write" if nearest.is_dir() else "it is a file"
        raise InputError(f"{path} cannot be made or written because of {nearest} ({fault}): choose another folder.")


def check_apart(written: Iterable[Path], read: Iterable[Path] = ()) -> None:
    """Refuse to write what is read, or two things to one place.

    Raises:
        InputError: names the path.
    """
    sources, places = {path.resolve() for path in read}, set()
    for path in written:
        place = path.resolve()
        if place in sources:
            raise InputError(f"{path} is both read and written; give another place to write to.")
        if place in places:
            raise InputError(f"{path} is given for two outputs; give each its own name.")
        places.add(place)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def user_cache(name: str) -> Path:
    """The folder, perhaps not made yet, for what only saves time and may be deleted: `~/.cache/dynamask/<name>` (`XDG_CACHE_HOME`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamask" / name


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
