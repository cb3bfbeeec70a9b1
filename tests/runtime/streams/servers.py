"""Starts the servers that the tests of streams need, and waits for conditions."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest

SYSTEM_PYTHON = "/usr/bin/python3"
HERE = Path(__file__).parent
_CHECK = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"


@lru_cache
def has_rtsp_server() -> bool:
    """Whether the system's Python has the bindings of GStreamer's RTSP server."""
    try:
        return subprocess.run([SYSTEM_PYTHON, "-c", _CHECK], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def rtsp_server(*arguments: str, port: int | None = None) -> Iterator[int]:
    """The port of a running `rtsp_server.py`; it is killed afterwards."""
    if not has_rtsp_server():
        pytest.skip("GStreamer's RTSP server is not installed (Debian: gir1.2-gst-rtsp-server-1.0, gstreamer1.0-rtsp and plugins)")
    port = port or free_port()
    command = [SYSTEM_PYTHON, str(HERE / "rtsp_server.py"), str(port), *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n"
        yield port
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until a condition holds; fails after a time that no healthy run needs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)
