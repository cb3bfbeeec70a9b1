"""The runner counts different inputs and ends at their number; each finding is counted and saved."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzzing import Files, worker
from tests.fuzzing.campaign import Campaign
from tests.fuzzing.config import _dump


class Messages(list):
    send = list.append


@pytest.fixture
def kind(monkeypatch):
    """The name of a kind whose inputs are the numbers from 0 to 99, each in a file."""

    def check(folder: Path) -> bool:
        number = int((folder / "number").read_bytes())
        if number == 13:
            raise KeyError(number)
        return number % 2 == 0

    module = types.ModuleType("tests.fuzzing.numbers")
    module.inputs = lambda: st.integers(0, 99).map(lambda number: Files({"number": b"%d" % number}))
    module.check = check
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(worker.os, "dup2", lambda *_: None)
    monkeypatch.setattr(worker.faulthandler, "enable", lambda: None)
    # This process has run other tests, which may have needed more than an input may.
    monkeypatch.setattr(worker, "_peak_bytes", lambda: 0)
    return "numbers"


def test_inputs_are_different_and_end_at_their_number(kind, tmp_path):
    messages = Messages()
    worker.fuzz(kind, tmp_path / "work", 1, 60, 100, messages)
    assert len(messages) == 200 and all(message.outcome == "begun" for message in messages[::2])
    assert sorted(message.outcome for message in messages[1::2])[0].startswith("KeyError in test_campaign.py")
    assert [message.outcome for message in messages[1::2]].count("accepted") == 50
    assert [message.outcome for message in messages[1::2]].count("refused") == 49


def test_a_finding_is_counted_and_saved(kind, tmp_path):
    campaign = Campaign(kind, tmp_path, 1)
    messages = Messages()
    worker.fuzz(kind, tmp_path / "work", 1, 60, 100, messages)
    for message in messages:
        campaign._take(message)
    assert campaign.count == 100 and campaign.findings.total() == 1
    (report,) = (tmp_path / "findings" / kind).glob("*.txt")
    assert "KeyError: 13" in report.read_text()
    assert "100 inputs" in campaign.summary() and "50 accepted, 49 refused, 1 findings" in campaign.summary()


def test_deep_trees_are_written_alike_at_any_depth_of_the_stack():
    tree = "x"
    for _ in range(120):
        tree = [tree]

    def deeper(frames: int) -> str:
        return _dump(tree) if frames == 0 else deeper(frames - 1)

    assert deeper(0) == deeper(500)
