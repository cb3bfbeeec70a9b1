"""Standard output and standard error that may be closed, end early or know few characters."""

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
    """A descriptor that writes never fail on: after the first error, the rest is thrown away.

    A command whose reader has gone (`| head`) thus still finishes its files. `error` says why writing ended.
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
    - A character that the encoding lacks is replaced, and bytes of a file's name that are no UTF-8 are shown as `\\xNN`.
    """
    _open_closed_descriptors()
    codecs.register_error("dynamask", _replacement)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        # Tests and notebooks put streams of their own there, which are left alone.
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
    if 0xDC80 <= code <= 0xDCFF:  # How Python stands for a byte that is no UTF-8.
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode("ascii")
