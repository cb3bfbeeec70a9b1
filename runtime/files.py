"""Writes files: whole or not at all where a file can be replaced, straight into devices, pipes and open descriptors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime.environment import prepare
from runtime.errors import DynaMaskError, InputError, shortened

_BAD_PLACE = {
    errno.EBADF: "no such descriptor is open for writing",
    errno.EACCES: "no permission",
    errno.EEXIST: "a part of its path is a file",
    errno.EISDIR: "it is a folder",
    errno.ELOOP: "its links lead in a circle",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ENODEV: "there is no such device",
    errno.ENOENT: "its folder does not exist",
    errno.ENOTDIR: "a part of its path is a file",
    errno.ENXIO: "there is no such device",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
}
"""Errors that another path would avoid, and their words in a sentence."""
_WAY_OUT = {
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "choose another disk or raise the limit (ulimit -f)",
    errno.EIO: "check the disk or choose another one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close some programs",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EPIPE: "its reader has gone: keep it running to the end",
}
"""The way out for errors of writing itself."""
_NAME_CHARACTERS = 40
"""Characters of the destination's name kept in a partial file's name: at most 4 bytes each, so that no name exceeds 255 bytes."""
_COPY_BYTES = 1 << 20


class Output:
    """One file that is being written: `path` is where to write, `commit()` puts the content at `destination`, `discard()` removes it.

    - A regular file, new or existing: `path` is a partial file beside it, whose name no other run has. `commit()` renames it, so readers
      see the old file or the whole new one. Links are followed: the link stays, and the file that it names is replaced. Mode and, where the
      system allows it, owner of an existing file are kept. An existing file in a folder that takes no new file, or that is a mount point
      itself, is overwritten in place at the end.
    - A device, FIFO or socket, or a descriptor of this process (`/dev/stdout`, `/dev/fd/N`, process substitution): nothing is replaced.
      `open()` writes straight into it; what is written to `path`, a file in the system's folder for temporary files, is copied at the end.

    Args:
        destination: its folder is made if it does not exist.

    Raises:
        InputError: nothing can be written at `destination`.
        DynaMaskError: the disk is full or broken.

    Example:
        >>> output = Output("detections.csv")
        >>> output.path.write_text("class,score")
        >>> output.commit()
    """

    def __init__(self, destination: str | os.PathLike[str]) -> None:
        self.destination = Path(destination)
        self._partial: Path | None = None
        self._rename = False
        try:
            self._existing = _status(self.destination)
            self.straight = is_special(self.destination)
            """Whether `destination` is a device, pipe, socket or descriptor, which nothing replaces."""
            if not self.straight:
                self._prepare()
        except OSError as error:
            raise unwritable(self.destination, error) from error

    def _prepare(self) -> None:
        self._target = Path(os.path.realpath(self.destination))
        if self._existing is None:
            self._target.parent.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISDIR(self._existing.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif not os.access(self._target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            self._partial = _create_partial(self._target.parent, self._target.name)
            self._rename = True
        except OSError as error:
            if self._existing is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise

    @property
    def path(self) -> Path:
        """Where to write meanwhile, with the destination's suffix: libraries choose a format by it."""
        if self._partial is None:
            self._partial = _create_partial(Path(tempfile.gettempdir()), self.destination.name)
        return self._partial

    def open(self) -> BinaryIO:
        """An unbuffered binary file to write to: the device or pipe itself if `straight`, else `path`.

        Raises:
            InputError, DynaMaskError: it cannot be opened.
        """
        try:
            return _open_special(self.destination) if self.straight else self.path.open("wb", buffering=0)
        except OSError as error:
            raise unwritable(self.destination, error) from error

    def commit(self) -> None:
        """Put what was written to `path` at `destination`.

        Raises:
            InputError, DynaMaskError: it cannot be put there; `path` is kept.
        """
        if self._partial is None:
            return
        try:
            if self._rename:
                self._replace()
            else:
                self._copy()
        except OSError as error:
            raise unwritable(self.destination, error) from error
        self.discard()

    def _replace(self) -> None:
        assert self._partial is not None
        if self._existing is not None:
            with contextlib.suppress(PermissionError):
                os.chown(self._partial, self._existing.st_uid, self._existing.st_gid)
            self._partial.chmod(stat.S_IMODE(self._existing.st_mode))
        try:
            self._partial.replace(self._target)
        except OSError as error:
            # A file that is mounted alone, as containers do, cannot be replaced.
            if error.errno != errno.EBUSY:
                raise
            self._copy()

    def _copy(self) -> None:
        assert self._partial is not None
        with self._partial.open("rb") as source, _open_special(self.destination) as destination:
            while block := memoryview(source.read(_COPY_BYTES)):
                while block:
                    block = block[destination.write(block) :]

    def discard(self) -> None:
        """Remove what was written to `path`, if it is still there."""
        if self._partial is not None:
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)

    def keep(self) -> Path | None:
        """After a failure: the partial file, for the user to look at; an empty one, or one that was for a pipe, is removed."""
        if self._partial is None or not self._partial.exists():
            return None
        if self.straight or self._partial.stat().st_size == 0:
            self.discard()
            return None
        return self._partial


@contextlib.contextmanager
def atomic_path(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to; its content takes the destination's place only if the block ends well (see `Output`).

    Whatever stood at `destination` before stays untouched until then, and when the block fails.

    Raises:
        InputError: nothing can be written at `destination`.
        DynaMaskError: the disk is full or broken.
    """
    output = Output(destination)
    try:
        yield output.path
        output.commit()
    except OSError as error:
        raise unwritable(output.destination, error) from error
    finally:
        output.discard()


def unwritable(path: Path, error: OSError) -> DynaMaskError:
    """The error for a file that could not be written: an `InputError` where another path would do, not for a full disk."""
    number = error.errno or 0
    if number in _BAD_PLACE:
        # /proc has folders that take no new file.
        cause = "its folder takes no new file" if number == errno.ENOENT and path.parent.is_dir() else _BAD_PLACE[number]
        return InputError(f"{path} could not be written ({cause}): nothing was replaced; choose another place.")
    cause, way_out = failure(error)
    return DynaMaskError(f"{path} could not be written ({cause}): nothing was replaced; {way_out}.")


def failure(error: OSError, otherwise: str = "choose another place") -> tuple[str, str]:
    """Cause and way out of a failed read or write, as parts of a sentence; `otherwise` is the way out where the cause suggests none."""
    number = error.errno or 0
    return _BAD_PLACE.get(number, error.strerror or str(error)), _WAY_OUT.get(number, otherwise)


def input_path(path: str | os.PathLike[str]) -> Path:
    """The path of an input, of which `exists()` and `is_file()` can be asked; there may be nothing.

    Raises:
        InputError: the system cannot look the path up: a name is too long, links lead in a circle, or a folder may not be entered.
    """
    path = Path(path)
    try:
        _status(path)
    except OSError as error:
        cause, way_out = failure(error, "give another path")
        shown = shortened(str(path)) if error.errno == errno.ENAMETOOLONG else path
        raise InputError(f"{shown} cannot be read ({cause}): {way_out}.") from error
    except ValueError:  # a null character, with which nothing exists
        pass
    return path


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a device, FIFO or socket, or names an open descriptor of this process: written into, never replaced."""
    try:
        status = _status(Path(path))
        if _descriptor(Path(path)) is not None:
            return True
    except OSError:  # Too long a name, links in a circle: nothing is there.
        return False
    return status is not None and not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written, before any work is done; nothing is created.

    Raises:
        InputError: names what stands in the way.
    """
    try:
        nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    except OSError as error:
        raise unwritable(path, error) from error
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        fault = "no permission to write" if nearest.is_dir() else "it is a file"
        raise InputError(f"{path} cannot be made or written because of {nearest} ({fault}): choose another folder.")


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done; nothing is created.

    Raises:
        InputError: it is a folder, its folder cannot be made or written, its name is too long, it may not be overwritten, or it names a
            descriptor that is not open.
    """
    try:
        if is_special(path):
            if (number := _descriptor(path)) is not None:
                os.fstat(number)
            return
        status = _status(path)
    except OSError as error:
        raise unwritable(path, error) from error
    if status is None:
        check_folder(Path(os.path.realpath(path)).parent)
    elif stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a folder, and a file is to be written there: give the file's name too.")
    elif not os.access(path, os.W_OK):
        raise unwritable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def check_apart(written: Iterable[Path | None], read: Iterable[Path | None] = (), bundle: Path | None = None) -> None:
    """Refuse an output that is also an input or lies in the bundle, and two outputs at one place. Paths that are None are left out.

    Several outputs may share a device, pipe or descriptor.

    Raises:
        InputError: names the path.
    """
    inside = None if bundle is None or not bundle.is_dir() else os.path.realpath(bundle) + os.sep
    sources, places = {os.path.realpath(path) for path in read if path is not None}, set()
    for path in filter(None, written):
        place = os.path.realpath(path)
        if is_special(path):
            continue
        if inside is not None and place.startswith(inside):
            raise InputError(f"{path} is in the bundle {bundle}, whose files must stay as they are; give another place to write to.")
        if place in sources:
            raise InputError(f"{path} is both read and written; give another place to write to.")
        if place in places:
            raise InputError(f"{path} is given for two outputs; give each its own name.")
        places.add(place)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Paths in the order people count in: `img2` before `img10`, whatever the case of their letters.

    Example:
        >>> natural_order([Path("10.jpg"), Path("9.jpg")])
        [PosixPath('9.jpg'), PosixPath('10.jpg')]
    """
    return sorted(paths, key=lambda path: ([_natural_key(part) for part in path.parts], path))


def _natural_key(name: str) -> list[str | int]:
    # Text and numbers alternate, text first: two keys never compare a number with text.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name.casefold()))]


def user_cache(name: str) -> Path:
    """The folder for files that only save time and may be deleted: `~/.cache/dynamask/<name>` (`XDG_CACHE_HOME`); it may not exist yet.

    A user without a home folder has it among the temporary files (`runtime.environment`).
    """
    prepare()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamask" / name


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _status(path: Path) -> os.stat_result | None:
    """The status of the file that a path leads to, links followed; None if there is none."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _create_partial(folder: Path, name: str) -> Path:
    """Create an empty file with the mode of new files. Its name holds the destination's, and no other file has it."""
    suffix = Path(name).suffix if len(Path(name).suffix) <= 10 else ""
    stem = name.removesuffix(suffix)[:_NAME_CHARACTERS]
    while True:
        path = folder / f"{stem}.{secrets.token_hex(4)}.partial{suffix}"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
            return path


def _descriptor(path: Path) -> int | None:
    """N for `/dev/fd/N`, `/proc/self/fd/N` and links to them (`/dev/stdout`), else None."""
    folders = ("/dev/fd", f"/proc/{os.getpid()}/fd")
    for _ in range(40):
        folder = os.path.realpath(path.parent)
        if folder in folders and re.fullmatch(r"[0-9]+", path.name):
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, path.readlink())
    return None


def _open_special(path: Path) -> BinaryIO:
    """Open a device, pipe or descriptor for writing. A file is written from its start, a descriptor from its position."""
    number = _descriptor(path)
    if number is not None:
        # Text that was printed comes before, not amid it.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        number = os.dup(number)
    else:
        number = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOCTTY | os.O_CLOEXEC)
    return os.fdopen(number, "wb", buffering=0)
