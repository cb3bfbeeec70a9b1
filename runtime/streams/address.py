"""Addresses of sources and sinks, whose passwords are never printed."""

from __future__ import annotations

import glob
import logging
import os
import re
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from runtime.errors import InputError, shortened
from runtime.files import natural_order

FILE, NETWORK, CAMERA, STDIN = "file", "network", "camera", "standard input"
SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "udp", "mqtt", "mqtts")
_SOURCE_SCHEMES = SCHEMES[:-2]
_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^\s'\"<>]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>?]*)\?[^\s'\"<>]*")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def redacted(text: str) -> str:
    """The text without the credentials and the queries of the URLs in it.

    Example:
        >>> redacted("rtsp://user:secret@10.0.0.7/door?token=abc failed")
        'rtsp://***@10.0.0.7/door?*** failed'
    """
    return _QUERY.sub(r"\1?***", _CREDENTIALS.sub(r"\1***@", text))


class Address:
    """A file, a URL, a V4L2 device (`/dev/video0`) or standard input (`-`). Only `reveal()` gives the credentials in it.

    `${NAME}` in a URL is the environment variable NAME, so that no password stands in a command line or a file.

    Args:
        text: as the user wrote it.

    Raises:
        InputError: the URL's scheme is unknown, it has no host, or the environment variable is not set.

    Example:
        >>> address = Address("rtsp://user:secret@10.0.0.7:554/door")
        >>> print(address, address.name, address.kind)
        rtsp://***@10.0.0.7:554/door 10.0.0.7-door network
    """

    def __init__(self, text: str | os.PathLike[str]) -> None:
        self._text = os.fspath(text)
        match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", self._text)
        if match and not Path(self._text).exists():
            # A Path has one slash where the URL had two.
            self._text = re.sub(r":/(?!/)", "://", _expanded(self._text), count=1)
            self.kind = NETWORK
            self._check(match[1].lower())
        elif self._text == "-":
            self.kind = STDIN
        else:
            self.kind = CAMERA if re.match(r"/dev/(video|v4l/)", self._text) else FILE

    def _check(self, scheme: str) -> None:
        if scheme not in SCHEMES:
            raise InputError(f"{scheme}:// addresses are not known; take {', '.join(SCHEMES)}, a file, a folder, /dev/video0 or -.")
        try:
            parts = self._split()
            port = parts.port
        except ValueError:
            raise InputError(f"{self} is no valid address; write {scheme}://host:port/path.") from None
        if not parts.hostname and not (scheme == "udp" and port):
            raise InputError(f"{self} names no host; write {scheme}://host:port/path.")

    def _split(self) -> SplitResult:
        return urlsplit(self._text)

    @property
    def scheme(self) -> str:
        """The URL's scheme in lower case; empty for what is no URL."""
        return self._text.partition(":")[0].lower() if self.kind == NETWORK else ""

    @property
    def live(self) -> bool:
        """Whether frames come at their own pace, and are lost if nobody takes them."""
        return self.kind in (NETWORK, CAMERA)

    @property
    def name(self) -> str:
        """A short name for files, logs and the page: without credentials and query, of letters, digits, dots, dashes and underscores."""
        if self.kind == NETWORK:
            parts = self._split()
            text = f"{parts.hostname or ''}-{parts.path.strip('/')}".strip("-") or str(parts.port)
        else:
            text = "stdin" if self.kind == STDIN else Path(self._text).resolve().stem if self.kind == FILE else Path(self._text).name
        return re.sub(r"[^\w.-]+", "-", text)[:60] or "stream"

    def reveal(self) -> str:
        """The whole address, credentials included: for the library that opens it, and for nothing that is written."""
        return self._text

    def secrets(self) -> set[str]:
        """The password and the values of the query, as written and decoded."""
        if self.kind != NETWORK:
            return set()
        parts = self._split()
        raw = [parts.password or "", *(value for _, value in parse_qsl(parts.query))]
        return {text for value in raw for text in (value, unquote(value)) if text}

    def __str__(self) -> str:
        return redacted(self._text)

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


def source_addresses(text: str) -> list[Address]:
    """The sources that a text names: one, or the files of a pattern (`clips/*.mp4`), in order of their names.

    Raises:
        InputError: there is none.
    """
    address = Address(text)
    if address.kind == NETWORK and address.scheme not in _SOURCE_SCHEMES:
        raise InputError(f"{address} is no source; take {', '.join(_SOURCE_SCHEMES)}, a file, a folder, /dev/video0 or -.")
    if address.kind != FILE or Path(text).exists() or not glob.has_magic(text):
        return [address]
    found = natural_order(Path(path) for path in glob.glob(text, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not found:
        raise InputError(f"{shortened(text)} names no file; check the pattern.")
    return [Address(path) for path in found]


def _expanded(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise InputError(f"{redacted(text)}: the environment variable {match[1]} is not set; set it, or write the address in full.")
        return os.environ[match[1]]

    return _VARIABLE.sub(value, text)


class RedactingFilter(logging.Filter):
    """Removes credentials from log records, those of other libraries too."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record's message; an exception's text is redacted as well."""
        record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return True
