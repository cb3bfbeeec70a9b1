"""Makes standard output and standard error safe to print to, even if they are closed, end early or lack characters."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import Any

_ASCII = {"→": "->", "–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "·": "*", "•": "*", "≤": "<=", "≥": ">=", "λ": "lambda", "µ": "u"}
"""Substitutes for the characters that the program itself prints."""


class Stream(io.RawIOBase):
    """A descriptor on which a write never fails: after the first error, all further output is discarded.

    So a command whose reader has gone (`| head`) still finishes its files. `error` is that first error.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return os.write(self._descriptor, data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


def prepare() -> None:
    """Make standard output and standard error safe to print to, whatever they are; a second call changes nothing.

    - A closed descriptor (`>&-`) becomes the null device, so that no file of ours gets its number.
    - A write that fails ends the printing, not the command: see `Stream`.
    - A character that the encoding lacks is replaced, and bytes of a file's name that are not UTF-8 are shown as `\\xNN`.
    """
    _open_closed_descriptors()
    codecs.register_error("dynamask", _replacement)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        # Tests and notebooks put their own streams there, which stay as they are.
        if stream is None or (stream is getattr(sys, f"__{name}__") and _is_text(stream)):
            setattr(sys, name, _wrap(stream, descriptor))


def failed_output() -> OSError | None:
    """The error that ended standard output, unless its reader has gone, which is the reader's choice."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, Stream) else None
    return None if error is None or error.errno in (errno.EPIPE, errno.ECONNRESET) else error


def _is_text(stream: Any) -> bool:
    return isinstance(stream, io.TextIOWrapper) and hasattr(stream, "buffer")


def _open_closed_descriptors() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system gives the lowest free number.
            os.open(os.devnull, os.O_RDWR)


def _wrap(stream: io.TextIOWrapper | None, descriptor: int) -> io.TextIOWrapper:
    encoding = "utf-8" if stream is None else stream.encoding
    raw = Stream(descriptor)
    if stream is not None:
        stream.flush()
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, "dynamask", line_buffering=descriptor == 2 or raw.isatty(), newline="\n")


def _replacement(error: UnicodeError) -> tuple[str, int]:
    """The handler of characters that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_substitute(character) for character in error.object[error.start : error.end]), error.end


def _substitute(character: str) -> str:
    if character in _ASCII:
        return _ASCII[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte that is not UTF-8.
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode("ascii")
