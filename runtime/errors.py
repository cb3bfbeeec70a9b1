"""The exceptions of this package. Each message is one sentence that names the file, the value and the way out."""

from __future__ import annotations

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended: 128 + SIGINT."""


def shortened(text: str, most: int = 80) -> str:
    """The text for a message: at most so many characters, on one line; characters that cannot be printed are escaped."""
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON and YAML may hold halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class DynaMaskError(Exception):
    """A failure that the caller could not prevent, such as a full disk; the command line exits with status 1.

    The base class of all errors that this package raises: `except dynamask.DynaMaskError` catches `InputError` too.

    Example:
        >>> import dynamask
        >>> try:
        ...     dynamask.read_image(folder / "missing.jpg")
        ... except dynamask.DynaMaskError as error:
        ...     print(type(error).__name__, error.exit_status)
        InputError 2
    """

    exit_status = 1


class InputError(DynaMaskError):
    """A wrong call or bad input (a file, a value, an option); the command line exits with status 2.

    Example:
        >>> import dynamask
        >>> try:
        ...     dynamask.load(folder / "nothing.bundle")
        ... except dynamask.InputError as error:
        ...     print(error)
        /...nothing.bundle is not a folder; give a bundle, as dynamask export writes it, or the name of a model: everyday, lite0-shapes.
    """

    exit_status = 2


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
