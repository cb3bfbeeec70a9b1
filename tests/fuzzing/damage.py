"""Damage to the bytes of sound files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hypothesis import strategies as st

_EXTREMES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
"""Values of length and size fields at which arithmetic goes wrong."""
_CHANGES = ("bit", "byte", "number", "number", "number", "overwrite", "insert", "remove", "repeat", "move", "cut")


@st.composite
def damaged(draw: st.DrawFn, content: bytes, headers: Sequence[range] = (), most: int = 4) -> bytes:
    """The content after one to `most` changes, most of them in the `headers`: the ranges that hold sizes, types and tables."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        if data:
            _change(draw, data, headers)
    return bytes(data)


def _place(draw: st.DrawFn, size: int, headers: Sequence[range]) -> int:
    where = draw(st.integers(0, 5))
    if where > 1 and headers:
        header = draw(st.sampled_from(headers))
        return min(draw(st.integers(header.start, max(header.start, header.stop - 1))), size - 1)
    return draw(st.integers(0, min(127, size - 1) if where == 1 else size - 1))


def _change(draw: st.DrawFn, data: bytearray, headers: Sequence[range]) -> None:
    at = _place(draw, len(data), headers)
    change = draw(st.sampled_from(_CHANGES))
    if change == "bit":
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif change == "byte":
        data[at] = draw(st.integers(0, 255))
    elif change == "number":
        _change_number(draw, data, at)
    elif change == "overwrite":
        written = draw(st.binary(min_size=1, max_size=16))
        data[at : at + len(written)] = written
    elif change == "insert":
        data[at:at] = draw(st.binary(min_size=1, max_size=32)) * draw(st.sampled_from([1, 1, 1, 200]))
    elif change == "cut":
        del data[at:]
    else:
        end = at + draw(st.sampled_from([1, 2, 4, 8, 12, 64, 188, 1024]))
        part = bytes(data[at:end])
        if change != "repeat":
            del data[at:end]
        if change != "remove":
            target = _place(draw, len(data), headers) if data else 0
            data[target:target] = part


def _change_number(draw: st.DrawFn, data: bytearray, at: int) -> None:
    """Replace a number of 1 to 8 bytes by an extreme one, or by one a little larger or smaller."""
    size = draw(st.sampled_from([1, 2, 2, 4, 4, 8]))
    order: Literal["big", "little"] = draw(st.sampled_from(["big", "little"]))
    before = int.from_bytes(data[at : at + size], order)
    value = draw(st.sampled_from(_EXTREMES) | st.integers(-4, 4).map(lambda step: before + step))
    data[at : at + size] = (value % 256**size).to_bytes(size, order)
