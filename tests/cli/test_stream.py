"""`dynamask stream`: its outputs, and calls that contradict themselves."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.main import main
from tests.runtime.fake_stream import GRID_GMACS, FakePredictor, count_frames, write_video


@pytest.fixture
def fake_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = SimpleNamespace(grid_gmacs=GRID_GMACS)
    monkeypatch.setattr("runtime.bundle.Bundle.open", lambda path: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr("runtime.predictor.load", lambda bundle, target, threads: nullcontext(FakePredictor()))


def test_the_command_writes_the_requested_outputs(tmp_path: Path, fake_bundle: None, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_video(tmp_path / "in.mp4", frames=8)
    outputs = ["--output", tmp_path / "o.mp4", "--jsonl", tmp_path / "o.jsonl", "--frames-dir", tmp_path / "frames"]
    assert main(["stream", "bundle", *map(str, [source, *outputs, "--limit", 5, "--json", tmp_path / "r.json"])]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["frames"], result["source"]) == (5, str(source))
    assert count_frames(tmp_path / "o.mp4") == 5
    assert len(list((tmp_path / "frames").iterdir())) == 5
    assert "5 frames" in capsys.readouterr().out


@pytest.mark.parametrize("exists", [True, False])
def test_output_may_be_a_folder_for_one_source_too(tmp_path: Path, fake_bundle: None, exists: bool) -> None:
    source = write_video(tmp_path / "in.mp4", frames=3)
    if exists:
        (tmp_path / "out").mkdir()
    assert main(["stream", "bundle", str(source), "--output", str(tmp_path / "out")]) == 0
    assert count_frames(tmp_path / "out" / "in.mp4") == 3


def test_several_sources_of_one_name_get_files_of_their_own(tmp_path: Path, fake_bundle: None) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    sources = [write_video(tmp_path / folder / "in.mp4", frames=3) for folder in ("a", "b")]
    assert main(["stream", "bundle", *map(str, [*sources, "--output", tmp_path / "out", "--json", tmp_path / "r.json"])]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["in-1.mp4", "in-2.mp4"]
    assert [stream["frames"] for stream in json.loads((tmp_path / "r.json").read_text())["streams"]] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["in.mp4", "gone.mp4"], "gone.mp4 does not exist"),
        (["in.mp4", "--output", "o.mp4", "--jsonl", "o.mp4"], "o.mp4 is given for two outputs"),
        (["in.mp4", "--jsonl", "o.json", "--json", "o.json"], "o.json is given for two outputs"),
        (["in.mp4", "--json", "."], "is a folder"),
        (["in.mp4", "in.mp4", "--output", "o.mp4"], "o.mp4 is one file, and there are 2 sources"),
        (["in.mp4", "--grid", "routed@0.6"], "'routed@0.6' has no budget that can be kept"),
    ],
)
def test_a_call_that_contradicts_itself_writes_nothing(
    tmp_path: Path,
    fake_bundle: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "in.mp4", frames=3)
    assert main(["stream", "bundle", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_a_source_is_never_written_over(tmp_path: Path, fake_bundle: None, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_video(tmp_path / "in.mp4", frames=3)
    before = source.read_bytes()
    for option in ("--output", "--json"):
        assert main(["stream", "bundle", str(source), option, str(source)]) == 2
        assert "both read and written" in capsys.readouterr().err
        assert source.read_bytes() == before


def test_a_name_that_is_too_long_is_bad_input(tmp_path: Path, fake_bundle: None, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_video(tmp_path / "in.mp4", frames=3)
    for option in ("--output", "--jsonl", "--json", "--frames-dir"):
        assert main(["stream", "bundle", str(source), option, str(tmp_path / ("n" * 300 + ".mp4"))]) == 2
        assert "its name is too long" in capsys.readouterr().err
