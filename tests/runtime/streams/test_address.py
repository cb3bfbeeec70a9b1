from __future__ import annotations

import logging
from pathlib import Path

import pytest

from runtime.errors import InputError
from runtime.streams.address import Address, RedactingFilter, redacted, source_addresses

URL = "rtsp://user:s3cr%40t@10.0.0.7:554/door?key=abcd"


@pytest.mark.parametrize("show", [str, repr, "{}".format, lambda address: address.name, lambda address: f"{[address]} {vars}"])
def test_no_way_of_printing_an_address_shows_its_secrets(show) -> None:  # type: ignore[no-untyped-def]
    address = Address(URL)
    assert not any(secret in show(address) for secret in ("s3cr", "abcd", "user"))
    assert address.reveal() == URL
    assert address.secrets() == {"s3cr%40t", "s3cr@t", "abcd"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Server returned 401: 'rtsp://a:b@h/x'", "Server returned 401: 'rtsp://***@h/x'"),
        ("rtsp://a:p@ss/w@h:1/x y", "rtsp://***@h:1/x y"),
        ("rtsp:/a:b@h/x", "rtsp:/***@h/x"),
        ("https://h/live?token=1&b=2 gone", "https://h/live?*** gone"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_credentials_and_queries_are_cut_out_of_text(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_log_records_of_any_library_are_redacted(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("some.library")
    logger.addFilter(RedactingFilter())
    try:
        raise OSError(f"cannot open {URL}")
    except OSError:
        logger.exception("opening %s failed", URL)
    assert "10.0.0.7" in caplog.text
    assert "s3cr" not in logging.Formatter().format(caplog.records[0])


def test_an_environment_variable_stands_for_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOOR", "s3cret")
    assert Address("rtsp://u:${DOOR}@h/x").reveal() == "rtsp://u:s3cret@h/x"
    monkeypatch.delenv("DOOR")
    with pytest.raises(InputError, match=r"rtsp://\*\*\*@h/x: the environment variable DOOR is not set"):
        Address("rtsp://u:${DOOR}@h/x")


@pytest.mark.parametrize(
    ("text", "kind", "name", "live"),
    [
        ("rtsp://h:554/a/b", "network", "h-a-b", True),
        ("udp://@:1234", "network", "1234", True),
        ("/dev/video0", "camera", "video0", True),
        ("-", "standard input", "stdin", False),
        ("clip.mp4", "file", "clip", False),
    ],
)
def test_addresses_know_their_kind(text: str, kind: str, name: str, live: bool) -> None:
    address = Address(text)
    assert (address.kind, address.name, address.live) == (kind, name, live)


@pytest.mark.parametrize(
    ("text", "said"), [("gopher://h/x", "gopher://"), ("rtsp:///x", "names no host"), ("rtsp://u:pw@h:port/x", "is no valid address")]
)
def test_a_wrong_address_is_refused_without_its_password(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Address(text)
    assert "pw" not in str(caught.value)


def test_a_pattern_names_files_in_the_order_people_count_in(tmp_path: Path) -> None:
    for name in ("b10.mp4", "b9.mp4", "c.txt"):
        (tmp_path / name).touch()
    assert [address.name for address in source_addresses(f"{tmp_path}/*.mp4")] == ["b9", "b10"]
    with pytest.raises(InputError, match="names no file"):
        source_addresses(f"{tmp_path}/*.avi")
    with pytest.raises(InputError, match="is no source"):
        source_addresses("mqtt://h/x")
