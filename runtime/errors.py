"""The project's exceptions: every message is one sentence that names the file, the value and the way out."""

from __future__ import annotations

INTERRUPTED = 130
"""The exit status of what Ctrl-C ended: 128 + SIGINT."""


class DynaMaskError(Exception):
    """Something failed that the caller could not have prevented; the command line exits with status 1."""

    exit_status = 1


class InputError(DynaMaskError):
    """A wrong call or bad input (file, value, option); the command line exits with status 2."""

    exit_status = 2
